"""The committed record, as a running node keeps and changes it: admissions, tokens, keys, tombstones, placement.

Only the coordinator changes it; every other node passes its wish on.  A change is an ``Edit``, a pure function of the
content, so that it can be tried again on whatever was committed meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from mesh.core import Effect
from mesh.election.events import Busy, NotLeader
from mesh.election.record import ApiKey, Content, JoinToken, Record
from mesh.errors import MeshError, PeerError, PeerUnreachable, RequestError
from mesh.types import ModelId, ModelInfo, NodeId
from node.identity import Identity
from node.net.door import admit_verb
from node.peers import Peers
from node.security import admission
from node.security.admission import Office, Refused, Reply, Request, SeedMember
from node.security.ca import Authority
from node.security.keyring import new_gossip_key
from node.security.token import revoked

COMMIT_S = 6.0
"""A change is tried for so long: more than an election takes."""
ASK_S = 8.0
MAX_SEEDS = 16
MAX_TOKENS = 256


class Edit(msgspec.Struct, frozen=True, tag=True):
    """A change of the record that any member may ask the coordinator for."""

    def apply(self, content: Content) -> Content:
        raise AssertionError("an edit of no kind")


class AddToken(Edit, frozen=True):
    token: JoinToken

    def apply(self, content: Content) -> Content:
        """The oldest tokens make room; the rest stay when they end, so that a refusal can say why."""
        kept = tuple(token for token in content.tokens if token.id != self.token.id)
        return msgspec.structs.replace(content, tokens=(*kept, self.token)[-MAX_TOKENS:])


class RevokeToken(Edit, frozen=True):
    id: str

    def apply(self, content: Content) -> Content:
        if all(token.id != self.id for token in content.tokens):
            raise RequestError("no such token", code="token_not_found", status=404)
        tokens = tuple(revoked(token) if token.id == self.id else token for token in content.tokens)
        return msgspec.structs.replace(content, tokens=tokens)


class AddKey(Edit, frozen=True):
    keys: tuple[ApiKey, ...]

    def apply(self, content: Content) -> Content:
        """A key of several scopes has a row for each; tried twice it is there once."""
        new = {key.id for key in self.keys}
        kept = (key for key in content.api_keys if key.id not in new)
        return msgspec.structs.replace(content, api_keys=(*kept, *self.keys))


class RevokeKey(Edit, frozen=True):
    id: str

    def apply(self, content: Content) -> Content:
        left = tuple(key for key in content.api_keys if key.id != self.id)
        if len(left) == len(content.api_keys):
            raise RequestError("no such key", code="key_not_found", status=404)
        return msgspec.structs.replace(content, api_keys=left)


class RevokeNode(Edit, frozen=True):
    node: NodeId
    gossip_key: bytes

    def apply(self, content: Content) -> Content:
        """The tombstone, and a gossip key that the revoked node never sees."""
        if self.node in content.tombstones:
            return content
        sealed = tuple(entry for entry in content.sealed_ca if entry[0] != self.node)
        return msgspec.structs.replace(
            content,
            tombstones=(*content.tombstones, self.node),
            gossip_keys=(self.gossip_key,),
            sealed_ca=sealed,
        )


class AddModel(Edit, frozen=True):
    model: ModelInfo

    def apply(self, content: Content) -> Content:
        for model in models_of(content):
            if model.id == self.model.id:
                if model.manifest != self.model.manifest:
                    raise RequestError(
                        f"the mesh serves other weights as {model.id!r} already: offer these under another name "
                        f"(--model PATH=NAME), or remove the other first (python -m node models remove {model.id})",
                        code="model_name_taken",
                        status=409,
                    )
                return content
        return msgspec.structs.replace(content, models=(*content.models, msgspec.msgpack.encode(self.model)))


class RemoveModel(Edit, frozen=True):
    id: ModelId

    def apply(self, content: Content) -> Content:
        left = tuple(raw for raw in content.models if _model(raw).id != self.id)
        if len(left) == len(content.models):
            raise RequestError("no such model", code="model_not_found", status=404)
        return msgspec.structs.replace(content, models=left)


AnyEdit = AddToken | RevokeToken | AddKey | RevokeKey | RevokeNode | AddModel | RemoveModel


def models_of(content: Content) -> tuple[ModelInfo, ...]:
    """Models that the mesh serves, in the order in which they were offered."""
    return tuple(_model(raw) for raw in content.models)


class RecordKeeper:
    """What a node may do with the record.  ``noticed`` is called for every event of the election."""

    def __init__(self, identity: Identity, peers: Peers) -> None:
        self.me, self._identity, self._peers = identity.node_id, identity, peers
        self._core = peers.core
        self._office = Office(self._core.durable.mesh_id)
        self._authority: Authority | None = None
        self._lock = asyncio.Lock()
        self._event = asyncio.Event()
        peers.door.on_rpc("admit", admit_verb(self.admit_here))
        peers.door.on_rpc("edit", self._on_edit)

    @property
    def content(self) -> Content:
        return self._core.committed.content

    def serves(self, model: ModelInfo) -> bool:
        """Whether these weights are in the record under this name."""
        return any(known.id == model.id and known.manifest == model.manifest for known in models_of(self.content))

    @property
    def voters(self) -> tuple[NodeId, ...]:
        return self._core.committed.voters

    @property
    def leads(self) -> bool:
        return self._core.role == "leader"

    def noticed(self) -> None:
        """Something about the election changed: whoever waits looks again."""
        self._event.set()
        self._event = asyncio.Event()

    # -- changing ------------------------------------------------------------------------------------------------------

    async def edit(self, edit: AnyEdit) -> None:
        """Commit ``edit``, here or through the coordinator.  ``NotLeader`` when there is none to ask."""
        try:
            await self.change(edit.apply)
        except NotLeader as error:
            leader = error.leader or self._core.leader
            if leader is None or leader == self.me:
                raise
            await self._peers.request(leader, "edit", msgspec.msgpack.encode(edit), ASK_S)

    async def change(self, edit: Callable[[Content], Content]) -> Content:
        """Commit ``edit`` of the content as coordinator; returns what was committed.

        Raises ``NotLeader`` or ``Busy`` when that did not come about within ``COMMIT_S`` (a change that was proposed
        may then still be committed by the next coordinator), and what ``edit`` raises.
        """
        async with self._lock:
            try:
                async with asyncio.timeout(COMMIT_S):
                    return await self._change(edit)
            except TimeoutError:
                raise Busy("the change was not committed in time: is a majority of the voters alive?") from None

    async def _change(self, edit: Callable[[Content], Content]) -> Content:
        while True:
            if not self.leads:
                raise NotLeader(self._core.leader)
            changed = self._event
            if self._core.ready:
                content = edit(self._core.record.content)
                if content == self._core.record.content:
                    return content
                try:
                    committed = await self._propose(content)
                except Busy:
                    pass
                else:
                    if committed is not None:
                        return committed
                    continue
            await _wait(changed, 0.2)

    async def _propose(self, content: Content) -> Content | None:
        """``None``: a record of another term was committed in its place, so that ``content`` may be lost."""
        made: list[Record] = []

        def propose(core: Any, now: float) -> list[Effect]:
            effects: list[Effect] = core.propose(now, content)
            made.append(core.record)  # here: when the effects are performed, it may be another already
            return effects

        await self._peers.election.call(propose)
        proposed = made[0]
        while self._core.committed.id < proposed.id:
            if not self.leads:
                raise NotLeader(self._core.leader)
            await _wait(self._event, 0.2)
        committed = self._core.committed
        # Records of one term follow each other; one of a later term holds ours only if it is the same (R4).
        ours = committed.id.term == proposed.id.term or committed.hash == proposed.hash
        return committed.content if ours else None

    async def _on_edit(self, sender: NodeId, payload: bytes) -> bytes:
        try:
            edit = msgspec.msgpack.decode(payload, type=AnyEdit)
        except msgspec.DecodeError as error:
            raise PeerError(f"not an edit: {error}") from None
        await self.change(edit.apply)
        return b""

    def new_gossip_key(self) -> bytes:
        return new_gossip_key(self.content.gossip_keys)

    # -- admitting -----------------------------------------------------------------------------------------------------

    async def admit(self, request: Request) -> Reply:
        """Decide a join here, or at the coordinator.  Raises ``Refused``."""
        if self.leads:
            return await self.admit_here(request)
        leader = self._core.leader
        if leader is None:
            raise Refused("unavailable")
        try:
            raw = await self._peers.request(leader, "admit", msgspec.msgpack.encode(request), ASK_S)
        except PeerUnreachable:
            raise Refused("unavailable") from None
        return admission.decode_answer(raw)

    async def admit_here(self, request: Request) -> Reply:
        """Count the token's use in the record first, sign after that committed."""
        authority = self.authority()
        if not self.leads or authority is None:
            raise Refused("unavailable")
        verdict = self._office.judge(request, self.content, time.time())
        if verdict.content is not None:
            try:
                await self.change(lambda content: self._office.judge(request, content, time.time()).content or content)
            except Refused:
                raise
            except MeshError:
                raise Refused("unavailable") from None
        leaf = self._office.sign(verdict, authority, time.time())
        return Reply(
            certificate=leaf,
            cas=(authority.der,),
            mesh_id=self._office.mesh_id,
            gossip_keys=self.content.gossip_keys,
            members=self._seeds(),
            record=msgspec.msgpack.encode(self._core.committed),
        )

    def authority(self) -> Authority | None:
        """The CA with its key, where it was sealed to this node."""
        if self._authority is None or self._authority.der != self.content.ca_certificate:
            sealed = dict(self.content.sealed_ca).get(self.me)
            self._authority = Authority.unsealed(self._identity, self._office.mesh_id, sealed) if sealed else None
        return self._authority

    def _seeds(self) -> tuple[SeedMember, ...]:
        alive = [member for member in self._peers.swim.members() if member.state == "alive"]
        alive.sort(key=lambda member: member.node != self.me)
        return tuple(SeedMember(member.node, member.address) for member in alive[:MAX_SEEDS])


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


def _model(raw: bytes) -> ModelInfo:
    return msgspec.msgpack.decode(raw, type=ModelInfo)
