"""The entry role: a request becomes a session, a route is found for it, and its tokens come back in order.

Every session that this node owns has a log of its events, from which any number of readers take (``node/relay.py``).
A session comes to be owned here by a request, or by adoption when its owner was lost; what has ended can be read for a
while.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import msgspec

from mesh.core import Effect, Emit, Rejected, Send
from mesh.errors import CapacityError, Leaving, MeshError, NoRoute, RequestError, SessionLost
from mesh.pipeline import events as core
from mesh.pipeline import messages as m
from mesh.pipeline.journal import Adopt, disclaim, needs_witness
from mesh.pipeline.prefix import PAGE
from mesh.pipeline.session import Session
from mesh.routing import RouteRequest, find_route
from mesh.types import Hop, NodeId, Priority, Route
from mesh.view import MeshView
from node.api.service import (
    CancelReason,
    EndEvent,
    Event,
    GenerationRequest,
    PromptEvent,
    Recovery,
    TokenEvent,
)
from node.driver import Alarm
from node.net.frames import MAX_MESSAGE
from node.session_log import Kept

LEASE_EVERY_S = 20.0
ORPHAN_S = 60.0
"""A session that outlives its readers (adopted, or asked for with an Idempotency-Key) waits so long for the next."""
HEIR_S = 10.0
"""Hops that have not heard yet to whom a session was given away are left alone for this long."""
RESULT_S = 600.0
"""What has ended can be read for this long ..."""
RESULT_BYTES = 64 << 20
"""... as long as all results together take about less memory than this; the oldest go first."""
TOKEN_BYTES, TOP_BYTES = 120, 90
"""About what an event takes in memory for each token, and for each of its most likely others."""
MAX_REQUEST = MAX_MESSAGE - (64 << 10)
"""Bytes of a request with all its tokens: it has to fit a frame, to open the session anywhere."""


class LiveGeneration:
    """One session that this node owns or owned, as the API sees it (``node.api.service.Generation``)."""

    def __init__(self, entry: Entry, request: GenerationRequest, session: Session, *, adopted: bool = False) -> None:
        self.request = request
        self.session = session
        self.adopted = adopted
        self.moved = False
        """Another node owns it now: the log here is as far as this one came ..."""
        self.heir: NodeId | None = None
        """... if it was given away, this one."""
        self.answers = True
        """Has ended with something to read, if it has ended."""
        self._entry = entry
        self._log: list[Event | MeshError] = []
        self.bytes = TOKEN_BYTES * len(request.prompt)
        """About what the request and its log take in memory."""
        self._grew = asyncio.Event()
        self._readers = 0 if adopted else 1
        self._orphaned: asyncio.TimerHandle | None = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if adopted:
            self._opened.set_result(None)
        self._alarm = Alarm(session, lambda: self.step(session.tick(entry.clock())), entry.clock)
        self._scored = 1

    @property
    def route(self) -> str:
        route = self.session.route
        return self._entry.name_route(route) if route else ""

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        return tuple(_shown(trace) for trace in self.session.recoveries)

    @property
    def cached_tokens(self) -> int:
        """Positions of the prompt that no hop had to compute."""
        return min(self.session.shared, len(self.request.prompt))

    async def opened(self) -> None:
        """Until every hop has room.  Raises what the API answers when one has none."""
        await asyncio.shield(self._opened)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self.events(0)

    async def events(self, tokens: int) -> AsyncIterator[Event]:
        """What follows the first ``tokens`` drawn tokens, to the end; or, without an end, until it has moved."""
        at = 0
        first = len(self.request.prompt) + tokens
        while True:
            while at < len(self._log):
                event = self._log[at]
                at += 1
                if isinstance(event, MeshError):
                    raise event
                if isinstance(event, EndEvent) or (tokens == 0 or getattr(event, "position", 0) >= first):
                    yield event
                if isinstance(event, EndEvent):
                    return
            if self.moved:
                return
            await self._grew.wait()

    def attach(self) -> None:
        """One reader more."""
        self._readers += 1
        if self._orphaned is not None:
            self._orphaned.cancel()
            self._orphaned = None

    def acknowledge(self, position: int) -> None:
        self.step(self.session.acknowledge(position + 1, self._entry.clock()))

    async def cancel(self, reason: CancelReason) -> None:
        """One reader less.  ``stop`` ends it for all, whose text ends at the same place; else the last one does."""
        self._readers -= 1
        if reason == "stop":
            self.finish("stop")
        elif reason == "cancelled" or (self._readers <= 0 and not self._may_wait):
            self.finish("cancelled")
        elif self._readers <= 0:
            self.orphan()

    def orphan(self) -> None:
        """Nobody reads: go on unattended, and end if nobody comes.  Class ``batch`` ends by itself."""
        self.acknowledge(self.session.accepted - 1)
        if self.request.priority != "batch" and self._orphaned is None and not self.over:
            loop = asyncio.get_running_loop()
            self._orphaned = loop.call_later(ORPHAN_S, self.finish, "cancelled")

    @property
    def _may_wait(self) -> bool:
        return self.adopted or bool(self.request.idempotency_key)

    @property
    def over(self) -> bool:
        return self.session.state is core.State.ENDED

    def finish(self, reason: str) -> None:
        self.step(self.session.finish(reason, self._entry.clock()))

    def step(self, effects: list[Effect]) -> None:
        """Perform the core's effects; routing is answered at once from this node's own view."""
        for effect in effects:
            if isinstance(effect, Send):
                self._entry.post(effect)
            else:
                assert isinstance(effect, Emit), effect
                self._on_event(effect.event)
        self._alarm.update()
        if self.session.state is core.State.RUNNING and not self._opened.done():
            self._opened.set_result(None)

    def _on_event(self, event: Any) -> None:
        if isinstance(event, core.Accepted):
            self._append(TokenEvent(event.position, event.token, event.logprob, event.top))
            if self._readers <= 0:
                self.acknowledge(event.position)
        elif isinstance(event, core.NeedRoute):
            self._route(event)
        elif isinstance(event, core.NeedMove):
            self._plan(event)
        elif isinstance(event, core.PromptScored):
            self._score(event)
        elif isinstance(event, core.Recovered):
            self._entry.on_recovered(self, event.recovery)
        elif isinstance(event, core.Ended | core.Failed):
            self._on_end(event)
        elif isinstance(event, core.Moved):
            self.moved = True
            self.heir = event.owner if self.session.given else None
            self._close()
            if not self._opened.done():
                self._opened.set_result(None)
        else:
            self._entry.on_event(event)

    def _route(self, ask: core.NeedRoute) -> None:
        now = self._entry.clock()
        try:
            route = self._entry.find_route(self.request, ask)
        except NoRoute as error:
            entry = self._entry.view().placement.of(self.request.model)
            why = entry.missing if entry and entry.missing else str(error)
            self.step(self.session.unroutable(why, now))
        else:
            exact, witness = self._entry.exactness(route), self._entry.witness(self.request, route, ask.exclude)
            self.step(self.session.follow(route, self._entry.view().placement_id, now, exact, witness))

    def _plan(self, ask: core.NeedMove) -> None:
        """Hops are to go: to nodes that stay, if there are any with their layers."""
        stays = core.NeedRoute(ask.keep, (*ask.exclude, *self._entry.leavers()))
        try:
            route = self._entry.find_route(self.request, stays)
        except NoRoute:
            return
        self.step(self.session.prepare(route, self._entry.view().placement_id, self._entry.clock()))

    def _score(self, event: core.PromptScored) -> None:
        """A replay may score positions again, and tokens that were drawn: only what comes next of the prompt counts."""
        rows = event.rows[max(0, self._scored - event.start) : max(0, len(self.request.prompt) - event.start)]
        if not rows or event.start > self._scored:
            return
        tops = tuple(top for _, top in rows)
        self._append(PromptEvent(self._scored, tuple(logprob for logprob, _ in rows), tops))
        self._scored += len(rows)

    def _on_end(self, event: core.Ended | core.Failed) -> None:
        last = _last_of(event)
        if isinstance(last, EndEvent) and last.reason != "cancelled" and not self._opened.done():
            self._opened.set_result(None)  # it was resubmitted with all that there is to draw
        # Under its key it can be asked for again: a refusal is no answer, and neither is half of one.
        self.answers = self._opened.done() and last != EndEvent("cancelled")
        if not self._opened.done():
            cancelled = RequestError("the session was cancelled", code="cancelled", status=409)
            self._opened.set_exception(last if isinstance(last, MeshError) else cancelled)
        self._append(last)
        self._close()

    def _append(self, event: Event | MeshError) -> None:
        self._log.append(event)
        self.bytes += _bytes_of(event)
        self._wake()

    def _wake(self) -> None:
        self._grew.set()
        self._grew = asyncio.Event()

    def _close(self) -> None:
        self._alarm.stop()
        if self._orphaned is not None:
            self._orphaned.cancel()
            self._orphaned = None
        self._entry.forget(self)
        self._wake()

    def abandon(self) -> None:
        """Whoever opened it no longer waits."""
        self._opened.cancel()
        self.finish("cancelled")


def _bytes_of(event: Event | MeshError) -> int:
    if isinstance(event, TokenEvent):
        return TOKEN_BYTES + TOP_BYTES * len(event.top)
    if isinstance(event, PromptEvent):
        return TOKEN_BYTES * len(event.logprobs) + TOP_BYTES * sum(map(len, event.tops))
    return TOKEN_BYTES


def _last_of(event: core.Ended | core.Failed) -> EndEvent | MeshError:
    """What the API hears last of a session."""
    if isinstance(event, core.Ended):
        reasons: dict[str, EndEvent] = {"stop": EndEvent("stop"), "length": EndEvent("length")}
        reasons["cancelled"] = EndEvent("cancelled")
        return reasons.get(event.reason) or Leaving("the node that answered is leaving: ask again, at another")
    if event.code == "busy":
        return CapacityError(event.why, event.retry_after_s)
    if event.code == "no_route":
        return NoRoute(event.why)
    if event.code == "dead_end":
        return RequestError(event.why, param="response_format", code="grammar_dead_end")
    lost = SessionLost(event.why)
    lost.code = event.code
    return lost


def _shown(trace: core.Recovery) -> Recovery:
    return Recovery(
        cause=trace.cause,
        hop=str(trace.hop) if trace.hop >= 0 else "owner",
        detected_by=trace.detected_by,
        pause_ms=round(trace.pause_ms, 1),
        positions_replayed=trace.positions_replayed,
        exact=trace.exact,
    )


class Entry:
    """All sessions that this node owns."""

    def __init__(
        self,
        me: NodeId,
        *,
        view: Callable[[], MeshView],
        post: Callable[[Send], None],
        on_event: Callable[[Any], None],
        balance: str,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        on_recovered: Callable[[LiveGeneration, core.Recovery], None],
    ) -> None:
        self.me, self.view, self.post, self.clock = me, view, post, clock
        self.on_event, self.on_recovered = on_event, on_recovered
        self._balance, self._rng = balance, rng
        self._sessions: dict[m.SessionId, LiveGeneration] = {}
        self._ended: dict[m.SessionId, tuple[float, LiveGeneration | None]] = {}
        """When it ended or moved, oldest first, and its result unless that was given up for want of room."""
        self._result_bytes = 0
        self._routed = 0
        """Routes asked for so far: the turn of ``round_robin``."""

    # -- the API's side ------------------------------------------------------------------------------------------------

    async def open(self, request: GenerationRequest) -> LiveGeneration:
        """Open the session at every hop.  CapacityError, NoRoute: certainly nothing was started."""
        if request.session in self._sessions:
            return await self._join(self._sessions[request.session])
        drawn, request = request.resume, msgspec.structs.replace(request, resume=())
        journal, now = _journal(request), self.clock()
        _check_size(journal)
        if drawn:
            known = (request.session, self.me, journal, drawn, 0, request.timeout_s)
            session = Session.restore(*known, self._rng, now, cause="resubmitted", kept_by="client")
        else:
            session = Session(request.session, self.me, journal, self._rng, now)
        generation = self._sessions[request.session] = LiveGeneration(self, request, session)
        try:
            generation.step(session.start(self.clock()))
            await generation.opened()
        except asyncio.CancelledError:
            generation.abandon()
            raise
        return generation

    @staticmethod
    async def _join(generation: LiveGeneration) -> LiveGeneration:
        """One reader more: the request was repeated under its key while the first still waited to be admitted."""
        generation.attach()
        try:
            await generation.opened()
        except asyncio.CancelledError:
            await generation.cancel("disconnected")
            raise
        return generation

    def adopt(self, found: Adopt) -> None:
        """The owner of a session whose journal is held here is lost: go on with it, for whoever comes to read."""
        if found.session in self._sessions:
            return
        try:
            request = msgspec.msgpack.decode(found.request.form, type=GenerationRequest)
        except msgspec.DecodeError:  # of another version, or made to harm: no other session may pay for it
            return self.on_event(Rejected(found.epoch[1], "opened a session in a form that is not known here"))
        self._own(request, Session.adopt(found, self.me, self._rng, self.clock()))

    def restore(self, request: GenerationRequest, kept: Kept) -> None:
        """Go on with what was on disk when the node stopped."""
        if kept.session not in self._sessions:
            counter, now = kept.head.epoch[0], self.clock()
            known = (kept.head.request, kept.drawn, counter, kept.left_s)
            self._own(request, Session.restore(kept.session, self.me, *known, self._rng, now))

    def _own(self, request: GenerationRequest, session: Session) -> None:
        """A session that others began: it waits for a reader."""
        self._forget_result(session.id)
        generation = LiveGeneration(self, request, session, adopted=True)
        self._sessions[session.id] = generation
        generation.step(session.start(self.clock()))
        generation.orphan()

    def batch(self) -> list[Session]:
        """Sessions of class ``batch`` that run here, or have ended with a result that can still be read."""
        ended = [kept for _, kept in self._ended.values() if kept is not None and not kept.moved]
        return [g.session for g in (*ended, *self.sessions()) if g.request.priority == "batch"]

    def get(self, session: m.SessionId) -> LiveGeneration | None:
        """What runs here under this name, or has ended here a while ago and not moved."""
        if session in self._sessions:
            return self._sessions[session]
        ended = self._ended.get(session, (0.0, None))[1]
        return None if ended is None or ended.moved else ended

    def find(self, session: m.SessionId) -> list[LiveGeneration]:
        """``session`` and its further choices (``<session>-1`` ...), those that still run here."""
        return [g for name, g in self._sessions.items() if name == session or name.startswith(f"{session}-")]

    def sessions(self) -> list[LiveGeneration]:
        return list(self._sessions.values())

    def paused(self) -> list[Priority]:
        """The classes of the sessions here that wait for room in the mesh."""
        return [g.request.priority for g in self.sessions() if g.session.state is core.State.PAUSED]

    def give_away(self) -> None:
        """This node leaves: let others own its sessions, where others know them.  What cannot be now may be later."""
        leavers = self.leavers()
        for generation in self.sessions():
            generation.step(generation.session.give_away(leavers))

    def leavers(self) -> tuple[NodeId, ...]:
        """Nodes that are to go."""
        return tuple(member.id for member in self.view().members if member.profile.draining)

    # -- the mesh's side -----------------------------------------------------------------------------------------------

    def receive(self, message: m.ToSession, sender: NodeId) -> None:
        generation = self._sessions.get(message.session)
        if generation is None:
            when, was = self._ended.get(message.session, (0.0, None))
            heir = was.heir if was is not None and self.clock() - when < HEIR_S else None
            for effect in disclaim(message, sender, message.session in self._ended, heir):
                assert isinstance(effect, Send)
                self.post(effect)
            return
        generation.step(generation.session.receive(message, sender, self.clock()))

    def lost(self, node: NodeId, cause: str) -> None:
        """A connection to ``node`` was reset and could not be made again, or gossip holds it dead."""
        for generation in self.sessions():
            generation.step(generation.session.lost(node, cause, self.clock()))

    async def renew_leases(self) -> None:
        """Until cancelled: one message to each peer for all the sessions it holds for us."""
        while True:
            await asyncio.sleep(LEASE_EVERY_S)
            self._expire()
            held: dict[NodeId, list[tuple[m.SessionId, m.Epoch]]] = {}
            for generation in self.sessions():
                session = generation.session
                for node in session.parties:
                    held.setdefault(node, []).append((session.id, session.epoch))
            for node, sessions in held.items():
                self.post(Send(node, m.Lease(tuple(sessions))))

    def forget(self, generation: LiveGeneration) -> None:
        """It ended or moved: its name and result stay for a while."""
        name, now = generation.session.id, self.clock()
        if self._sessions.get(name) is generation:
            del self._sessions[name]
            self._forget_result(name)
            self._ended[name] = (now, generation if generation.answers else None)
            self._result_bytes += generation.bytes if generation.answers else 0
        self._expire()

    def _expire(self) -> None:
        """Results that are too old, or too many: the oldest first."""
        now = self.clock()
        for old, (when, kept) in list(self._ended.items()):
            if now - when > RESULT_S:
                self._forget_result(old)
            elif self._result_bytes <= RESULT_BYTES:
                break
            elif kept is not None:
                self._result_bytes -= kept.bytes
                self._ended[old] = (when, None)

    def _forget_result(self, session: m.SessionId) -> None:
        kept = self._ended.pop(session, (0.0, None))[1]
        self._result_bytes -= kept.bytes if kept is not None else 0

    # -- routes --------------------------------------------------------------------------------------------------------

    def find_route(self, request: GenerationRequest, ask: core.NeedRoute) -> Route:
        self._routed += 1
        outstanding = Counter(hop.node for g in self.sessions() if g.session.route for hop in g.session.route.hops)
        return find_route(
            self.view(),
            RouteRequest(
                model=request.model,
                positions=len(request.prompt) + request.sampling.max_tokens,
                balance=request.balance or self._balance,
                allowed_nodes=request.allowed_nodes or None,
                max_layers=request.max_layers,
                exclude=ask.exclude,
                keep=ask.keep,
                seed=self._routed,
                prefix=" ".join(map(str, (request.caller, *request.prompt[:PAGE]))),
                hardware=self._hardware(ask.keep),
                outstanding=dict(outstanding),
            ),
        )

    def witness(self, request: GenerationRequest, route: Route, exclude: tuple[NodeId, ...]) -> NodeId | None:
        """Who shall hold the journal besides this node, where that is all ends of ``route``: not always the same."""
        if not needs_witness(route, self.me):
            return None
        allowed = set(request.allowed_nodes)
        others = [x for x in self.view().live() if x.id != self.me and x.id not in exclude]
        others = [x for x in others if not x.profile.draining] or others
        fit = [x.id for x in others if not allowed or x.id in allowed or x.profile.name in allowed]
        return max(fit, key=lambda node: hashlib.sha256(f"{request.session}{node}".encode()).digest(), default=None)

    def _hardware(self, keep: tuple[Hop, ...]) -> str:
        """A substitute of the surviving hops' hardware class replays to the same bits."""
        members = [self.view().member(hop.node) for hop in keep]
        return next((x.profile.hardware for x in members if x and x.profile.exact), "")

    def name_route(self, route: Route) -> str:
        return ",".join(f"{self._name(hop)}:{hop.start}-{hop.end}" for hop in route.hops)

    def _name(self, hop: Hop) -> str:
        member = self.view().member(hop.node)
        return member.profile.name if member and member.profile.name else hop.node[:8]

    def exactness(self, route: Route) -> Literal["bitwise", "tokens"]:
        """Replays give the same bits where all hops are of one hardware class and passed the self-test."""
        members = [self.view().member(hop.node) for hop in route.hops]
        classes = {member.profile.hardware for member in members if member and member.profile.exact}
        return "bitwise" if len(classes) == 1 and all(x and x.profile.exact for x in members) else "tokens"


def _check_size(request: m.SessionRequest) -> None:
    """RequestError for one that could not be sent to a hop with all the tokens that it asks for."""
    size = len(msgspec.msgpack.encode(request)) + 5 * request.sampling.max_tokens
    if size > MAX_REQUEST:
        raise RequestError(
            f"{len(request.prompt)} tokens in the prompt and {request.sampling.max_tokens} to come take {size} bytes; "
            f"at most {MAX_REQUEST} can be passed on: shorten one of them",
            param="max_tokens",
            code="context_length_exceeded",
        )


def _journal(request: GenerationRequest) -> m.SessionRequest:
    return m.SessionRequest(
        model=request.model,
        prompt=request.prompt,
        sampling=request.sampling,
        priority=request.priority,
        timeout_s=request.timeout_s,
        max_retries=request.max_retries,
        balance=request.balance,
        allowed_nodes=request.allowed_nodes,
        prompt_logprobs=request.prompt_logprobs >= 0,
        form=msgspec.msgpack.encode(request),
        sharer=request.caller,  # how soon an answer comes tells nothing of what others asked
    )
