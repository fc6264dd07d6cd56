"""A node for the simulator: the production Session and Stage cores around a pure token function as the model.

The model's answer depends on every input of every layer at every position, so keys and values that are wrong, missing
or applied twice anywhere change all tokens that follow.
"""

from __future__ import annotations

import random
import struct
from collections import deque
from typing import Any, NamedTuple

from mesh.core import Effect, Emit, Send
from mesh.pipeline import events as e
from mesh.pipeline import messages as m
from mesh.pipeline import work as t
from mesh.pipeline.journal import Adopt, disclaim, needs_witness
from mesh.pipeline.session import Session
from mesh.pipeline.stage import StageConfig, StageCore
from mesh.routing import fewer
from mesh.types import Hop, LayerSpan, Route, SamplingParams

LAYERS = 6
PAGE = 3
CONFIG = e.SessionConfig(page=PAGE)
VOCABULARY = 97
HEIR_S = 10.0
ROW = 8
MASK = (1 << 64) - 1


class Keeps(NamedTuple):
    """What a node may keep of checkpointed rows, in bytes, and how often its disk refuses."""

    memory: int = 1 << 30
    disk: int = 0
    refuses: float = 0.0


def _mix(*parts: int) -> int:
    """64 bits that depend on every bit of every part: cheap, since a schedule asks for thousands."""
    found = 0
    for part in parts:
        found = (found ^ part) * 0x9E3779B97F4A7C15 & MASK
        found ^= found >> 29
    return found


class FakeKv:
    """One sequence's keys and values over layers [start, end): a running digest per layer and position."""

    def __init__(self, start: int, end: int) -> None:
        self.layers = {layer: [0] for layer in range(start, end)}
        self.length = 0

    def apply(self, row: int) -> int:
        for layer, digests in self.layers.items():
            row = _mix(digests[-1], row, layer)
            digests.append(row)
        self.length += 1
        return row

    def read(self, first: int, end: int) -> dict[int, list[int]]:
        """Keys and values of positions [first, end)."""
        return {layer: digests[first + 1 : end + 1] for layer, digests in self.layers.items()}

    def begin(self, pages: list[dict[int, list[int]]], length: int) -> None:
        for page in pages:
            for layer, digests in page.items():
                self.layers[layer] += digests
        self.length = length

    def ship(self, layers: tuple[int, int], start: int, n: int) -> bytes:
        """The digests of positions [start, start + n), layer by layer."""
        digests = [self.layers[layer][start + 1 : start + n + 1] for layer in range(*layers)]
        return b"".join(digest.to_bytes(ROW, "big") for layer in digests for digest in layer)

    def write(self, start: int, n: int, payload: bytes) -> None:
        assert self.length == start, "pages are written in order"
        for at, digests in enumerate(self.layers.values()):
            rows = range(at * n * ROW, (at + 1) * n * ROW, ROW)
            digests += [int.from_bytes(payload[row : row + ROW], "big") for row in rows]
        self.length += n

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)
        for digests in self.layers.values():
            del digests[self.length + 1 :]


def embed(token: int) -> int:
    return _mix(token + 1)


def draw(row: int, sampling: SamplingParams, position: int) -> int:
    return _mix(row, sampling.seed, position) % VOCABULARY


def oracle(request: m.SessionRequest) -> list[int]:
    """The undisturbed run."""
    kv, tokens = FakeKv(0, LAYERS), list(request.prompt)
    rows = [kv.apply(embed(token)) for token in tokens]
    while m.finish_reason(request, tokens[len(request.prompt) :]) is None:
        tokens.append(draw(rows[-1], request.sampling, len(tokens)))
        rows.append(kv.apply(embed(tokens[-1])))
    return tokens[len(request.prompt) :]


