"""A hop's end of every session that runs through this node: what to compute, keep, send and free.

All transitions of a hop's session are in this file.  A session at a hop is one picture::

    tokens or hidden states in ──► [0, submitted) handed to the engine ──► [0, done) computed
                                                                             │ checkpoints [c, done)
                                                                             ▼
                                                     [0, sent) on its way to the hop behind, or tokens drawn

There is no prefill, no decode and no replay here, only positions computed catching up with positions wanted.
The hop behind says from where it wants them (``Gap``); a hop that no longer has what is asked for rolls itself back
and asks the hop before.  So opening, losing a frame and rebuilding a dead neighbour are the same few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from mesh.core import Effect, Emit, Rejected, Send
from mesh.pipeline import messages as m
from mesh.pipeline.checkpoints import Checkpoints, Segment
from mesh.types import Hop, LayerSpan, NodeId, Priority, SamplingParams


class StageConfig(msgspec.Struct, frozen=True):
    """Budgets and times of a stage."""

    lease_s: float = 60.0
    """A session that its owner has not renewed for this long is freed."""
    checkpoint_bytes: int = 1 << 30
    """Host memory for checkpointed activations; beyond it the oldest session's are given up."""
    held_frames: int = 4096
    held_bytes: int = 64 << 20
    """Frames that arrived before the Open of their epoch wait in these bounds ..."""
    held_s: float = 10.0
    """... and this long."""
    sweep_s: float = 5.0


# -- what the driver is asked to do, in order --------------------------------------------------------------------------


class Reserve(msgspec.Struct, frozen=True):
    """Reserve room in the engine, then call ``StageCore.reserved`` or ``StageCore.refused``."""

    key: str
    model: str
    start: int
    end: int
    max_positions: int
    priority: Priority
    hops: int
    sampling: SamplingParams | None
    tokens: tuple[int, ...]


class Compute(msgspec.Struct, frozen=True):
    """Compute positions [start, start + n) from ``tokens`` (hop 0) or from ``hidden``."""

    key: str
    tag: int
    """Comes back with the result; what was begun before a roll-back carries an older one."""
    start: int
    n: int
    tokens: tuple[int, ...] = ()
    hidden: memoryview | None = None
    sample: bool = False
    prompt_logprobs: bool = False


class Computed(msgspec.Struct, frozen=True):
    """The engine's answer to (a leading part of) a ``Compute``."""

    key: str
    tag: int
    start: int
    n: int
    hidden: memoryview | None = None
    token: int | None = None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()
    error: str = ""
    final: bool = False
    """Of an error: any other node would come to the same."""


class Truncate(msgspec.Struct, frozen=True):
    """Keep only the first ``length`` positions; work that was begun past them is void."""

    key: str
    length: int


class Free(msgspec.Struct, frozen=True):
    """Free what ``Reserve`` took."""

    key: str


class FetchPlacement(msgspec.Struct, frozen=True):
    """A session names a newer placement than is active here: fetch the committed record from ``peer``."""

    peer: NodeId
    placement_id: m.PlacementId


class _Hop:
    """One session at this hop."""

    def __init__(self, message: m.Open, key: str, now: float) -> None:
        self.key = key
        self.tag = 0
        self.submitted = 0
        self.done = 0
        self.sent: int | None = None
        self.acked = 0
        self.asked = -1
        self.checkpoints = Checkpoints()
        self.tokens: list[int] = []
        self.scores: dict[int, tuple[float, tuple[tuple[int, float], ...]]] = {}
        """Position -> (logprob, top) of the tokens drawn here that the owner may not have yet, in order."""
        self.request = message.request
        self.follow(message, now)

    def follow(self, message: m.Open, now: float) -> None:
        """Take over the route of ``message``; nothing crosses the boundary until the hop behind says from where."""
        self.open = message
        self.epoch = message.epoch
        self.hops = message.route.hops
        self.index = message.hop
        self.first = message.hop == 0
        self.last = message.hop == len(self.hops) - 1
        self.lease_from = now
        self.sent = None
        self.asked = -1
        self.scores = {}
        self.acked = max(self.acked, message.accepted)
        if message.request is not None:
            self.request = message.request
            self.tokens = [*message.request.prompt, *message.drawn]

    @property
    def owner(self) -> NodeId:
        return self.epoch[1]

    @property
    def before(self) -> NodeId:
        """The node whose output this hop works on: the ring closes from the sampler to hop 0."""
        return self.hops[self.index - 1].node

    @property
    def behind(self) -> NodeId:
        return self.hops[(self.index + 1) % len(self.hops)].node

    @property
    def drawn(self) -> list[int]:
        assert self.request is not None
        return self.tokens[len(self.request.prompt) :]


