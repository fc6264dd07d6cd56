"""Reading a session from anywhere in the mesh: who owns it now, and its events from there.

``Reading`` is what the API holds of a session.  It takes events from the log at the owner, here or over the peer door,
and when that node is lost or has yielded, it looks for the next owner and goes on at the token that it came to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import msgspec
from aiohttp import ClientError, ClientResponse, StreamReader, web

from mesh.errors import CapacityError, Leaving, MeshError, PeerError, PeerUnreachable, SessionLost
from mesh.types import NodeId
from mesh.view import MeshView
from node.api.service import CancelReason, EndEvent, Event, GenerationRequest, PromptEvent, Recovery, TokenEvent
from node.entry import Entry
from node.generation import LiveGeneration
from node.net.calls import ERRORS_BY_CODE
from node.peers import Peers

PATH = "/peer/sessions/{session}"
ASK_S, ASK_MOST_S = 0.5, 4.0
"""For a member to say whether it owns a session; it gets longer each time."""
FIND_S = 8.0
"""A session that nobody owns for this long is lost: longer than a silent owner goes unnoticed."""
FIND_EVERY_S, FIND_MOST_S = 0.1, 0.4
"""All members are asked again after this long, each time later: anybody may ask for sessions that none
knows."""
ATTACH_TRIES = 3
UNSURE_MOST = 8
"""Looks of ``FIND_S`` before a reader is told: what nobody reads for so long has mostly ended."""
HELD, SILENT, UNKNOWN = -1, -2, -3
"""Of who does not own a session: its journal is there, no answer came, or nothing is there."""
MAX_FRAME = 4 << 20
KEEPALIVE_S = 5.0
SILENT_S = 2 * KEEPALIVE_S


class Facts(msgspec.Struct, frozen=True, tag=True):
    """First of all: what the session is.  ``Trace`` and ``Broke`` may end it."""

    request: GenerationRequest
    route: str


class Trace(msgspec.Struct, frozen=True, tag=True):
    recoveries: tuple[Recovery, ...]
    cached_tokens: int = 0


class Broke(msgspec.Struct, frozen=True, tag=True):
    code: str
    message: str


class Step(msgspec.Struct, frozen=True, tag=True):
    prompt: PromptEvent | None = None
    token: TokenEvent | None = None
    end: EndEvent | None = None


Frame = Facts | Trace | Broke | Step
_decode = msgspec.msgpack.Decoder(Frame).decode


class Relay:
    """Finds sessions, and serves those of this node to other nodes."""

    def __init__(
        self, me: NodeId, entry: Entry, peers: Peers, view: Callable[[], MeshView], holds: Callable[[str], bool]
    ) -> None:
        """``holds``: whether this node has the journal of a session, and would adopt it from an owner that is lost."""
        self.me, self.entry = me, entry
        self._peers, self._view, self._holds = peers, view, holds
        self.readers = 0
        """Streams that clients of this node read at the moment."""
        self._left: Literal["", "leaving", "gone"] = ""
        self._open: dict[ClientResponse, bool] = {}
        """What is read from other owners, and whether its client goes on elsewhere by itself."""
        peers.door.on_rpc("owner", self._on_owner)
        peers.door.add_get(PATH, self._serve)

    # -- leaving -------------------------------------------------------------------------------------------------------

    def leave(self, *, now: bool = False) -> None:
        """Send clients on that go on elsewhere by themselves, and (``now``) all others, with an error that says how."""
        self._left = "gone" if now else "leaving"
        for response, follows in list(self._open.items()):
            if follows or now:
                response.close()

    def left(self, request: GenerationRequest) -> Leaving | None:
        """Why nothing more of this session is read here, if so."""
        if self._left != "gone" and not (self._left and request.follows):
            return None
        return Leaving(
            f"this node is leaving; session {request.session} goes on at the others: GET "
            f"/v1/sessions/{request.session.split('-')[0]}/events there, with the Last-Event-ID that you have"
        )

    # -- finding -------------------------------------------------------------------------------------------------------

    async def find(self, session: str, patience_s: float) -> NodeId | None:
        """The node that owns ``session`` in the highest epoch; while none does, up to ``patience_s`` later.

        As long as a holder of its journal needs to notice that the owner is lost, where there is a holder or not all
        have answered.  Raises ``PeerUnreachable`` when it is still so then: that nobody has it must not be said.
        """
        loop, wait_s, ask_s = asyncio.get_running_loop(), FIND_EVERY_S, ASK_S
        began = loop.time()
        while True:
            counter, node = await self._ask_all(session, ask_s)
            patience_s = FIND_S if counter in (HELD, SILENT) else patience_s
            if counter >= 0:
                return node
            if loop.time() >= began + patience_s:
                break
            await asyncio.sleep(wait_s)
            wait_s, ask_s = min(FIND_MOST_S, 2 * wait_s), min(ASK_MOST_S, 2 * ask_s)
        if counter != UNKNOWN:
            raise PeerUnreachable("not all nodes have said whether they have this session: ask again in a moment")
        return None

    async def _ask_all(self, session: str, ask_s: float) -> tuple[int, NodeId | None]:
        """The newest of what all members say; no node where none owns it."""
        others = [member.id for member in self._view().live() if member.id != self.me]
        answers = await asyncio.gather(*(self._ask(node, session, ask_s) for node in others))
        counter, node = max(zip((*answers, self._counter(session)), (*others, self.me), strict=True))
        return counter, node if counter >= 0 else None

    async def _ask(self, node: NodeId, session: str, ask_s: float) -> int:
        try:
            answer = await self._peers.request(node, "owner", session.encode(), ask_s)
            return msgspec.msgpack.decode(answer, type=int)
        except (MeshError, msgspec.DecodeError):
            return SILENT

    def _counter(self, session: str) -> int:
        """Of the epoch in which this node owns ``session`` or ended it, or else what it knows of it."""
        generation = self.entry.get(session)
        if generation is not None:
            return generation.session.epoch[0]
        return HELD if self._holds(session) else UNKNOWN

    async def _on_owner(self, sender: NodeId, payload: bytes) -> bytes:
        return msgspec.msgpack.encode(self._counter(payload[:128].decode("ascii", "replace")))

    # -- serving -------------------------------------------------------------------------------------------------------

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        """The log of one session, length-prefixed frames, until it ends or moves or the reader is gone."""
        generation = self.entry.get(request.match_info["session"])
        tokens = request.query.get("tokens", "0")
        if generation is None or not tokens.isdecimal():
            raise PeerError("no such session is owned here")
        response = web.StreamResponse()
        generation.attach()
        try:
            await response.prepare(request)
            await response.write(_framed(Facts(generation.request, generation.route)))
            await self._pass_on(generation, int(tokens), response)
            await response.write_eof()
        except ConnectionResetError:  # the reader is gone, which is no fault of anybody here
            pass
        finally:
            await generation.cancel("disconnected")
        return response

    async def _pass_on(self, generation: LiveGeneration, tokens: int, response: web.StreamResponse) -> None:
        events, told = generation.events(tokens), Trace(())
        pending: asyncio.Task[Event | None] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(events, None))
                done, _ = await asyncio.wait({pending}, timeout=KEEPALIVE_S)
                if not done:
                    await response.write(_framed(Step()))
                    continue
                event, pending = pending.result(), None
                if event is None:
                    return
                trace = Trace(generation.recoveries, generation.cached_tokens)
                if trace != told:  # before the token that may be a reader's last
                    told = trace
                    await response.write(_framed(trace))
                await response.write(_framed(_step(event)))
                if isinstance(event, TokenEvent):
                    generation.acknowledge(event.position)
        except MeshError as error:
            await response.write(_framed(Broke(error.code, str(error))))
        finally:
            if pending is not None:
                pending.cancel()

    # -- reading -------------------------------------------------------------------------------------------------------

    async def read(self, node: NodeId, session: str, tokens: int, follows: bool = False) -> AsyncIterator[Frame]:
        """The frames that ``node`` serves of ``session``.  ``PeerUnreachable`` when it breaks off."""
        try:
            path = f"/peer/sessions/{session}?tokens={tokens}"
            async with self._peers.get(node, path, {}, lasting=True) as response:
                self._open[response] = follows
                try:
                    while True:
                        yield await _read_frame(response.content)
                finally:
                    del self._open[response]
        except asyncio.IncompleteReadError:
            return
        except (ClientError, OSError, TimeoutError) as error:
            raise PeerUnreachable(f"node {node[:8]} broke off: {type(error).__name__}") from error
        except msgspec.DecodeError as error:
            raise PeerError("not a frame of a session") from error

    async def attach(self, session: str, patience_s: float) -> Reading | None:
        """A reader of ``session``, wherever it runs or has ended; ``None``: nobody knows it."""
        for _ in range(ATTACH_TRIES):
            owner = await self.find(session, patience_s)
            local = self.entry.get(session)
            if local is not None and owner == self.me:
                local.attach()
                return Reading(self, local.request, local)
            if owner is None:
                return None
            try:
                async for frame in self.read(owner, session, 0):
                    if isinstance(frame, Facts):
                        return Reading(self, frame.request, None, frame.route)
            except (PeerUnreachable, PeerError, CapacityError):
                await asyncio.sleep(FIND_EVERY_S)  # it went just now: to another, perhaps
        return None


class Reading:
    """One reader of one session (``node.api.service.Generation``): follows it from owner to owner."""

    def __init__(self, relay: Relay, request: GenerationRequest, local: LiveGeneration | None, route: str = "") -> None:
        self.request = request
        self._relay, self._local, self._route = relay, local, route
        self._told: list[tuple[NodeId, tuple[Recovery, ...]]] = []
        """What owners before this one, or a remote one, had to recover from."""
        self._cached = 0
        """As the last of them said."""
        self._tokens = 0
        self._scored = 1
        """The first position of the prompt whose log-probability has not come yet."""
        self._unsure = 0
        """Looks in a row in which not all nodes answered and nobody owned it."""

    @property
    def route(self) -> str:
        return self._local.route if self._local is not None else self._route

    @property
    def cached_tokens(self) -> int:
        return self._local.cached_tokens if self._local is not None else self._cached

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        told = [*self._told, *([(self._relay.me, self._local.recoveries)] if self._local is not None else [])]
        return tuple(recovery for _, recoveries in told for recovery in recoveries)

    def acknowledge(self, position: int) -> None:
        if self._local is not None:
            self._local.acknowledge(position)

    async def cancel(self, reason: CancelReason) -> None:
        if self._local is not None:
            local = self._leave_local()
            await local.cancel(reason)

    async def __aiter__(self) -> AsyncIterator[Event]:
        self._relay.readers += 1
        try:
            async for event in self._events():
                yield event
        finally:
            self._relay.readers -= 1

    async def _events(self) -> AsyncIterator[Event]:
        while True:
            source = self._local.events(self._tokens) if self._local is not None else self._remote()
            async for event in source:
                if isinstance(event, PromptEvent):  # until the first token each source gives all of them again
                    event = event.from_on(self._scored)
                    self._scored += len(event.logprobs)
                self._tokens += isinstance(event, TokenEvent)
                yield event
                if isinstance(event, EndEvent):
                    return
            await self._move_on()

    async def _remote(self) -> AsyncIterator[Event]:
        """The events at another owner, as long as it can be read."""
        left = self._relay.left(self.request)
        if left is not None:
            raise left
        try:
            owner = await self._relay.find(self.request.session, FIND_S)
        except PeerUnreachable:
            self._unsure += 1
            if self._unsure >= UNSURE_MOST:
                raise
            return  # asked again
        self._unsure = 0
        if owner is None:
            gone = SessionLost(f"after {self._tokens} tokens no node has the session any more")
            gone.code = "session_gone"  # not that it failed: run again under its key it may well end
            raise gone
        if owner == self._relay.me:
            return  # adopted here meanwhile
        try:
            async for frame in self._relay.read(owner, self.request.session, self._tokens, self.request.follows):
                if isinstance(frame, Broke):
                    raise _failure(frame)
                if isinstance(frame, Trace):
                    self._tell(owner, frame.recoveries, frame.cached_tokens)
                elif isinstance(frame, Step):
                    for event in (frame.prompt, frame.token, frame.end):
                        if event is not None:
                            yield event
        except (PeerUnreachable, PeerError, CapacityError):
            await asyncio.sleep(FIND_EVERY_S)

    def _leave_local(self) -> LiveGeneration:
        """What it told is kept."""
        assert self._local is not None
        local, self._local = self._local, None
        self._tell(self._relay.me, local.recoveries, local.cached_tokens)
        return local

    def _tell(self, owner: NodeId, recoveries: tuple[Recovery, ...], cached: int) -> None:
        """All that ``owner`` had to recover from so far."""
        if self._told and self._told[-1][0] == owner:
            self._told.pop()
        self._told.append((owner, recoveries))
        self._cached = cached

    async def _move_on(self) -> None:
        """The owner yielded or is gone: from now on whatever the mesh says."""
        if self._local is not None:
            self._leave_local()
        mine = self._relay.entry.get(self.request.session)
        if mine is not None:
            mine.attach()
            self._local = mine


async def _read_frame(content: StreamReader) -> Frame:
    """The next frame.  ``TimeoutError``: the owner is frozen or cut off, or it would have said that it lives."""
    async with asyncio.timeout(SILENT_S):
        size = int.from_bytes(await content.readexactly(4), "big")
        if size > MAX_FRAME:
            raise PeerError("a frame of a session is too large")
        return _decode(await content.readexactly(size))


def _step(event: Event) -> Step:
    if isinstance(event, TokenEvent):
        return Step(token=event)
    return Step(end=event) if isinstance(event, EndEvent) else Step(prompt=event)


def _framed(frame: Frame) -> bytes:
    data = msgspec.msgpack.encode(frame)
    return len(data).to_bytes(4, "big") + data


def _failure(broke: Broke) -> MeshError:
    kind: Any = ERRORS_BY_CODE.get(broke.code, SessionLost)
    error: MeshError = kind(broke.message)
    error.code = broke.code
    return error
