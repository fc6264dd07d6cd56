"""The owner's end of one session: it follows a route, accepts tokens, and re-routes when a hop is lost.

All transitions of a session are in this file::

                 follow                     every hop Opened
    ROUTING ─────────────► OPENING ──────────────────────────► RUNNING ───────────► ENDED
       ▲                      │ refused, silent, lost             │ refused, silent, stuck, lost
       └──────────────────────┴───────────────────────────────────┘

Opening, re-opening and recovering are one act: a new epoch, a route that keeps every surviving hop, an ``Open`` to
all.  The hops then agree among themselves on what is missing (mesh/pipeline/stage.py).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Literal

import msgspec

from mesh.core import Effect, Emit, Rejected, Send
from mesh.pipeline import messages as m
from mesh.types import Hop, NodeId, Route


class SessionConfig(msgspec.Struct, frozen=True):
    """Times in seconds of a session's owner."""

    resend_s: float = 0.5
    """An Open without an answer is sent again (it is idempotent) ..."""
    open_timeout_s: float = 2.0
    """... and the hop given up after this long."""
    stall_min_s: float = 0.5
    """The next token's deadline is max(this, ``stall_factor`` x the longest recent gap) ..."""
    stall_factor: float = 6.0
    stall_max_s: float = 10.0
    first_token_s: float = 2.0
    """... and this for the first one, of which no gap is known yet."""
    silent_s: float = 1.0
    """A hop that does not answer Progress for this long is lost."""
    stuck_rounds: int = 3
    """So many rounds of Progress without any progress at any hop, and the first stuck hop is replaced."""
    ack_every: int = 8
    backoff_s: float = 0.05
    backoff_max_s: float = 2.0
    suspect_s: float = 10.0
    """A hop that was lost is not chosen again for this long ..."""
    forgive_s: float = 2.0
    """... or, where nobody else holds its layers, for this long."""


class State(Enum):
    ROUTING = "routing"
    OPENING = "opening"
    RUNNING = "running"
    ENDED = "ended"


class Recovery(msgspec.Struct, frozen=True):
    """The trace of one recovery, as the stream's final usage shows it."""

    cause: str
    hop: int
    detected_by: str
    pause_ms: float
    """From the detection to the next token."""
    positions_replayed: int
    exact: Literal["bitwise", "tokens"]


# -- events ------------------------------------------------------------------------------------------------------------


class NeedRoute(msgspec.Struct, frozen=True):
    """Find a route and call ``follow``, or ``unroutable``.  ``keep``: surviving hops, to stay as they are."""

    keep: tuple[Hop, ...]
    exclude: tuple[NodeId, ...]


class Accepted(msgspec.Struct, frozen=True):
    """The next token of the stream, each position once and in order."""

    position: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class PromptScored(msgspec.Struct, frozen=True):
    """Log-probabilities of the prompt's tokens from ``start`` on."""

    start: int
    rows: tuple[tuple[float, tuple[tuple[int, float], ...]], ...]


class Recovered(msgspec.Struct, frozen=True):
    """Tokens flow again after a recovery."""

    recovery: Recovery


class Ended(msgspec.Struct, frozen=True):
    """The session is complete: ``stop``, ``length`` or ``cancelled``."""

    reason: str


FailureCode = Literal["busy", "no_route", "session_lost", "timeout", "dead_end"]