class FakeEngine:
    """Computes a queue of work, one chunk each ``step_s``."""

    def __init__(
        self,
        rng: random.Random,
        slots: int,
        step_s: float = 0.01,
        chunk: int = 5,
        room: int = 6,
        forgets: float = 0.0,
    ) -> None:
        """``room``: for shared pages, less one for each sequence; ``forgets``: how often a sequence cannot go back to
        where it is to, or begin there: it stands at 0, and says so with the next step."""
        self.rng, self.slots, self.step_s, self.chunk = rng, slots, step_s, chunk
        self.room, self.forgets, self._chance = room, forgets, random.Random(0)
        self.pages: dict[int, dict[int, list[int]]] = {}
        self.lost: set[str] = set()
        self.rewound: list[t.Computed] = []
        self.piece = 7
        self.sequences: dict[str, tuple[FakeKv, t.Reserve]] = {}
        self.queue: deque[t.Compute] = deque()
        self.due: float | None = None
        self.computed_positions = 0
        self.carried = 0
        """Sequences that went on from shipped pages."""

    def reserve(self, ask: t.Reserve, now: float) -> bool:
        base = self.sequences.pop(ask.base)[0] if ask.base else FakeKv(ask.start, ask.end)
        if len(self.sequences) >= self.slots:
            return False
        forgets = ask.kept > 0 and self._forgets(ask.key, now)
        base.truncate(0 if forgets else ask.kept)
        self.carried += ask.kept > 0
        self.sequences[ask.key] = (base, ask)
        return True

    @property
    def excess(self) -> int:
        return max(0, len(self.pages) + len(self.sequences) - self.room) if self.pages else 0

    def keep(self, event: t.KeepPages) -> None:
        kv = self.sequences[event.key][0]
        for start, number in event.pages:
            assert start + event.size <= kv.length
            self.pages[number] = kv.read(start, start + event.size)

    def take(self, event: t.TakePages, now: float) -> None:
        kv = self.sequences[event.key][0]
        assert kv.length == 0
        if self._forgets(event.key, now):
            return
        kv.begin([self.pages[number] for number in event.pages], event.size * len(event.pages))

    def drop(self, event: t.DropPages) -> None:
        for number in event.pages:
            del self.pages[number]

    def export(self, ask: t.Export) -> tuple[int, memoryview]:
        """At most a few positions at once, as an engine does; nothing where it has been cut meanwhile."""
        kv = self.sequences[ask.key][0]
        n = max(0, min(ask.end, kv.length, ask.start + self.piece) - ask.start)
        return n, memoryview(kv.ship(ask.layers, ask.start, n))

    def submit(self, work: t.Compute, now: float) -> None:
        if work.key in self.lost:
            return
        self.queue.append(work)
        self.due = self.due or now + self.step_s

    def truncate(self, key: str, length: int, now: float) -> None:
        self.queue = deque(work for work in self.queue if work.key != key)
        if key in self.lost and length:
            return
        self.lost.discard(key)
        kv = self.sequences[key][0]
        forgets = 0 < length < kv.length and self._forgets(key, now)
        kv.truncate(0 if forgets else length)

    def _forgets(self, key: str, now: float) -> bool:
        """Whether it stands at 0 from now on; then it says so."""
        if self._chance.random() >= self.forgets:
            return False
        self.lost.add(key)
        self.due = self.due or now + self.step_s
        self.rewound.append(t.Computed(key, 0, 0, 0, rewound=True))
        return True

    def free(self, key: str) -> None:
        self.lost.discard(key)
        self.rewound = [result for result in self.rewound if result.key != key]
        del self.sequences[key]
        self.queue = deque(work for work in self.queue if work.key != key)

    def step(self, now: float) -> list[t.Computed]:
        self.due = None
        rewound, self.rewound = self.rewound, []
        if not self.queue:
            return rewound
        work = self.queue.popleft()
        n = min(work.n, self.rng.randint(1, self.chunk))
        if n < work.n:
            rest = work.hidden[n * ROW :] if work.hidden is not None else None
            self.queue.appendleft(
                t.Compute(work.key, work.tag, work.start + n, work.n - n, work.tokens[n:], rest, work.sample)
            )
        if self.queue:
            self.due = now + self.step_s
        return [*rewound, self._compute(work, n)]

    def _compute(self, work: t.Compute, n: int) -> t.Computed:
        kv, ask = self.sequences[work.key]
        assert kv.length == work.start, "the engine is only given the next position"
        rows = (
            [embed(token) for token in work.tokens[:n]] if ask.start == 0 else struct.unpack_from(f"{n}Q", work.hidden)  # type: ignore[arg-type]
        )
        out = [kv.apply(row) for row in rows]
        self.computed_positions += n
        if ask.end < LAYERS:
            return t.Computed(work.key, work.tag, work.start, n, memoryview(struct.pack(f"{n}Q", *out)))
        token = None
        if work.sample and n == work.n:
            assert ask.sampling is not None
            token = draw(out[-1], ask.sampling, work.start + n)
        return t.Computed(work.key, work.tag, work.start, n, token=token)