class StageCore:
    """The hop's end of the generation protocol, for all sessions of one node (a ``mesh.core.Core``)."""

    def __init__(self, me: NodeId, config: StageConfig | None = None) -> None:
        self.me = me
        self.config = config or StageConfig()
        self.placement_id: m.PlacementId = (0, 0)
        self.checkpoint_bytes = 0
        self.checkpoints_dropped = 0
        self._spans: tuple[LayerSpan, ...] = ()
        self._sessions: dict[m.SessionId, _Hop] = {}
        self._keys: dict[str, m.SessionId] = {}
        self._reserving: dict[str, m.Open] = {}
        self._held: dict[m.SessionId, list[tuple[float, NodeId, m.PipelineMessage]]] = {}
        self._held_frames = 0
        self._held_bytes = 0
        self._serial = 0
        self._next_sweep: float | None = None
        self._handlers: dict[type, Callable[..., list[Effect]]] = {
            m.Forward: self._on_forward,
            m.Gap: self._on_gap,
            m.Feed: self._on_feed,
            m.Ack: self._on_ack,
            m.Progress: self._on_progress,
        }

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        return self._next_sweep

    def sessions(self) -> list[tuple[m.SessionId, m.Open, int]]:
        """(session, its Open, positions computed) of every session, for status."""
        return [(session, hop.open, hop.done) for session, hop in self._sessions.items()]

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def activate(self, placement_id: m.PlacementId) -> None:
        """Sessions under a lower placement id are refused from now on; running ones go on."""
        self.placement_id = max(self.placement_id, placement_id)

    def set_spans(self, spans: Sequence[LayerSpan]) -> None:
        """What may be opened here from now on; running sessions keep what they have."""
        self._spans = tuple(spans)

    def in_use(self, span: LayerSpan) -> bool:
        """Some session still runs over layers of ``span``."""
        return any(
            hop.open.route.model == span.model and _mine(hop.open).start < span.end and span.start < _mine(hop.open).end
            for hop in self._sessions.values()
        )

    def receive(self, message: m.ToStage, sender: NodeId, now: float) -> list[Effect]:
        self._next_sweep = self._next_sweep or now + self.config.sweep_s
        if isinstance(message, m.Lease):
            return self._on_lease(message, sender, now)
        if isinstance(message, m.Open):
            return self._on_open(message, sender, now)
        if isinstance(message, m.Release):
            return self._on_release(message, sender)
        hop = self._sessions.get(message.session)
        if hop is None or message.epoch > hop.epoch:
            return self._hold(message, sender, now)
        if message.epoch < hop.epoch:
            return []
        return self._handlers[type(message)](hop, message, sender)

    def tick(self, now: float) -> list[Effect]:
        """Free what nobody renewed, and forget frames whose Open never came."""
        if self._next_sweep is None or now < self._next_sweep:
            return []
        expired = [s for s, hop in self._sessions.items() if now - hop.lease_from > self.config.lease_s]
        effects = [effect for session in expired for effect in self._free(session)]
        for session, frames in list(self._held.items()):
            if now - frames[-1][0] > self.config.held_s:
                self._unhold(session)
        self._next_sweep = now + self.config.sweep_s if self._sessions or self._held else None
        return effects

    def reserved(self, key: str, now: float) -> list[Effect]:
        """The driver's answer to ``Reserve``: there is room."""
        message = self._reserving.pop(key, None)
        if message is None:  # released meanwhile
            return [Emit(Free(key))]
        hop = _Hop(message, key, now)
        self._sessions[message.session] = hop
        self._keys[key] = message.session
        return self._opened(message.session, hop, now)

    def refused(self, key: str, code: Literal["busy", "not_held"], why: str, retry_after_s: float) -> list[Effect]:
        """The driver's other answer to ``Reserve``: there is none."""
        message = self._reserving.pop(key, None)
        if message is None:
            return []
        answer = m.Refused(message.session, message.epoch, message.hop, code, why, retry_after_s)
        return [Send(message.epoch[1], answer)]

    def computed(self, results: Iterable[Computed], now: float) -> list[Effect]:
        """Take the engine's results, in its order."""
        effects: list[Effect] = []
        for result in results:
            session = self._keys.get(result.key)
            hop = self._sessions.get(session) if session is not None else None
            if hop is not None and session is not None and result.tag == hop.tag:
                effects += self._on_computed(session, hop, result)
        self._keep_budget()
        return effects

    # -- opening, resuming, freeing ------------------------------------------------------------------------------------

    def _on_open(self, message: m.Open, sender: NodeId, now: float) -> list[Effect]:
        fault = self._fault_of(message, sender)
        if fault:
            return [Emit(Rejected(sender, fault))]
        hop = self._sessions.get(message.session)
        if hop is not None and message.epoch <= hop.epoch:
            return self._opened(message.session, hop, now) if message.epoch == hop.epoch else []
        if any(o.session == message.session and o.epoch >= message.epoch for o in self._reserving.values()):
            return []  # sent again, while the engine is still being asked
        refusal = self._refusal(message)
        if refusal is not None:
            fetch = [Emit(FetchPlacement(sender, message.placement_id))] if refusal.code == "unknown_placement" else []
            return [*fetch, Send(sender, refusal)]
        if hop is not None and self._same_place(hop, message):
            return [*self._resume(hop, message, now), *self._opened(message.session, hop, now)]
        freed = self._free(message.session) if hop is not None else []
        return [*freed, *self._reserve(message)]

    def _fault_of(self, message: m.Open, sender: NodeId) -> str:
        hops = message.route.hops
        if sender != message.epoch[1]:
            return "opens a session for another owner"
        if not 0 <= message.hop < len(hops) or hops[message.hop].node != self.me:
            return "opens a hop that is not this node"
        if message.hop in (0, len(hops) - 1) and message.request is None:
            return "opens an end of a route without the request"
        if message.request is not None and message.accepted != len(message.request.prompt) + len(message.drawn):
            return "opens with a wrong count of accepted tokens"
        return ""

    def _refusal(self, message: m.Open) -> m.Refused | None:
        mine = _mine(message)
        code: Literal["stale_placement", "unknown_placement", "not_held"]
        if message.placement_id < self.placement_id:
            code, why = "stale_placement", f"active here is placement {self.placement_id}"
        elif message.placement_id > self.placement_id:
            code, why = "unknown_placement", f"active here is placement {self.placement_id}"
        elif not any(s.model == message.route.model and s.covers(mine.start, mine.end) for s in self._spans):
            code, why = "not_held", f"layers [{mine.start}, {mine.end}) of {message.route.model} are not loaded here"
        else:
            return None
        return m.Refused(message.session, message.epoch, message.hop, code, why, retry_after_s=0.2)

    @staticmethod
    def _same_place(hop: _Hop, message: m.Open) -> bool:
        """Keys and values stay of use when the hop computes the same layers, at the same end of the route."""
        mine, was = _mine(message), _mine(hop.open)
        ends = (message.hop == 0, message.hop == len(message.route.hops) - 1)
        return (mine.start, mine.end) == (was.start, was.end) and ends == (hop.first, hop.last)

    def _reserve(self, message: m.Open) -> list[Effect]:
        self._stop_reserving(message.session, message.epoch)
        self._serial += 1
        key = f"{message.session}#{self._serial}"
        self._reserving[key] = message
        mine, last = _mine(message), message.hop == len(message.route.hops) - 1
        sampling: SamplingParams | None = None
        tokens: tuple[int, ...] = ()
        if last:
            assert message.request is not None
            sampling, tokens = message.request.sampling, (*message.request.prompt, *message.drawn)
        hops = len(message.route.hops)
        room = (message.max_positions, message.priority, hops)
        return [Emit(Reserve(key, message.route.model, mine.start, mine.end, *room, sampling, tokens))]

    def _stop_reserving(self, session: m.SessionId, epoch: m.Epoch) -> None:
        """What is asked for under ``epoch`` or an older one is freed as soon as it is reserved."""
        for key, opening in list(self._reserving.items()):
            if opening.session == session and opening.epoch <= epoch:
                del self._reserving[key]

    def _resume(self, hop: _Hop, message: m.Open, now: float) -> list[Effect]:
        """Keep what follows from the accepted tokens.  The sampler's last position is computed again, to draw."""
        keep = message.accepted - 1 if hop.last else message.accepted
        hop.follow(message, now)
        # Always void what is under way: its results may rest on tokens that were never accepted.
        return self._cut(hop, min(keep, hop.done))

    def _opened(self, session: m.SessionId, hop: _Hop, now: float) -> list[Effect]:
        hop.lease_from = now
        effects: list[Effect] = [Send(hop.owner, m.Opened(session, hop.epoch, hop.index, hop.submitted))]
        effects += self._want(session, hop)
        for _, sender, message in self._unhold(session):
            effects += self.receive(message, sender, now)  # type: ignore[arg-type]
        return effects

    def _on_release(self, message: m.Release, sender: NodeId) -> list[Effect]:
        hop = self._sessions.get(message.session)
        if sender != message.epoch[1]:
            return [Emit(Rejected(sender, "releases another owner's session"))]
        self._stop_reserving(message.session, message.epoch)
        if hop is None or message.epoch < hop.epoch:
            self._unhold(message.session)
            return []
        return self._free(message.session)

    def _on_lease(self, message: m.Lease, sender: NodeId, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for session, epoch in message.sessions:
            hop = self._sessions.get(session)
            if hop is None:
                unknown = m.Refused(session, epoch, -1, "unknown_session", "the session is not held here (any more)")
                effects.append(Send(sender, unknown))
            elif hop.owner == sender:
                hop.lease_from = now
        return effects

    def _free(self, session: m.SessionId) -> list[Effect]:
        hop = self._sessions.pop(session)
        del self._keys[hop.key]
        self._unhold(session)
        self.checkpoint_bytes -= hop.checkpoints.drop()
        return [Emit(Free(hop.key))]

    # -- frames that came before their Open ----------------------------------------------------------------------------

    def _hold(self, message: m.PipelineMessage, sender: NodeId, now: float) -> list[Effect]:
        size = _size(message)
        if self._held_frames >= self.config.held_frames or self._held_bytes + size > self.config.held_bytes:
            return []  # what is dropped here is asked for again by Gap
        self._held.setdefault(message.session, []).append((now, sender, message))
        self._held_frames += 1
        self._held_bytes += size
        return []

    def _unhold(self, session: m.SessionId) -> list[tuple[float, NodeId, m.PipelineMessage]]:
        frames = self._held.pop(session, [])
        self._held_frames -= len(frames)
        self._held_bytes -= sum(_size(message) for _, _, message in frames)
        return frames

    # -- the flow of positions -----------------------------------------------------------------------------------------

    def _want(self, session: m.SessionId, hop: _Hop) -> list[Effect]:
        """Hop 0 computes the tokens it has; every other hop says what it lacks."""
        if hop.first:
            return self._pump(hop)
        return [Send(hop.before, m.Gap(session, hop.epoch, hop.submitted))]

    def _ask_once(self, session: m.SessionId, hop: _Hop) -> list[Effect]:
        """Frames behind a lost one come in a row: the first asks for it, the rest are dropped."""
        if hop.asked == hop.submitted:
            return []
        hop.asked = hop.submitted
        return self._want(session, hop)

    def _pump(self, hop: _Hop) -> list[Effect]:
        limit = min(len(hop.tokens), max(hop.acked + m.RUN_AHEAD, hop.open.accepted))
        if hop.submitted >= limit:
            return []
        tokens = tuple(hop.tokens[hop.submitted : limit])
        return self._compute(hop, hop.submitted, len(tokens), tokens, None)

    def _compute(
        self, hop: _Hop, start: int, n: int, tokens: tuple[int, ...], hidden: memoryview | None
    ) -> list[Effect]:
        hop.submitted = start + n
        # A row is drawn from only at the frontier: before it the next token is known already (a replay).
        sample = hop.last and hop.submitted == len(hop.tokens)
        scored = hop.last and hop.request is not None and hop.request.prompt_logprobs
        return [Emit(Compute(hop.key, hop.tag, start, n, tokens, hidden, sample, scored))]

    def _on_forward(self, hop: _Hop, message: m.Forward, sender: NodeId) -> list[Effect]:
        end = message.start + message.n
        if hop.first or sender != hop.before:
            return [Emit(Rejected(sender, "forwards to a hop that it is not before"))]
        if message.n < 1 or message.start < 0 or len(message.payload) % message.n:
            return [Emit(Rejected(sender, "forwards rows of unequal size"))]
        if end > hop.open.max_positions or (hop.last and end > len(hop.tokens)):
            return [Emit(Rejected(sender, "forwards positions past the end of the session"))]
        if message.start > hop.submitted:
            return self._ask_once(message.session, hop)
        if end <= hop.submitted:
            return []
        fresh = Segment(message.start, message.n, message.payload).slice(hop.submitted, end)
        return self._compute(hop, fresh.start, fresh.n, (), fresh.payload)

    def _on_computed(self, session: m.SessionId, hop: _Hop, result: Computed) -> list[Effect]:
        if result.error:
            code: Literal["dead_end", "failed"] = "dead_end" if result.final else "failed"
            failed = m.Refused(session, hop.epoch, hop.index, code, result.error)
            return [Send(hop.owner, failed), *self._free(session)]
        assert result.start == hop.done, (result.start, hop.done)
        hop.done = result.start + result.n
        if hop.last:
            return self._on_drawn(session, hop, result)
        assert result.hidden is not None
        # A copy: a view would keep the whole packed step alive, with the rows of every other session in it.
        own = memoryview(bytes(result.hidden))
        hop.checkpoints.append(Segment(result.start, result.n, own))
        self.checkpoint_bytes += len(own)
        return self._flush(session, hop)

    def _flush(self, session: m.SessionId, hop: _Hop) -> list[Effect]:
        """Send what is computed and the hop behind does not have yet."""
        if hop.sent is None or hop.sent >= hop.done:
            return []
        pieces = hop.checkpoints.read(hop.sent)
        hop.sent = hop.done
        return [Send(hop.behind, m.Forward(session, hop.epoch, p.start, p.n, p.payload)) for p in pieces]

    def _on_drawn(self, session: m.SessionId, hop: _Hop, result: Computed) -> list[Effect]:
        effects: list[Effect] = []
        if result.prompt_logprobs:
            rows = result.prompt_logprobs
            effects.append(Send(hop.owner, m.PromptLogprobs(session, hop.epoch, result.start + 1, rows)))
        if result.token is None:
            return effects
        assert hop.request is not None
        assert hop.done == len(hop.tokens)
        position = len(hop.tokens)
        hop.tokens.append(result.token)
        hop.scores[position] = (result.logprob, result.top)
        hop.scores.pop(position - 2 * m.RUN_AHEAD, None)  # the owner has that one: hop 0 does not run so far ahead
        effects.append(Send(hop.owner, m.Token(session, hop.epoch, position, result.token, result.logprob, result.top)))
        if m.finish_reason(hop.request, hop.drawn) is None:
            if hop.first:
                effects += self._pump(hop)
            else:
                effects.append(Send(hop.behind, m.Feed(session, hop.epoch, position, (result.token,))))
        return effects

    def _on_gap(self, hop: _Hop, message: m.Gap, sender: NodeId) -> list[Effect]:
        if sender != hop.behind or message.expected < 0:
            return [Emit(Rejected(sender, "asks a hop that it is not behind"))]
        if hop.last:
            missing = tuple(hop.tokens[message.expected :])
            return [Send(sender, m.Feed(message.session, hop.epoch, message.expected, missing))] if missing else []
        hop.sent = message.expected
        if message.expected >= hop.checkpoints.start:
            return self._flush(message.session, hop)
        # The budget took them: compute them again from what the hop before kept, at worst from the tokens.
        return [*self._cut(hop, message.expected), *self._want(message.session, hop)]

    def _on_feed(self, hop: _Hop, message: m.Feed, sender: NodeId) -> list[Effect]:
        if not hop.first or sender != hop.before:
            return [Emit(Rejected(sender, "feeds tokens to a hop that it is not the sampler of"))]
        if message.start < 0 or message.start + len(message.tokens) > hop.open.max_positions:
            return [Emit(Rejected(sender, "feeds tokens past the end of the session"))]
        if message.start > len(hop.tokens):
            return [Send(sender, m.Gap(message.session, hop.epoch, len(hop.tokens)))]
        hop.tokens += message.tokens[len(hop.tokens) - message.start :]
        return self._pump(hop)

    def _on_ack(self, hop: _Hop, message: m.Ack, sender: NodeId) -> list[Effect]:
        if sender != hop.owner:
            return [Emit(Rejected(sender, "acknowledges another owner's session"))]
        hop.acked = max(hop.acked, message.accepted)
        return self._pump(hop) if hop.first else []

    def _on_progress(self, hop: _Hop, message: m.Progress, sender: NodeId) -> list[Effect]:
        """Say where this hop stands, and ask (and give) again what a lost frame may have carried."""
        if sender != hop.owner:
            return [Emit(Rejected(sender, "asks after another owner's session"))]
        session = message.session
        effects = self._on_ack(hop, m.Ack(session, message.epoch, message.accepted), sender)
        standing = m.Progressing(session, hop.epoch, hop.index, hop.submitted, hop.done, len(hop.tokens))
        effects.append(Send(hop.owner, standing))
        if hop.last:
            effects += [
                Send(hop.owner, m.Token(session, hop.epoch, position, hop.tokens[position], *score))
                for position, score in hop.scores.items()
                if position >= message.accepted
            ]
        if hop.first and not hop.last:
            effects.append(Send(hop.before, m.Gap(session, hop.epoch, len(hop.tokens))))
        elif not hop.first and hop.submitted == hop.done:
            effects += self._want(session, hop)
        return effects

    # -- rolling back, and the budget ----------------------------------------------------------------------------------

    def _cut(self, hop: _Hop, length: int) -> list[Effect]:
        """Keep positions [0, length) and void everything under way."""
        self.checkpoint_bytes -= hop.checkpoints.bytes
        if not hop.last:
            hop.checkpoints.cut(length)
        self.checkpoint_bytes += hop.checkpoints.bytes
        hop.tag += 1
        hop.submitted = hop.done = length
        hop.sent = None if hop.sent is None else min(hop.sent, length)
        return [Emit(Truncate(hop.key, length))]

    def _keep_budget(self) -> None:
        """Past the budget the oldest sessions lose theirs: their recovery starts further upstream."""
        for hop in self._sessions.values():
            if self.checkpoint_bytes <= self.config.checkpoint_bytes:
                break
            freed = hop.checkpoints.drop()
            self.checkpoint_bytes -= freed
            self.checkpoints_dropped += bool(freed)


def _size(message: m.PipelineMessage) -> int:
    """About what a held message takes in memory."""
    if isinstance(message, m.Forward):
        return 64 + len(message.payload)
    return 64 + (8 * len(message.tokens) if isinstance(message, m.Feed) else 0)


def _mine(message: m.Open) -> Hop:
    """The hop (node, start, end) that an Open names."""
    return message.route.hops[message.hop]
