"""The owner's end of one session: it follows a route, accepts tokens, and re-routes when a hop is lost.

All transitions of a session are in this file::

                 follow                     every hop Opened
    ROUTING ─────────────► OPENING ──────────────────────────► RUNNING ───────────► ENDED
       ▲                      │ refused, silent, lost             │ refused, silent, stuck, lost
       ├──────────────────────┴───────────────────────────────────┘
       └─────────────► PAUSED ─────► ROUTING
          no room          later

Opening, re-opening, recovering and adopting are one act: a new epoch, a route that keeps every surviving hop, an
``Open`` to all.  The hops then agree among themselves on what is missing (mesh/pipeline/hop.py).

Who adopts starts from its journal.  A hop that knows more answers ``Ahead``: tokens are taken over and the claim made
again; where a newer epoch is followed by a living owner, this one yields.  So does an owner that was only frozen.

A hop without room (it is busy, or gave the room to a higher class) costs no retry.  Where no other has any either, a
session that has begun is paused: every hop gives up its keys and values, so that nobody holds room while it waits for
room, and the next epoch rebuilds them from checkpoints and tokens.

A token is shown when another node than this one holds it.  The sampler knew it first, so that mostly costs nothing;
where the sampler is here, hop 0's word is awaited, and where that is here too, a witness's.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Container
from typing import Literal

import msgspec

from mesh.core import Effect, Emit, Rejected, Send
from mesh.pipeline import messages as m
from mesh.pipeline.events import (
    Accepted,
    Ended,
    Failed,
    FailureCode,
    Moved,
    NeedMove,
    NeedRoute,
    Paused,
    PromptScored,
    Recovered,
    Recovery,
    SessionConfig,
    State,
)
from mesh.pipeline.journal import Adopt, holders, needs_witness
from mesh.pipeline.moves import Move, sources
from mesh.pipeline.prefix import Chain, chain_of
from mesh.types import NodeId, Route


class _Incident(msgspec.Struct):
    """A recovery under way."""

    cause: str
    hop: int
    detected_by: str
    since: float
    replayed: int = 0
    exact: Literal["bitwise", "tokens"] = "bitwise"


class Session:
    """One generation, at its owner (a ``mesh.core.Core``)."""

    def __init__(
        self,
        session: m.SessionId,
        me: NodeId,
        request: m.SessionRequest,
        rng: random.Random,
        now: float,
        config: SessionConfig | None = None,
    ) -> None:
        self.id = session
        self.me = me
        self.request = request
        self.config = config or SessionConfig()
        self.state = State.ROUTING
        self.epoch: m.Epoch = (0, me)
        self.route: Route | None = None
        self.drawn: list[int] = []
        self.witness: NodeId | None = None
        self.recoveries: list[Recovery] = []
        self.shared = 0
        """Positions whose computation every hop of the first route was spared."""
        self.waits_for = ""
        """Of a paused session: why there is no room."""
        self._rng = rng
        self._placement_id: m.PlacementId = (0, 0)
        self._chain: Chain = ()
        self._exact: Literal["bitwise", "tokens"] = "bitwise"
        self._opened: dict[int, m.Opened] = {}
        self._unshown: deque[Accepted] = deque()
        """Tokens of ``drawn`` that only this node is known to hold."""
        self._held = 0
        """Tokens, prompt included, that another node is known to hold, where that is not the sampler ..."""
        self._claimed = 0
        """... and those that every ``Open`` of this epoch brought to its journal's holders."""
        self._suspects: dict[NodeId, float] = {}
        self._forgiven: dict[NodeId, None] = {}
        """Lost, and tried again since nobody else holds their layers."""
        self._busy: m.Refused | None = None
        """The last full hop of this attempt: why there is no route, if there is none."""
        self._refusals = 0
        """Hops that had no room for what had not begun."""
        self._pauses = 0
        """In a row, without a token between them."""
        self._visited: dict[NodeId, None] = {}
        self._incident: _Incident | None = None
        self._leaving: dict[NodeId, float] = {}
        """Nodes that asked to be moved away from, and until when that is taken to hold."""
        self._move: Move | None = None
        self.given = False
        """It was given away: another owns it from now on."""
        self._shipped: tuple[m.Epoch, int] | None = None
        """Until all hops are open: the epoch that pages were shipped in, and what was accepted in it."""
        self._retries = 0
        self._acked = len(request.prompt)
        self._shown = len(request.prompt)
        self._gaps: deque[float] = deque(maxlen=32)
        self._patience = 1.0
        self._last_token_at = self._ask_at = now
        self._standing: dict[int, m.Progressing] = {}
        self._before: dict[int, m.Progressing] = {}
        self._rounds = 0
        self._ends_at = now + request.timeout_s
        self._retry_at: float | None = None
        self._resend_at: float | None = None
        self._open_by: float | None = None
        self._stall_at: float | None = None
        self._silent_at: float | None = None
        self._handlers: dict[type, Callable[..., list[Effect]]] = {
            m.Opened: self._on_opened,
            m.Refused: self._on_refused,
            m.Token: self._on_token,
            m.Progressing: self._on_progressing,
            m.PromptLogprobs: self._on_prompt_logprobs,
            m.Held: self._on_held,
            m.Ahead: self._on_ahead,
            m.Vacate: self._on_vacate,
        }

    @classmethod
    def adopt(
        cls, found: Adopt, me: NodeId, rng: random.Random, now: float, config: SessionConfig | None = None
    ) -> Session:
        """Go on, after ``start``, with what an owner that is lost began."""
        session = cls(found.session, me, found.request, rng, now, config)
        session.epoch, session.route = found.epoch, found.route
        session._ends_at = now + found.left_s
        if not found.given:
            session._suspects[found.epoch[1]] = now + session.config.suspect_s
        # Whoever was on its route has something of it, and so has this node: in the end all of that is freed.
        session._visited.update(dict.fromkeys((*session.parties, me)))
        cause = "owner moved" if found.given else "owner lost"
        session._incident = _Incident(cause, -1, found.detected_by, now)
        session._take(found.drawn)
        return session

    @classmethod
    def restore(
        cls,
        session: m.SessionId,
        me: NodeId,
        request: m.SessionRequest,
        drawn: tuple[int, ...],
        counter: int,
        left_s: float,
        rng: random.Random,
        now: float,
        config: SessionConfig | None = None,
        *,
        cause: str = "restarted",
        kept_by: str = "disk",
    ) -> Session:
        """Go on, after ``start``, with what was kept elsewhere when all that knew it stopped.  ``counter``: of the
        epoch that it was in."""
        made = cls(session, me, request, rng, now, config)
        made.epoch, made._ends_at = (counter, me), now + left_s
        made._incident = _Incident(cause, -1, kept_by, now)
        made._take(drawn)
        return made

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def accepted(self) -> int:
        """Tokens held, prompt included."""
        return len(self.request.prompt) + len(self.drawn)

    def left_s(self, now: float) -> float:
        """Seconds until its deadline."""
        return self._ends_at - now

    @property
    def parties(self) -> list[NodeId]:
        """The nodes of the route in order, and the witness where there is one."""
        hops = [hop.node for hop in self.route.hops] if self.route else []
        return [*hops, self.witness] if self.witness is not None else hops

    @property
    def deadline(self) -> float | None:
        if self.state is State.ENDED:
            return None
        moving = self._move.deadline if self._move is not None else None
        timers = (
            self._ends_at,
            self._retry_at,
            self._resend_at,
            self._open_by,
            self._stall_at,
            self._silent_at,
            moving,
        )
        return min(t for t in timers if t is not None)

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Effect]:
        return self._need_route(now)

    def follow(
        self,
        route: Route,
        placement_id: m.PlacementId,
        now: float,
        exact: Literal["bitwise", "tokens"] = "bitwise",
        witness: NodeId | None = None,
    ) -> list[Effect]:
        """Open ``route`` under a new epoch.  ``exact``: what the substitutes' hardware class promises.

        ``witness``: holds the journal where ``needs_witness``; without one a token is shown that only this node has.
        """
        if self.state is State.ENDED:
            return []
        left = self.parties
        if self._move is not None:
            left += self._move.nodes
            self._shipped, self._move = self._shipped or (self.epoch, self.accepted), None
        self.epoch = (self.epoch[0] + 1, self.me)
        self.route, self._placement_id, self._exact = route, placement_id, exact
        self._chain = self._name_pages()
        self.witness = witness if needs_witness(route, self.me) else None
        self._held, self._claimed = 0, self.accepted
        self.state = State.OPENING
        self._opened, self._standing, self._before, self._rounds = {}, {}, {}, 0
        self._visited.update(dict.fromkeys(self.parties))
        self._retry_at = self._stall_at = self._silent_at = None
        self._resend_at, self._open_by = now + self.config.resend_s, now + self.config.open_timeout_s
        if self._incident is not None:
            self._incident.exact = exact
        # A hop that is no longer on the route is told at once; its lease frees it should this be lost.
        gone = [node for node in dict.fromkeys(left) if node not in self.parties]
        return [*(Send(node, m.Release(self.id, self.epoch)) for node in gone), *self._open_all(now)]

    def unroutable(self, why: str, now: float) -> list[Effect]:
        """No route now: a session that has begun waits for one, with backoff; one that has not is refused."""
        if self.state is not State.ROUTING:
            return []
        if not self._begun and self._incident is None:
            if self._busy is not None:
                return self._fail("busy", self._busy.why, self._busy.retry_after_s)
            return self._fail("no_route", why)
        lost_before = now + self.config.suspect_s - self.config.forgive_s
        self._forgiven.update({node: None for node, until in self._suspects.items() if now < until <= lost_before})
        self._suspects = {node: until for node, until in self._suspects.items() if until > lost_before}
        if self._busy is not None:
            return self._pause(self._busy.why, now)
        self._retry_at = now + self._backoff()
        return []

    def acknowledge(self, shown: int, now: float) -> list[Effect]:
        """The client has taken ``shown`` tokens, prompt included: hop 0 may run on."""
        self._shown = max(self._shown, shown)
        if self.state is not State.RUNNING or self._shown - self._acked < self.config.ack_every:
            return []
        assert self.route is not None
        self._acked = self._shown
        if self._stall_at is not None:
            self._stall_at = max(self._stall_at, now + self._token_deadline())
        return [Send(self.route.hops[0].node, m.Ack(self.id, self.epoch, self._acked))]

    def finish(self, reason: str, now: float) -> list[Effect]:
        """End it now: a stop string was found, or the client went away (``cancelled``)."""
        return [] if self.state is State.ENDED else self._end(Ended(reason))

    def lost(self, node: NodeId, cause: str, now: float) -> list[Effect]:
        """Somebody else found ``node`` dead: a connection reset, gossip."""
        if self.state is State.ENDED or self.route is None:
            return []
        if self._move is not None and node in self._move.nodes:
            self._suspects[node] = now + self.config.suspect_s
            return self._stay()
        if self.state in (State.ROUTING, State.PAUSED):
            self._suspects[node] = now + self.config.suspect_s
            return []
        index = self._index_of(node)
        return self._lose(index, cause, cause, now) if index >= 0 else []

    def receive(self, message: m.ToSession, sender: NodeId, now: float) -> list[Effect]:
        if message.session != self.id or self.state is State.ENDED:
            return []
        index = self._index_of(sender)
        if message.epoch != self.epoch or self.state in (State.ROUTING, State.PAUSED):
            # Who holds a journal of an epoch that it is no longer part of would adopt it one day.
            stale = isinstance(message, m.Held) and message.epoch < self.epoch and index < 0
            return [Send(sender, m.Release(self.id, self.epoch))] if stale else []
        if self._move is not None and sender in self._move.nodes and isinstance(message, m.Arrived | m.Refused):
            return self._on_arrival(message, sender, now)
        if index < 0 or isinstance(message, m.Arrived) or getattr(message, "hop", -1) not in (-1, index):
            return [Emit(Rejected(sender, "speaks for a hop that it is not"))]
        return self._handlers[type(message)](index, message, now)

    def tick(self, now: float) -> list[Effect]:
        if self.state is State.ENDED:
            return []
        if now >= self._ends_at:
            return self._fail("timeout", f"the session's deadline of {self.request.timeout_s:g} s passed")
        if self._retry_at is not None and now >= self._retry_at:
            return self._need_route(now)
        if self._open_by is not None and now >= self._open_by:
            return self._lose(self._first_unopened(), "silent", "deadline", now)
        if self._resend_at is not None and now >= self._resend_at:
            self._resend_at = now + self.config.resend_s
            return self._open_all(now)
        if self._silent_at is not None and now >= self._silent_at:
            return self._on_silence(now)
        if self._stall_at is not None and now >= self._stall_at:
            return self._on_stall(now)
        if self._move is not None and now >= self._move.until:
            return self._stay()
        return self._move.ask(now) if self._move is not None else []

    # -- routing and opening -------------------------------------------------------------------------------------------

    @property
    def _begun(self) -> bool:
        return self.state is State.RUNNING or bool(self.drawn) or bool(self.recoveries)

    @property
    def _keeper(self) -> int | None:
        """Index among the parties of who has to say that it holds a token; None: who drew it does, or nobody can."""
        assert self.route is not None
        nodes = [hop.node for hop in self.route.hops]
        if nodes[-1] != self.me:
            return None
        if nodes[0] != self.me:
            return 0
        return len(nodes) if self.witness is not None else None

    def _need_route(self, now: float) -> list[Effect]:
        self.state = State.ROUTING
        # Should the driver not answer, the question is asked again.
        self._retry_at = now + self.config.backoff_max_s
        self._resend_at = self._open_by = self._stall_at = self._silent_at = None
        exclude = self._excluded(now)
        planned = self._move is not None and self._move.keeps(exclude)
        route = self._move.route if planned and self._move is not None else self.route
        hops = route.hops if route else ()
        keep = tuple(hop for hop in hops if hop.node not in exclude)
        return [Emit(NeedRoute(keep, exclude))]

    def _open_all(self, now: float) -> list[Effect]:
        parties = enumerate(self.parties)
        return [Send(node, self._open(index, now)) for index, node in parties if index not in self._opened]

    def _open(self, index: int, now: float) -> m.Open:
        assert self.route is not None
        holds_journal = index in (0, len(self.route.hops) - 1, len(self.route.hops))
        return m.Open(
            self.id,
            self.epoch,
            route=self.route,
            hop=index,
            placement_id=self._placement_id,
            max_positions=self.request.max_positions,
            priority=self.request.priority,
            accepted=self.accepted,
            request=self.request if holds_journal else None,
            drawn=tuple(self.drawn) if holds_journal else (),
            left_s=self._ends_at - now,
            chain=self._chain if index < len(self.route.hops) else (),
            shipped=self._shipped,
            begun=bool(self.drawn),
        )

    def _name_pages(self) -> Chain:
        """Of all tokens accepted.  Bits of a route that does not promise them stay away from those that do."""
        tokens = [*self.request.prompt, *self.drawn]
        return chain_of(tokens, self.config.page, self.request.model, self.request.sharer, self._exact)

    def _on_opened(self, index: int, message: m.Opened, now: float) -> list[Effect]:
        assert self.route is not None
        if self.state is not State.OPENING or index in self._opened:
            return []
        self._opened[index] = message
        if len(self._opened) < len(self.parties):
            return []
        self.state = State.RUNNING
        self._resend_at = self._open_by = self._shipped = None
        self._acked = self.accepted
        self._busy, self.waits_for = None, ""
        self._held = max(self._held, self._claimed)
        hops = [self._opened[index] for index in range(len(self.route.hops))]
        self.shared = max(self.shared, min(hop.shared for hop in hops))
        if self._incident is not None:
            self._incident.replayed = sum(max(0, self.accepted - 1 - hop.kept) for hop in hops)
        if self._stall_at is None:
            self._stall_at = now + max(self._token_deadline(), self.config.first_token_s)
        return self._show(now)

    def _first_unopened(self) -> int:
        return next(index for index in range(len(self.parties)) if index not in self._opened)

    def _on_refused(self, index: int, message: m.Refused, now: float) -> list[Effect]:
        """Another placement or a full hop is no fault of the hop, and what cannot be drawn by any sampler ends the
        session; anything else is a loss like any other."""
        assert self.route is not None
        if message.code == "dead_end" and index == len(self.route.hops) - 1:
            return self._fail("dead_end", message.why)
        if message.code in ("stale_placement", "unknown_placement"):
            return self._again(message, now)
        if message.code in ("busy", "paused"):
            return self._elsewhere(index, message, now)
        return self._lose(index, message.code, "refusal", now, message.why)

    def _again(self, message: m.Refused, now: float) -> list[Effect]:
        """The same hop may serve in a moment, under the placement that it names."""
        self._retries += 1
        if self._retries > self.request.max_retries:
            return self._fail("no_route" if not self._begun else "session_lost", message.why)
        self.state = State.ROUTING
        self._resend_at = self._open_by = self._stall_at = self._silent_at = None
        self._retry_at = now + min(max(self._backoff(), message.retry_after_s), self.config.backoff_max_s)
        return []

    def _elsewhere(self, index: int, message: m.Refused, now: float) -> list[Effect]:
        """A full hop: try another route.  When none is left what has not begun is refused, what has is paused."""
        assert self.route is not None
        self._busy = message
        self._suspects[self.parties[index]] = now + max(message.retry_after_s, self.config.pause_s)
        if self._begun or self._incident is not None:
            if self._incident is None:
                self._incident = _Incident(message.code, index, "refusal", now)
            return self._need_route(now)
        self._refusals += 1
        if self._refusals > self.request.max_retries:
            return self._fail("busy", message.why, message.retry_after_s)
        return [*self._release_all(), *self._need_route(now)]

    def _pause(self, why: str, now: float) -> list[Effect]:
        assert self.route is not None
        self.state, self._busy, self.waits_for = State.PAUSED, None, why
        wait = min(self.config.pause_max_s, self.config.pause_s * float(1 << min(self._pauses, 10)))
        self._pauses += 1
        told = [Emit(Paused(self.id, why))] if self._pauses == 1 else []
        self._retry_at = now + wait * self._rng.uniform(0.5, 1.0)
        parked = [Send(hop.node, m.Park(self.id, self.epoch)) for hop in self.route.hops]
        return [*parked, *told]

    # -- planned moves -------------------------------------------------------------------------------------------------

    def _on_vacate(self, index: int, message: m.Vacate, now: float) -> list[Effect]:
        """A hop is to go: as long as it does not, it says so again."""
        assert self.route is not None
        if self.state is not State.RUNNING or self._move is not None or index == len(self.route.hops):
            return []
        self._leaving[self.parties[index]] = now + self.config.leaving_s
        leaving = tuple(node for node, until in self._leaving.items() if until > now)
        keep = tuple(hop for hop in self.route.hops if hop.node not in leaving)
        return [Emit(NeedMove(keep, (*self._excluded(now), *leaving)))]

    def prepare(self, route: Route, placement_id: m.PlacementId, now: float) -> list[Effect]:
        """The driver's answer to ``NeedMove``: new hops of ``route`` fetch what they need while the old ones serve."""
        if self.state is not State.RUNNING or self._move is not None:
            return []
        assert self.route is not None
        if route.hops == self.route.hops:
            return []
        room = (placement_id, self.request.max_positions, self.request.priority)
        asks = {
            hop.node: m.Prepare(self.id, self.epoch, route, index, *room, source)
            for index, hop, source in sources(self.route, route)
            if source
        }
        self._visited.update(dict.fromkeys(asks))
        self._move = Move(self.route, route, asks, now, self.config.move_s)
        return self._switch(now) if self._move.ready else self._move.ask(now)

    def _on_arrival(self, message: m.Arrived | m.Refused, sender: NodeId, now: float) -> list[Effect]:
        assert self._move is not None
        if isinstance(message, m.Refused):
            self._suspects[sender] = now + message.retry_after_s
            return self._stay()
        self._move.arrived(sender, message, now)
        return self._switch(now) if self._move.ready else []

    def _switch(self, now: float) -> list[Effect]:
        """All that can be had is there: open the new route."""
        assert self._move is not None
        if self._incident is None:
            self._incident = _Incident("moved", self._index_of(self._move.gone[0]), "planned", now)
        return self._need_route(now)

    def _stay(self) -> list[Effect]:
        """Give the move up."""
        move, self._move = self._move, None
        assert move is not None
        unused = [node for node in move.nodes if node not in self.parties]  # a witness frees what it prepared by itself
        return [Send(node, m.Release(self.id, self.epoch)) for node in unused]

    def give_away(self, barred: Container[NodeId]) -> list[Effect]:
        """Let a holder of the journal that is not ``barred`` own the session; nothing where there is none (now)."""
        if self.state not in (State.RUNNING, State.PAUSED):
            return []
        assert self.route is not None
        others = [node for node in holders(self.route, self.witness) if node != self.me]
        heir = next((node for node in others if node not in barred), None)
        if heir is None:
            return []
        self.state, self.given = State.ENDED, True
        known = tuple(self.drawn)
        told = [Send(x, m.Disown(self.id, self.epoch, heir, known if x == heir else ())) for x in others]
        return [*told, *(self._stay() if self._move is not None else []), Emit(Moved(heir))]

    # -- other owners --------------------------------------------------------------------------------------------------

    def _on_ahead(self, index: int, message: m.Ahead, now: float) -> list[Effect]:
        """More is known there: learn it, and yield to a living owner of a newer epoch or claim again above it."""
        if message.drawn[: len(self.drawn)] == tuple(self.drawn):
            self._take(message.drawn[len(self.drawn) :])
        owner = message.known[1]
        if message.known > self.epoch and owner != self.me and self._suspects.get(owner, now) <= now:
            self.state = State.ENDED
            mine = [] if self.me in self.parties else [Send(self.me, m.Release(self.id, self.epoch))]
            return [*mine, Emit(Moved(owner))]
        self._retries += 1
        if self._retries > self.request.max_retries:
            return self._fail("session_lost", f"node {self.parties[index][:8]} follows another owner")
        self.epoch = max(self.epoch, message.known)
        return self._need_route(now)

    def _take(self, drawn: tuple[int, ...]) -> None:
        """Tokens that another owner accepted: shown by this one when others hold them under its epoch."""
        for token in drawn:
            self._unshown.append(Accepted(self.accepted, token, None, ()))
            self.drawn.append(token)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _on_token(self, index: int, message: m.Token, now: float) -> list[Effect]:
        assert self.route is not None
        if index != len(self.route.hops) - 1:
            return [Emit(Rejected(self.route.hops[index].node, "draws a token but is not the sampler"))]
        if message.position > self.accepted:  # one was lost; those behind it must not all ask
            if now < self._ask_at:
                return []
            self._ask_at = now + self.config.ask_again_s
            return [Send(self.route.hops[index].node, m.Progress(self.id, self.epoch, self.accepted))]
        if message.position < self.accepted:
            return []
        effects = self._on_flow(now)
        self.drawn.append(message.token)
        self._unshown.append(Accepted(message.position, message.token, message.logprob, message.top))
        if self._keeper == len(self.route.hops):
            assert self.witness is not None
            effects.append(Send(self.witness, m.Feed(self.id, self.epoch, message.position, (message.token,))))
        return [*effects, *self._show(now)]

    def _show(self, now: float) -> list[Effect]:
        """Everything that another node holds, and the end after the last of it."""
        if self.state is not State.RUNNING:
            return []
        limit = self.accepted if self._keeper is None else self._held
        effects: list[Effect] = []
        while self._unshown and self._unshown[0].position < limit:
            effects.append(Emit(self._unshown.popleft()))
        reason = None if self._unshown else m.finish_reason(self.request, self.drawn)
        return [*effects, *self._recovered(now), *self._end(Ended(reason))] if reason else effects

    def _on_held(self, index: int, message: m.Held, now: float) -> list[Effect]:
        """A holder's journal grew; one that says nothing new asks whether this session is still owned here."""
        if index != self._keeper or message.tokens <= self._held:
            return [Send(self.parties[index], m.Lease(((self.id, self.epoch),)))]
        self._held = min(message.tokens, self.accepted)
        return self._show(now)

    def _on_flow(self, now: float) -> list[Effect]:
        """A token came: progress, so retries and alarms begin anew, and a recovery is over."""
        if self._incident is None and self.drawn:
            self._gaps.append(now - self._last_token_at)
        self._last_token_at = now
        self._retries, self._pauses, self._rounds, self._patience = 0, 0, 0, 1.0
        self._forgiven.clear()
        self._silent_at = None
        self._stall_at = now + self._token_deadline()
        return self._recovered(now)

    def _recovered(self, now: float) -> list[Effect]:
        incident, self._incident = self._incident, None
        if incident is None:
            return []
        pause = (now - incident.since) * 1e3
        trace = (incident.cause, incident.hop, incident.detected_by, pause, incident.replayed, incident.exact)
        self.recoveries.append(Recovery(*trace))
        return [Emit(Recovered(self.recoveries[-1]))]

    def _on_prompt_logprobs(self, index: int, message: m.PromptLogprobs, now: float) -> list[Effect]:
        assert self.route is not None
        if index != len(self.route.hops) - 1:
            return [Emit(Rejected(self.parties[index], "scores a prompt but is not the sampler"))]
        return [Emit(PromptScored(message.start, message.rows))]

    # -- deadlines -----------------------------------------------------------------------------------------------------

    def _token_deadline(self) -> float:
        longest = max(self._gaps, default=self.config.first_token_s / self.config.stall_factor)
        wanted = max(self.config.stall_min_s, self.config.stall_factor * longest) * self._patience
        return min(wanted, self.config.stall_max_s)

    def _on_stall(self, now: float) -> list[Effect]:
        assert self.route is not None
        assert self._stall_at is not None
        late = now - self._stall_at
        self._stall_at = None
        if late > self.config.stall_min_s / 2:  # our own loop was stalled: what came meanwhile is not read yet
            self._stall_at = now + late
            return []
        if self._shown + m.RUN_AHEAD <= self.accepted - len(self._unshown):  # the client is slow, not the route
            self._stall_at = now + self._token_deadline()
            return []
        self._before, self._standing = self._standing, {}
        self._silent_at = now + self.config.silent_s * self._patience
        ask = m.Progress(self.id, self.epoch, self.accepted)
        effects: list[Effect] = [Send(node, ask) for node in self.parties]
        if self.witness is not None and self._held < self.accepted:
            missing = tuple([*self.request.prompt, *self.drawn][self._held :])
            effects.insert(0, Send(self.witness, m.Feed(self.id, self.epoch, self._held, missing)))
        return effects

    def _on_progressing(self, index: int, message: m.Progressing, now: float) -> list[Effect]:
        assert self.route is not None
        if self._silent_at is None:
            return []
        self._standing[index] = message
        if len(self._standing) < len(self.parties):
            return []
        self._silent_at = None
        moved = any(self._before.get(i) != standing for i, standing in self._standing.items())
        self._rounds = 0 if moved else self._rounds + 1
        if self._rounds >= self.config.stuck_rounds:
            return self._lose(self._stuck_hop(), "stuck", "deadline", now)
        if moved:  # a false alarm: this route needs longer
            self._patience = min(self._patience * 2, 8.0)
        self._stall_at = now + self._token_deadline()
        return []

    def _stuck_hop(self) -> int:
        """The first hop that has work and does none, else the first that does not get what the one before has."""
        assert self.route is not None
        standing = [self._standing[index] for index in range(len(self.route.hops))]
        for index, at in enumerate(standing):
            if at.submitted > at.done:
                return index
        for index in range(1, len(standing)):
            if standing[index].submitted < standing[index - 1].done:
                return index
        return len(standing) - 1

    def _on_silence(self, now: float) -> list[Effect]:
        assert self.route is not None
        assert self._silent_at is not None
        late = now - self._silent_at
        if late > self.config.stall_min_s / 2:
            self._silent_at = now + late
            return []
        silent = next(index for index in range(len(self.parties)) if index not in self._standing)
        return self._lose(silent, "silent", "deadline", now)

    # -- losing a hop, and ending --------------------------------------------------------------------------------------

    def _lose(self, index: int, cause: str, detected_by: str, now: float, why: str = "") -> list[Effect]:
        node = self.parties[index]
        self._suspects[node] = now + self.config.suspect_s
        # Where nobody else holds its layers, a machine that is still not there is waited for: no recovery failed.
        self._retries += node not in self._forgiven or detected_by == "refusal"
        if self._retries > self.request.max_retries:
            return self._fail("session_lost", why or f"hop {index} was lost ({cause})")
        if self._incident is None:
            self._incident = _Incident(cause, index, detected_by, now)
        return self._need_route(now)

    def _index_of(self, node: NodeId) -> int:
        return next((index for index, party in enumerate(self.parties) if party == node), -1)

    def _excluded(self, now: float) -> tuple[NodeId, ...]:
        return tuple(node for node, until in self._suspects.items() if until > now)

    def _backoff(self) -> float:
        """50 ms x 2^k with jitter, at most 2 s."""
        ceiling = min(self.config.backoff_max_s, self.config.backoff_s * float(1 << min(self._retries, 10)))
        return ceiling * self._rng.uniform(0.5, 1.0)

    def _fail(self, code: FailureCode, why: str, retry_after_s: float = 1.0) -> list[Effect]:
        so_far = f"{why}; {len(self.drawn)} of at most {self.request.sampling.max_tokens} tokens were drawn"
        return self._end(Failed(code, so_far if self.drawn else why, retry_after_s))

    def _end(self, event: Ended | Failed) -> list[Effect]:
        self.state = State.ENDED
        if self.epoch[1] != self.me:  # what was adopted and not opened yet: a hop frees for the owner of an epoch alone
            self.epoch = (self.epoch[0] + 1, self.me)
        return [*self._release_all(self._name_pages()), Emit(event)]

    def _release_all(self, chain: Chain = ()) -> list[Effect]:
        """Every node that ever was on a route of this session; one that is gone frees by its lease."""
        return [Send(node, m.Release(self.id, self.epoch, chain)) for node in self._visited]
