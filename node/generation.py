"""One session that this node owns: its core, the log of its events, and who reads it.

Any number of readers take from the log (``node/relay.py``), each from the token on that it lacks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from mesh.core import Effect, Emit, Send
from mesh.errors import CapacityError, Leaving, MeshError, NoRoute, RequestError, SessionLost
from mesh.pipeline import events as core
from mesh.pipeline.session import Session
from mesh.types import NodeId
from node.api.service import CancelReason, EndEvent, Event, GenerationRequest, PromptEvent, Recovery, TokenEvent
from node.driver import Alarm

if TYPE_CHECKING:
    from node.entry import Entry

ORPHAN_S = 60.0
"""A session that outlives its readers (adopted, or asked for with an Idempotency-Key) waits so long for the next."""
TOKEN_BYTES, TOP_BYTES = 120, 90
"""About what an event takes in memory for each token, and for each of its most likely others."""


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
        self.cancelled = False
        """Its client asked for its end."""
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

    def refuse(self) -> None:
        """One reader less, who is told that nothing was started: nor was it, unless others read it."""
        self._readers -= 1
        if self._readers <= 0:
            self.finish("cancelled")

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

    def end_for_good(self) -> None:
        """Its client asked for its end.  That is an answer like any other: whoever reads it, repeats the request under
        its key, or finds it on a disk learns that it is over, where all would run again what nobody knows."""
        self.cancelled = True
        self.finish("cancelled")

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
            route = self._entry.find_route(self.request, stays, strict=True)
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
        self.answers = self._opened.done() and (self.cancelled or last != EndEvent("cancelled"))
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
