"""The entry role: a request becomes a session, a route is found for it, and its tokens come back in order.

A session comes to be owned here by a request, or by adoption when its owner was lost; what has ended can be read for a
while.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from mesh.core import Rejected, Send
from mesh.errors import RequestError
from mesh.pipeline import events as core
from mesh.pipeline import messages as m
from mesh.pipeline.journal import Adopt, disclaim, needs_witness
from mesh.pipeline.prefix import PAGE
from mesh.pipeline.session import Session
from mesh.routing import RouteRequest, find_route, find_substitute
from mesh.types import Hop, NodeId, Priority, Route
from mesh.view import MeshView
from node.api.service import GenerationRequest
from node.generation import LiveGeneration
from node.net.frames import MAX_MESSAGE
from node.session_log import Kept

LEASE_EVERY_S = 20.0
HEIR_S = 10.0
"""Hops that have not heard yet to whom a session was given away are left alone for this long."""
RESULT_S = 600.0
"""What has ended can be read for this long ..."""
RESULT_BYTES = 64 << 20
"""... as long as all results together take about less memory than this; the oldest go first."""
MAX_REQUEST = MAX_MESSAGE - (64 << 10)
"""Bytes of a request with all its tokens: it has to fit a frame, to open the session anywhere."""


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
        drawn, resubmitted = request.resume, request.rerun or bool(request.resume)
        request = msgspec.structs.replace(request, resume=(), rerun=False)
        journal, now = _journal(request), self.clock()
        _check_size(journal)
        if resubmitted:
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
        ended = [kept for _, kept in self._ended.values() if kept is not None and not (kept.moved or kept.cancelled)]
        return [g.session for g in (*ended, *self.sessions()) if g.request.priority == "batch"]

    def get(self, session: m.SessionId) -> LiveGeneration | None:
        """What runs here under this name, or has ended here a while ago and not moved."""
        if session in self._sessions:
            return self._sessions[session]
        ended = self._ended.get(session, (0.0, None))[1]
        return None if ended is None or ended.moved else ended

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

    def stop(self) -> None:
        """This node stops, told to or for a bug: others own what they know of, the rest ends."""
        self.give_away()
        for generation in self.sessions():
            generation.finish("leaving")

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

    def find_route(self, request: GenerationRequest, ask: core.NeedRoute, *, strict: bool = False) -> Route:
        """``strict``: with every hop that is to be kept, or not at all."""
        self._routed += 1
        find = find_route if strict else find_substitute
        outstanding = Counter(hop.node for g in self.sessions() if g.session.route for hop in g.session.route.hops)
        return find(
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
