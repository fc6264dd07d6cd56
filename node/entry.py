"""The entry role: a request becomes a session, a route is found for it, and its tokens come back in order."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import msgspec

from mesh.core import Effect, Emit, Send
from mesh.errors import CapacityError, Leaving, MeshError, NoRoute, RequestError, SessionLost
from mesh.pipeline import messages as m
from mesh.pipeline import session as core
from mesh.routing import RouteRequest, find_route
from mesh.types import Hop, NodeId, Route
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

LEASE_EVERY_S = 20.0


class LiveGeneration:
    """One session that this node owns, as the API sees it (``node.api.service.Generation``)."""

    def __init__(self, entry: Entry, request: GenerationRequest, session: core.Session) -> None:
        self.request = request
        self.session = session
        self.cached_tokens = 0
        self._entry = entry
        # Bounded by the protocol: hop 0 runs at most RUN_AHEAD tokens past what the client has taken.
        self._events: asyncio.Queue[Event | MeshError | None] = asyncio.Queue()
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._alarm = Alarm(session, lambda: self.step(session.tick(entry.clock())), entry.clock)
        self._scored = 1

    @property
    def route(self) -> str:
        route = self.session.route
        return self._entry.name_route(route) if route else ""

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        return tuple(_shown(trace) for trace in self.session.recoveries)

    async def opened(self) -> None:
        """Until every hop has room.  Raises what the API answers when one has none."""
        await self._opened

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            event = await self._events.get()
            if isinstance(event, MeshError):
                raise event
            if event is None:
                return
            yield event
            if isinstance(event, EndEvent):
                return

    def acknowledge(self, position: int) -> None:
        self.step(self.session.acknowledge(position + 1, self._entry.clock()))

    async def cancel(self, reason: CancelReason) -> None:
        self.finish("stop" if reason == "stop" else "cancelled")

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
            self._events.put_nowait(TokenEvent(event.position, event.token, event.logprob, event.top))
        elif isinstance(event, core.NeedRoute):
            self._route(event)
        elif isinstance(event, core.PromptScored):
            self._score(event)
        elif isinstance(event, core.Recovered):
            self._entry.on_recovered(self, event.recovery)
        elif isinstance(event, core.Ended | core.Failed):
            self._on_end(event)
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
            exact = self._entry.exactness(route)
            self.step(self.session.follow(route, self._entry.view().placement_id, now, exact))

    def _score(self, event: core.PromptScored) -> None:
        """A replay may score positions again, and tokens that were drawn: only what comes next of the prompt counts."""
        rows = event.rows[max(0, self._scored - event.start) : max(0, len(self.request.prompt) - event.start)]
        if not rows or event.start > self._scored:
            return
        tops = tuple(top for _, top in rows)
        self._events.put_nowait(PromptEvent(self._scored, tuple(logprob for logprob, _ in rows), tops))
        self._scored += len(rows)

    def _on_end(self, event: core.Ended | core.Failed) -> None:
        self._entry.forget(self)
        self._alarm.stop()
        last = _last_of(event)
        if not self._opened.done():
            cancelled = RequestError("the session was cancelled", code="cancelled", status=409)
            self._opened.set_exception(last if isinstance(last, MeshError) else cancelled)
        self._events.put_nowait(last)

    def abandon(self) -> None:
        """Whoever opened it no longer waits."""
        self._opened.cancel()
        self.finish("cancelled")


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
        hop=str(trace.hop),
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
        self._routed = 0
        """Routes asked for so far: the turn of ``round_robin``."""

    # -- the API's side ------------------------------------------------------------------------------------------------

    async def open(self, request: GenerationRequest) -> LiveGeneration:
        """Open the session at every hop.  CapacityError, NoRoute: certainly nothing was started."""
        session = core.Session(request.session, self.me, _journal(request), self._rng, self.clock())
        generation = self._sessions[request.session] = LiveGeneration(self, request, session)
        try:
            generation.step(session.start(self.clock()))
            await generation.opened()
        except asyncio.CancelledError:
            generation.abandon()
            raise
        return generation

    def find(self, session: m.SessionId) -> list[LiveGeneration]:
        """``session`` and its further choices (``<session>-1`` ...), those that still run here."""
        return [g for name, g in self._sessions.items() if name == session or name.startswith(f"{session}-")]

    def sessions(self) -> list[LiveGeneration]:
        return list(self._sessions.values())

    # -- the mesh's side -----------------------------------------------------------------------------------------------

    def receive(self, message: m.ToSession, sender: NodeId) -> None:
        generation = self._sessions.get(message.session)
        if generation is None:
            if isinstance(message, m.Opened):  # it ended while this was on its way
                self.post(Send(sender, m.Release(message.session, message.epoch)))
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
            held: dict[NodeId, list[tuple[m.SessionId, m.Epoch]]] = {}
            for generation in self.sessions():
                session = generation.session
                for hop in session.route.hops if session.route else ():
                    held.setdefault(hop.node, []).append((session.id, session.epoch))
            for node, sessions in held.items():
                self.post(Send(node, m.Lease(tuple(sessions))))

    def forget(self, generation: LiveGeneration) -> None:
        self._sessions.pop(generation.session.id, None)

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
                hardware=self._hardware(ask.keep),
                outstanding=dict(outstanding),
            ),
        )

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
    )
