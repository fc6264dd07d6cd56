"""Idempotency keys: which session runs under a key, so that a repeated request attaches instead of running twice.

A key, scoped by its caller, is claimed at the two live nodes that rank highest for it (rendezvous hashing): the first
is asked, then the second is told what it said, so that either may be lost, and a change of members moves few keys.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import msgspec

from mesh.errors import MeshError, PeerError, RequestError
from mesh.types import NodeId
from mesh.view import MeshView
from node.api.service import GenerationRequest
from node.peers import Peers

KEEP_S = 600.0
MAX_CLAIMS = 20_000
"""At one node; the oldest are forgotten."""
ASK_S = 1.0
HOLDERS = 2


class Claim(msgspec.Struct, frozen=True):
    key: bytes
    """SHA-256 of caller and idempotency key."""
    body_hash: str
    session: str


class Claims:
    """The claims that this node keeps, and asking where others are kept."""

    def __init__(
        self, me: NodeId, peers: Peers, view: Callable[[], MeshView], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.me = me
        self._peers, self._view, self._clock = peers, view, clock
        self._kept: dict[bytes, tuple[float, Claim]] = {}
        peers.door.on_rpc("claim", self._on_claim)

    async def claim(self, request: GenerationRequest) -> str:
        """The session of the first request under this key.  RequestError (409): that one had another body."""
        name = f"{request.caller}\0{request.idempotency_key}".encode()
        wish = Claim(hashlib.sha256(name).digest(), request.body_hash, request.session)
        found = wish
        for node in self._holders(wish.key):  # one after the other, or two first requests could each find the other's
            found = await self._ask(node, found) or found
        if found.body_hash != wish.body_hash:
            raise RequestError(
                "this Idempotency-Key was used for another request: use a new key for each",
                param="Idempotency-Key",
                code="idempotency_key_reused",
                status=409,
            )
        return found.session

    def keep(self, wish: Claim) -> Claim:
        """What is kept under its key: an earlier claim, or this one from now on."""
        now = self._clock()
        for key, (since, _) in list(self._kept.items()):
            if now - since <= KEEP_S and len(self._kept) < MAX_CLAIMS:
                break
            del self._kept[key]
        return self._kept.setdefault(wish.key, (now, wish))[1]

    def _holders(self, key: bytes) -> list[NodeId]:
        live = [member.id for member in self._view().live()] or [self.me]
        return sorted(live, key=lambda node: hashlib.sha256(key + node.encode()).digest())[:HOLDERS]

    async def _ask(self, node: NodeId, wish: Claim) -> Claim | None:
        if node == self.me:
            return self.keep(wish)
        try:
            answer = await self._peers.request(node, "claim", msgspec.msgpack.encode(wish), ASK_S)
            return msgspec.msgpack.decode(answer, type=Claim)
        except (MeshError, msgspec.DecodeError):
            return None  # lost or frozen: the other one knows

    async def _on_claim(self, sender: NodeId, payload: bytes) -> bytes:
        try:
            wish = msgspec.msgpack.decode(payload, type=Claim)
        except msgspec.DecodeError as error:
            raise PeerError("not a claim") from error
        return msgspec.msgpack.encode(self.keep(wish))
