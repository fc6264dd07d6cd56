"""Sessions of class ``batch`` outlive a power cut of the whole mesh: their journals are on disk at owner and holders.

A request is on disk before it is accepted.  Its tokens follow once a second: what a second brought is written and
synced at once, and what is lost with the power is drawn again, to the same tokens.  A file goes when its session's
result does.  After a restart the owner goes on with what it finds, the sampler ``HOLDER_S`` later where nobody did, the
first hop after that; whoever finds that somebody else owns the session drops its copy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from mesh.errors import CapacityError, MeshError, PeerUnreachable
from mesh.pipeline import messages as m
from mesh.pipeline.events import State
from mesh.pipeline.journal import Journals, holders
from mesh.types import NodeId
from node.api.service import GenerationRequest
from node.claims import Claims
from node.entry import RESULT_S, Entry
from node.relay import Relay
from node.session_log import Head, Kept, SessionLogs, Tail
from node.telemetry import get_logger

EVERY_S = 1.0
HOLDER_S = 10.0
"""A holder of a journal waits so long for those before it to go on with a session."""
FIND_S = 1.0
MAX_KEPT = 4096
"""Sessions on the disk of one node; beyond, requests of class batch are refused."""
FORGET_S = 7 * 86_400.0
"""A file that nobody went on with for this long is removed."""


class NotKept(MeshError):
    """The disk refuses what has to be on it; nothing was started.  Room would not help: it is not waited for."""

    status = 503
    code = "disk_refuses"
    retry_after_s = 5.0


class _State(NamedTuple):
    """A session as it stands."""

    head: Head
    drawn: tuple[int, ...]
    left_s: float
    ended: bool = False


class Durable:
    """Writes what is to be kept, and goes on with it after a restart."""

    def __init__(
        self,
        me: NodeId,
        logs: SessionLogs,
        entry: Entry,
        journals: Journals,
        relay: Relay,
        claims: Claims,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.me = me
        self._logs, self._entry, self._journals = logs, entry, journals
        self._relay, self._claims, self._clock = relay, claims, clock
        self._log = get_logger("durable")
        self._written: dict[m.SessionId, tuple[int, bool]] = {}
        """Tokens on disk of each session that is kept, and whether they are all."""
        self._found: list[Kept] = []
        self._writing = asyncio.Lock()

    async def load(self) -> None:
        """Read what an earlier life left.  Call first."""
        self._found = await asyncio.to_thread(self._read)
        if self._found:
            self._log.info("sessions on disk", count=len(self._found))

    def _read(self) -> list[Kept]:
        found = []
        for name in self._logs.names():
            try:
                age_s, kept = self._logs.age_s(name), self._logs.read(name)
                if kept is None or age_s > (RESULT_S if kept.ended else FORGET_S):
                    self._logs.remove(name)
                else:
                    found.append(kept)
            except OSError as error:  # a bad sector costs one session, not the node
                self._log.warning("a session on disk cannot be read", session=name, why=str(error))
        return found

    async def run(self, settled: Callable[[], bool]) -> None:
        """Until cancelled; goes on with what was found once the node is in the mesh."""
        began = 0.0
        while True:
            await asyncio.sleep(EVERY_S)
            await self.write()
            if settled():
                began = began or self._clock()
                await self.go_on(self._clock() - began)

    def check(self, request: GenerationRequest) -> None:
        """Raises ``CapacityError`` when there is no place for one more."""
        if request.priority == "batch" and len(self._written) >= MAX_KEPT:
            raise CapacityError(f"{MAX_KEPT} sessions of class batch are kept at this node already", 5.0)

    async def keep(self, request: GenerationRequest) -> None:
        """Before a request is accepted, which runs already: on disk when this returns.  Raises ``NotKept``."""
        if request.priority == "batch":
            await self.write()
            if request.session not in self._written:
                raise NotKept("class batch is kept on disk, and this node's is full or fails: ask another node")

    async def write(self) -> None:
        """Bring the disk up to date.  A disk that refuses costs the sessions their copy, not their lives."""
        async with self._writing:
            states = dict(self._states())
            try:
                await asyncio.to_thread(self._write, states)
            except OSError as error:
                self._log.warning("sessions are not on disk", why=str(error))

    # -- what is to be kept --------------------------------------------------------------------------------------------

    def _states(self) -> Iterator[tuple[m.SessionId, _State]]:
        now = self._clock()
        for journal in self._journals:
            place_left = journal.session in self._written or len(self._written) < MAX_KEPT
            if journal.request.priority == "batch" and place_left:
                line = holders(journal.route, None)
                place = 1 + (line.index(self.me) if self.me in line else len(line))
                head = Head(journal.epoch, journal.request, place)
                yield journal.session, _State(head, journal.drawn, journal.ends_at - now)
        for session in self._entry.batch():
            head = Head(session.epoch, session.request, 0)
            yield session.id, _State(head, tuple(session.drawn), session.left_s(now), session.state is State.ENDED)

    def _write(self, states: dict[m.SessionId, _State]) -> None:
        refusal: OSError | None = None
        for session, state in states.items():
            try:
                self._bring(session, state)
            except OSError as error:  # what there is of it may be torn: begun anew the next time
                self._written.pop(session, None)
                refusal = error
        for session in [name for name in self._written if name not in states]:
            try:
                self._logs.remove(session)
                del self._written[session]
            except OSError as error:
                refusal = error
        if refusal is not None:
            raise refusal

    def _bring(self, session: m.SessionId, state: _State) -> None:
        count, ended = self._written.get(session, (-1, False))
        if not 0 <= count <= len(state.drawn):
            self._logs.begin(session, state.head)
            count, ended = self._written[session] = (0, False)
        if count < len(state.drawn) or state.ended > ended:
            self._logs.append(session, Tail(state.drawn[count:], state.left_s, state.ended))
            self._written[session] = (len(state.drawn), state.ended)

    # -- after a restart -----------------------------------------------------------------------------------------------

    async def go_on(self, since_s: float) -> None:
        """With what was found, if it is this node's turn so long after it came in."""
        for kept in list(self._found):
            if since_s >= kept.head.place * HOLDER_S:
                try:
                    await self._go_on(kept)
                except PeerUnreachable:  # not all have said whether they own it: asked again in a second
                    continue
                self._found.remove(kept)

    async def _go_on(self, kept: Kept) -> None:
        """Own the session, unless somebody else does, or its key has another by now."""
        try:
            request = msgspec.msgpack.decode(kept.head.request.form, type=GenerationRequest)
            known = await self._relay.find(kept.session, FIND_S) is not None
            if not known and request.idempotency_key and not request.choice:
                known = await self._claims.claim(request) != kept.session
        except PeerUnreachable:
            raise
        except (MeshError, msgspec.DecodeError) as error:
            self._log.warning("a session on disk is of no use", session=kept.session, why=str(error))
            known = True
        async with self._writing:  # a round that looked around before this would remove what goes on now
            self._written.setdefault(kept.session, (len(kept.drawn), kept.ended))  # if it is over here, it goes
            if not known:
                self._log.info("going on", session=kept.session, tokens=len(kept.drawn))
                self._entry.restore(request, kept)