class FakeDisk:
    """Does what it is asked in order, each ``step_s`` later; now and then it refuses."""

    def __init__(self, rng: random.Random, refuses: float = 0.0, step_s: float = 0.02) -> None:
        """``refuses``: how often a piece cannot be written, or not be read."""
        self.rng, self.refuses, self.step_s = rng, refuses, step_s
        self.pieces: dict[int, bytes] = {}
        self.due: float | None = None
        self.written = self.replayed = self.shipped = self.refused = 0
        """Rows that were written, sent once they were read again, and read for a successor; and what was refused."""
        self._asked: deque[t.Spill | t.Unspill | t.Forget] = deque()

    def ask(self, event: t.Spill | t.Unspill | t.Forget, now: float) -> None:
        self._asked.append(event)
        self.due = self.due or now + self.step_s

    def step(self, stage: StageCore, now: float) -> list[Effect]:
        event = self._asked.popleft()
        self.due = now + self.step_s if self._asked else None
        if isinstance(event, t.Forget):
            for number in event.numbers:
                self.pieces.pop(number, None)
            return []
        refused = self.rng.random() < self.refuses
        self.refused += refused
        if isinstance(event, t.Spill):
            assert event.number not in self.pieces
            if not refused:
                self.pieces[event.number] = b"".join(event.rows)
                self.written += len(self.pieces[event.number]) // ROW
            return stage.spilled(event.number, not refused)
        read = None if refused else self.pieces.get(event.number)
        effects = stage.unspilled(event, memoryview(read) if read is not None else None)
        sent = [effect.message for effect in effects if isinstance(effect, Send)]
        self.replayed += sum(message.n for message in sent if isinstance(message, m.Forward))
        asked = [effect.event for effect in effects if isinstance(effect, Emit)]
        self.shipped += sum(len(each.rows) // ROW for each in asked if isinstance(each, t.Export))
        return effects


class Peer:
    """One node as the composition root wires it: sessions that it owns, a stage, an engine, a disk."""

    session_type: type[Session] = Session
    stage_type: type[StageCore] = StageCore

    def __init__(
        self,
        me: str,
        rng: random.Random,
        spans: dict[str, tuple[int, int]],
        nodes: list[str],
        *,
        slots: int = 64,
        step_s: float = 0.01,
        eager: bool = False,
        forgets: float = 0.0,
        keeps: Keeps | None = None,
    ) -> None:
        """``nodes``: the whole mesh, of which witnesses are chosen; ``eager``: this node routes through itself;
        ``spans``: who holds what, as gossip tells all nodes at once where it changes."""
        self.me, self.rng, self.spans, self.nodes, self.eager = me, rng, spans, nodes, eager
        keeps = keeps or Keeps()
        self.stage = self.stage_type(
            me, StageConfig(page=PAGE, checkpoint_bytes=keeps.memory, checkpoint_disk=keeps.disk)
        )
        self.engine = FakeEngine(rng, slots, step_s, forgets=forgets)
        self.disk = FakeDisk(rng, keeps.refuses)
        self.sessions: dict[str, Session] = {}
        self.streams: dict[str, list[int]] = {}
        """What each session has shown, from its first token on."""
        self.ends: dict[str, Any] = {}
        self.recoveries: list[e.Recovery] = []
        self.leaving = False
        """It is to go: its hops and sessions are to be moved ..."""
        self.leavers: set[str] = set()
        """... as are those of these nodes, by gossip."""
        self.heirs: dict[str, tuple[str, float]] = {}
        """Session -> to whom it was given away, and until when that is news."""
        self.shown: list[tuple[str, int]] = []
        """(session, position) of tokens shown in this step, for checkers."""
        if me in spans:
            self.stage.set_spans([LayerSpan("toy", *spans[me])])

    @property
    def deadline(self) -> float | None:
        first = self.stage.deadline
        for due in (self.engine.due, self.disk.due):
            if due is not None and (first is None or due < first):
                first = due
        for session in self.sessions.values():
            if (due := session.deadline) is not None and (first is None or due < first):
                first = due
        return first

    def open(self, session: str, request: m.SessionRequest, now: float) -> list[Effect]:
        return self._own(session, self.session_type(session, self.me, request, self.rng, now, CONFIG), now)

    def receive(self, message: Any, sender: str, now: float) -> list[Effect]:
        if isinstance(message, m.TO_SESSION):
            session = self.sessions.get(message.session)
            if session is None:
                heir, until = self.heirs.get(message.session, ("", 0.0))
                return disclaim(message, sender, message.session in self.ends, heir if now < until else None)
            return self._done(message.session, session.receive(message, sender, now), now)
        return self._staged(self.stage.receive(message, sender, now), now)

    def tick(self, now: float) -> list[Effect]:
        effects = []
        if self.engine.due is not None and now >= self.engine.due:
            effects += self._staged(self.stage.computed(self.engine.step(now), now), now)
        if self.disk.due is not None and now >= self.disk.due:
            effects += self._staged(self.disk.step(self.stage, now), now)
        effects += self._staged(self.stage.tick(now), now)
        for name, session in list(self.sessions.items()):
            if session.deadline is not None and now >= session.deadline:
                effects += self._done(name, session.tick(now), now)
        return effects

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        """The link to ``peer`` was reset and a reconnect failed, or gossip holds it dead."""
        effects = self._staged(self.stage.lost(peer, cause, now), now)
        for name, session in list(self.sessions.items()):
            effects += self._done(name, session.lost(peer, cause, now), now)
        return effects

    def leave(self, now: float) -> list[Effect]:
        """As long as it is here: have hops and sessions moved to others."""
        effects = self._staged(self.stage.vacate(), now)
        for name, session in list(self.sessions.items()):
            effects += self._done(name, session.give_away(self.leavers), now)
        return effects

    def cancel(self, name: str, now: float) -> list[Effect]:
        """Its client asked for its end, wherever it runs."""
        session = self.sessions.get(name)
        return self._done(name, session.finish("cancelled", now), now) if session is not None else []

    def renew(self) -> list[Effect]:
        """The leases of all sessions that are owned here."""
        held: dict[str, list[tuple[str, m.Epoch]]] = {}
        for session in self.sessions.values():
            for node in session.parties:
                held.setdefault(node, []).append((session.id, session.epoch))
        return [Send(node, m.Lease(tuple(sessions))) for node, sessions in held.items()]

    def _own(self, name: str, session: Session, now: float) -> list[Effect]:
        self.sessions[name] = session
        self.streams[name] = []
        self.ends.pop(name, None)
        self.heirs.pop(name, None)
        return self._done(name, session.start(now), now)

    def _staged(self, effects: list[Effect], now: float) -> list[Effect]:
        out: list[Effect] = []
        for effect in effects:
            event = effect.event if isinstance(effect, Emit) else None
            if isinstance(effect, Send):
                out.append(effect)
            elif isinstance(event, t.Reserve):
                if self.engine.reserve(event, now):
                    answer = self.stage.reserved(event.key, now, page_bytes=1, room=1)
                    answer += self.stage.evict(self.engine.excess)
                else:
                    answer = self.stage.refused(event.key, "busy", "no slot", 0.1, 1)
                out += self._staged(answer, now)
            elif isinstance(event, t.Compute):
                self.engine.submit(event, now)
            elif isinstance(event, t.Truncate):
                self.engine.truncate(event.key, event.length, now)
            elif isinstance(event, t.KeepPages):
                self.engine.keep(event)
                out += self._staged(self.stage.evict(self.engine.excess), now)
            elif isinstance(event, t.TakePages):
                self.engine.take(event, now)
            elif isinstance(event, t.DropPages):
                self.engine.drop(event)
            elif isinstance(event, t.Free):
                self.engine.free(event.key)
            elif isinstance(event, t.Export):
                out += self._staged(self.stage.exported(event, *self.engine.export(event)), now)
            elif isinstance(event, t.Spill | t.Unspill | t.Forget):
                self.disk.ask(event, now)
            elif isinstance(event, t.Import):
                self.engine.sequences[event.key][0].write(event.start, event.n, bytes(event.payload))
            elif isinstance(event, Adopt):
                if event.session not in self.sessions:
                    out.append(effect)
                    session = self.session_type.adopt(event, self.me, self.rng, now, CONFIG)
                    out += self._own(event.session, session, now)
            else:
                out.append(effect)
        return out

    def _done(self, name: str, effects: list[Effect], now: float) -> list[Effect]:
        out: list[Effect] = []
        for effect in effects:
            event = effect.event if isinstance(effect, Emit) else None
            if isinstance(event, e.NeedRoute):
                out += self._done(name, self._route(name, event, now), now)
            elif isinstance(event, e.NeedMove):
                out += self._done(name, self._plan(name, event, now), now)
            elif isinstance(event, e.Accepted):
                session = self.sessions[name]
                assert event.position == len(session.request.prompt) + len(self.streams[name]), "once and in order"
                self.streams[name].append(event.token)
                self.shown.append((name, event.position))
                out += self._done(name, session.acknowledge(event.position + 1, now), now)
            elif isinstance(event, e.Ended | e.Failed | e.Moved):
                out.append(effect)
                self.ends[name] = event
                session = self.sessions.pop(name)
                if isinstance(event, e.Moved) and session.given:
                    self.heirs[name] = (event.owner, now + HEIR_S)
            elif isinstance(event, e.Recovered):
                self.recoveries.append(event.recovery)
                out.append(effect)
            else:
                out.append(effect)
        return out

    def _plan(self, name: str, ask: e.NeedMove, now: float) -> list[Effect]:
        hops = self._hops(e.NeedRoute(ask.keep, (*ask.exclude, *sorted(self.leavers))))
        return self.sessions[name].prepare(Route("toy", hops), (0, 0), now) if hops else []

    def _route(self, name: str, ask: e.NeedRoute, now: float) -> list[Effect]:
        """Nodes that leave serve only where nobody else does."""
        hops = self._hops(e.NeedRoute(ask.keep, (*ask.exclude, *sorted(self.leavers))))
        for keep in fewer(ask.keep):
            hops = hops or self._hops(e.NeedRoute(keep, ask.exclude))
        if hops is None:
            return self.sessions[name].unroutable("no live node holds some layer", now)
        route = Route("toy", hops)
        others = [x for x in self.nodes if x != self.me and x not in ask.exclude]
        others = [x for x in others if x not in self.leavers] or others
        witness = self.rng.choice(others) if others and needs_witness(route, self.me) else None
        return self.sessions[name].follow(route, (0, 0), now, witness=witness)

    def _hops(self, ask: e.NeedRoute) -> tuple[Hop, ...] | None:
        ask = e.NeedRoute(tuple(hop for hop in ask.keep if hop.node in self.spans), ask.exclude)
        hops: list[Hop] = []
        at = 0
        while at < LAYERS:
            kept = [hop for hop in ask.keep if hop.start == at]
            ends = min([hop.start for hop in ask.keep if hop.start > at], default=LAYERS)
            able = [(n, b) for n, (a, b) in sorted(self.spans.items()) if a <= at < b and n not in ask.exclude]
            able = [(n, b) for n, b in able if n not in [hop.node for hop in (*ask.keep, *hops)]]
            if self.eager and at in (0, self.spans.get(self.me, (-1, -1))[0]):
                able = [pair for pair in able if pair[0] == self.me] or able
            if kept:
                hops.append(kept[0])
            elif able:
                node, end = self.rng.choice(able)
                hops.append(Hop(node, at, min(end, ends)))
            else:
                return None
            at = hops[-1].end
        return tuple(hops)
