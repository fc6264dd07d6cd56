"""Ending a session because its client said so, wherever in the mesh it runs, and while nobody runs it.

Its choices may have different owners, and one whose owner was just lost has none until a holder of its journal adopts
it.  So all members are asked, and asked again as long as one holds the journal of what none has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from mesh.errors import MeshError, PeerError, PeerUnreachable
from mesh.pipeline.journal import Journals
from mesh.types import NodeId
from mesh.view import MeshView
from node.api.service import Caller
from node.entry import Entry
from node.peers import Peers
from node.relay import FIND_EVERY_S, FIND_MOST_S, FIND_S

ASK_S = 2.0


class Wish(msgspec.Struct, frozen=True):
    session: str
    caller: str
    admin: bool

    def means(self, name: str, caller: str) -> bool:
        """Whether it is about the session ``name`` that ``caller`` made."""
        mine = self.admin or caller == self.caller
        return mine and (name == self.session or name.startswith(f"{self.session}-"))


class Found(msgspec.Struct, frozen=True):
    """What there was of it at one node."""

    ended: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    """Its journal is there: whoever owns it ends it, or this node adopts it."""


class Endings:
    """Ends sessions here, and asks other nodes to."""

    def __init__(
        self, me: NodeId, entry: Entry, journals: Journals, peers: Peers, view: Callable[[], MeshView]
    ) -> None:
        self.me = me
        self._entry, self._journals, self._peers, self._view = entry, journals, peers, view
        peers.door.on_rpc("cancel", self._on_cancel)

    async def cancel(self, session: str, caller: Caller) -> bool:
        """End ``session`` and its further choices.  False: every node denies that this caller has such a one.

        ``PeerUnreachable``: that cannot be said, since not all answer or a lost owner is not replaced yet.
        """
        wish = Wish(session, caller.id, "admin" in caller.scopes)
        loop, wait_s, ended = asyncio.get_running_loop(), FIND_EVERY_S, set[str]()
        began = loop.time()
        while True:
            others = [member.id for member in self._view().live() if member.id != self.me]
            found = [self._here(wish), *await asyncio.gather(*(self._ask(node, wish) for node in others))]
            ended.update(name for each in found if each is not None for name in each.ended)
            held = {name for each in found if each is not None for name in each.held}
            if held <= ended and (ended or None not in found):  # who is silent and owns it ends it when nobody reads
                return bool(ended)
            if loop.time() >= began + FIND_S:
                raise PeerUnreachable("not all nodes have said whether they run this session: ask again in a moment")
            await asyncio.sleep(wait_s)
            wait_s = min(FIND_MOST_S, 2 * wait_s)

    def _here(self, wish: Wish) -> Found:
        running = [g for g in self._entry.sessions() if wish.means(g.session.id, g.request.caller)]
        held = frozenset(j.session for j in self._journals if wish.means(j.session, j.request.sharer))
        for generation in running:
            generation.end_for_good()
        return Found(frozenset(generation.session.id for generation in running), held)

    async def _ask(self, node: NodeId, wish: Wish) -> Found | None:
        try:
            answer = await self._peers.request(node, "cancel", msgspec.msgpack.encode(wish), ASK_S)
            return msgspec.msgpack.decode(answer, type=Found)
        except (MeshError, msgspec.DecodeError):
            return None

    async def _on_cancel(self, sender: NodeId, payload: bytes) -> bytes:
        try:
            wish = msgspec.msgpack.decode(payload, type=Wish)
        except msgspec.DecodeError as error:
            raise PeerError("not a wish to end a session") from error
        return msgspec.msgpack.encode(self._here(wish))