class Failed(msgspec.Struct, frozen=True):
    """The session cannot go on.  ``code``: busy (nothing was started), no_route, session_lost, timeout, or dead_end
    (its grammar allows no further token, whoever draws it)."""

    code: FailureCode
    why: str
    retry_after_s: float = 1.0


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
        self.recoveries: list[Recovery] = []
        self._rng = rng
        self._placement_id: m.PlacementId = (0, 0)
        self._opened: dict[int, int] = {}
        self._suspects: dict[NodeId, float] = {}
        self._busy: m.Refused | None = None
        """The last full hop, while nothing has begun: why there is no route, if there is none."""
        self._visited: dict[NodeId, None] = {}
        self._incident: _Incident | None = None
        self._retries = 0
        self._acked = len(request.prompt)
        self._shown = len(request.prompt)
        self._gaps: deque[float] = deque(maxlen=32)
        self._patience = 1.0
        self._last_token_at = now
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
        }

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def accepted(self) -> int:
        """Tokens held, prompt included."""
        return len(self.request.prompt) + len(self.drawn)

    @property
    def deadline(self) -> float | None:
        if self.state is State.ENDED:
            return None
        timers = (self._ends_at, self._retry_at, self._resend_at, self._open_by, self._stall_at, self._silent_at)
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
    ) -> list[Effect]:
        """Open ``route`` under a new epoch.  ``exact``: what the substitutes' hardware class promises."""
        if self.state is State.ENDED:
            return []
        left = [hop.node for hop in self.route.hops] if self.route else []
        self.epoch = (self.epoch[0] + 1, self.me)
        self.route, self._placement_id = route, placement_id
        self.state = State.OPENING
        self._opened, self._standing, self._before, self._rounds = {}, {}, {}, 0
        self._visited.update(dict.fromkeys(hop.node for hop in route.hops))
        self._retry_at = self._stall_at = self._silent_at = None
        self._resend_at, self._open_by = now + self.config.resend_s, now + self.config.open_timeout_s
        if self._incident is not None:
            self._incident.exact = exact
        # A hop that is no longer on the route is told at once; its lease frees it should this be lost.
        gone = [node for node in dict.fromkeys(left) if node not in {hop.node for hop in route.hops}]
        return [*(Send(node, m.Release(self.id, self.epoch)) for node in gone), *self._open_all()]

    def unroutable(self, why: str, now: float) -> list[Effect]:
        """No route now: a session that has begun waits for one, with backoff; one that has not is refused."""
        if self.state is not State.ROUTING:
            return []
        if not self._begun and self._incident is None:
            if self._busy is not None:
                return self._fail("busy", self._busy.why, self._busy.retry_after_s)
            return self._fail("no_route", why)
        lost_before = now + self.config.suspect_s - self.config.forgive_s
        self._suspects = {node: until for node, until in self._suspects.items() if until > lost_before}
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
        if self.state is State.ROUTING:
            self._suspects[node] = now + self.config.suspect_s
            return []
        for index, hop in enumerate(self.route.hops):
            if hop.node == node:
                return self._lose(index, cause, cause, now)
        return []

    def receive(self, message: m.ToSession, sender: NodeId, now: float) -> list[Effect]:
        if message.session != self.id or message.epoch != self.epoch or self.state in (State.ENDED, State.ROUTING):
            return []
        assert self.route is not None
        index = getattr(message, "hop", len(self.route.hops) - 1)
        index = self._index_of(sender) if index == -1 else index
        if not 0 <= index < len(self.route.hops) or self.route.hops[index].node != sender:
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
            return self._open_all()
        if self._silent_at is not None and now >= self._silent_at:
            return self._on_silence(now)
        if self._stall_at is not None and now >= self._stall_at:
            return self._on_stall(now)
        return []

    # -- routing and opening -------------------------------------------------------------------------------------------

    @property
    def _begun(self) -> bool:
        return self.state is State.RUNNING or bool(self.drawn) or bool(self.recoveries)

    def _need_route(self, now: float) -> list[Effect]:
        self.state = State.ROUTING
        # Should the driver not answer, the question is asked again.
        self._retry_at = now + self.config.backoff_max_s
        self._resend_at = self._open_by = self._stall_at = self._silent_at = None
        exclude = tuple(node for node, until in self._suspects.items() if until > now)
        hops = self.route.hops if self.route else ()
        keep = tuple(hop for hop in hops if hop.node not in exclude)
        return [Emit(NeedRoute(keep, exclude))]

    def _open_all(self) -> list[Effect]:
        assert self.route is not None
        missing = [index for index in range(len(self.route.hops)) if index not in self._opened]
        return [Send(self.route.hops[index].node, self._open(index)) for index in missing]

    def _open(self, index: int) -> m.Open:
        assert self.route is not None
        end_of_route = index in (0, len(self.route.hops) - 1)
        return m.Open(
            self.id,
            self.epoch,
            route=self.route,
            hop=index,
            placement_id=self._placement_id,
            max_positions=self.request.max_positions,
            priority=self.request.priority,
            accepted=self.accepted,
            request=self.request if end_of_route else None,
            drawn=tuple(self.drawn) if end_of_route else (),
        )

    def _on_opened(self, index: int, message: m.Opened, now: float) -> list[Effect]:
        assert self.route is not None
        if self.state is not State.OPENING or index in self._opened:
            return []
        self._opened[index] = message.kept
        if len(self._opened) < len(self.route.hops):
            return []
        self.state = State.RUNNING
        self._resend_at = self._open_by = None
        self._acked = self.accepted
        if self._incident is not None:
            self._incident.replayed = sum(max(0, self.accepted - 1 - kept) for kept in self._opened.values())
        if self._stall_at is None:
            self._stall_at = now + max(self._token_deadline(), self.config.first_token_s)
        return []

    def _first_unopened(self) -> int:
        assert self.route is not None
        return next(index for index in range(len(self.route.hops)) if index not in self._opened)

    def _on_refused(self, index: int, message: m.Refused, now: float) -> list[Effect]:
        """Another placement or a full hop is no fault of the hop, and what cannot be drawn by any sampler ends the
        session; anything else is a loss like any other."""
        assert self.route is not None
        if message.code == "dead_end" and index == len(self.route.hops) - 1:
            return self._fail("dead_end", message.why)
        if message.code in ("stale_placement", "unknown_placement"):
            return self._again(message, now)
        if message.code == "busy" and self._incident is None and not self._begun:
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
        """A full hop at the start: try another route; when none is left the driver's ``busy`` ends it."""
        assert self.route is not None
        self._retries += 1
        self._busy = message
        self._suspects[self.route.hops[index].node] = now + message.retry_after_s
        if self._retries > self.request.max_retries:
            return self._fail("busy", message.why, message.retry_after_s)
        return [*self._release_all(), *self._need_route(now)]

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _on_token(self, index: int, message: m.Token, now: float) -> list[Effect]:
        assert self.route is not None
        if index != len(self.route.hops) - 1:
            return [Emit(Rejected(self.route.hops[index].node, "draws a token but is not the sampler"))]
        if message.position > self.accepted:
            return [Send(self.route.hops[index].node, m.Progress(self.id, self.epoch, self.accepted))]
        if message.position < self.accepted:
            return []
        effects = self._on_flow(now)
        self.drawn.append(message.token)
        effects.append(Emit(Accepted(message.position, message.token, message.logprob, message.top)))
        reason = m.finish_reason(self.request, self.drawn)
        return [*effects, *self._end(Ended(reason))] if reason else effects

    def _on_flow(self, now: float) -> list[Effect]:
        """A token came: progress, so retries and alarms begin anew, and a recovery is over."""
        incident, self._incident = self._incident, None
        if incident is None and self.drawn:
            self._gaps.append(now - self._last_token_at)
        self._last_token_at = now
        self._retries, self._rounds, self._patience = 0, 0, 1.0
        self._silent_at = None
        self._stall_at = now + self._token_deadline()
        if incident is None:
            return []
        pause = (now - incident.since) * 1e3
        trace = (incident.cause, incident.hop, incident.detected_by, pause, incident.replayed, incident.exact)
        self.recoveries.append(Recovery(*trace))
        return [Emit(Recovered(self.recoveries[-1]))]

    def _on_prompt_logprobs(self, index: int, message: m.PromptLogprobs, now: float) -> list[Effect]:
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
        if self._shown + m.RUN_AHEAD <= self.accepted:  # the client is slow, not the route
            self._stall_at = now + self._token_deadline()
            return []
        self._before, self._standing = self._standing, {}
        self._silent_at = now + self.config.silent_s * self._patience
        ask = m.Progress(self.id, self.epoch, self.accepted)
        return [Send(hop.node, ask) for hop in self.route.hops]

    def _on_progressing(self, index: int, message: m.Progressing, now: float) -> list[Effect]:
        assert self.route is not None
        if self._silent_at is None:
            return []
        self._standing[index] = message
        if len(self._standing) < len(self.route.hops):
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
        standing = [self._standing[index] for index in range(len(self._standing))]
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
        silent = next(index for index in range(len(self.route.hops)) if index not in self._standing)
        return self._lose(silent, "silent", "deadline", now)

    # -- losing a hop, and ending --------------------------------------------------------------------------------------

    def _lose(self, index: int, cause: str, detected_by: str, now: float, why: str = "") -> list[Effect]:
        assert self.route is not None
        node = self.route.hops[index].node
        self._suspects[node] = now + self.config.suspect_s
        self._retries += 1
        if self._retries > self.request.max_retries:
            return self._fail("session_lost", why or f"hop {index} was lost ({cause})")
        if self._incident is None:
            self._incident = _Incident(cause, index, detected_by, now)
        return self._need_route(now)

    def _index_of(self, node: NodeId) -> int:
        assert self.route is not None
        return next((index for index, hop in enumerate(self.route.hops) if hop.node == node), -1)

    def _backoff(self) -> float:
        """50 ms x 2^k with jitter, at most 2 s."""
        ceiling = min(self.config.backoff_max_s, self.config.backoff_s * float(1 << min(self._retries, 10)))
        return ceiling * self._rng.uniform(0.5, 1.0)

    def _fail(self, code: FailureCode, why: str, retry_after_s: float = 1.0) -> list[Effect]:
        so_far = f"{why}; {len(self.drawn)} of at most {self.request.sampling.max_tokens} tokens were drawn"
        return self._end(Failed(code, so_far if self.drawn else why, retry_after_s))

    def _end(self, event: Ended | Failed) -> list[Effect]:
        self.state = State.ENDED
        return [*self._release_all(), Emit(event)]

    def _release_all(self) -> list[Effect]:
        """Every node that ever was on a route of this session; one that is gone frees by its lease."""
        return [Send(node, m.Release(self.id, self.epoch)) for node in self._visited]
