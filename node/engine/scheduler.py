"""What one step computes.  Pure: a plan is a value made from the sequences' queues.  No torch here.

There is no prefill phase and no decode phase, only rows computed catching up with rows wanted.  A step takes first
every sequence that wants a single row (it waits for one token, so a step late is a token late), then gives what is
left of the budget to the longer ones, in chunks.  How many chunk rows go beside live decoding is measured (``Pace``):
as many as make a step at most ``RATIO`` times as long as one without them; more of them, up to ``LONGEST_RATIO``, where
more streams wait for their first token than decode, or one that has begun is rebuilt: those stand still, and the others
only slow down.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mesh.types import PRIORITIES, ModelId
from node.engine.sequence import Sequence

RATIO = 2.2
"""Longest step beside decoding, in steps without chunks."""
LONGEST_RATIO = 6.0
"""The same while streams are rebuilt, or a crowd waits: five sixths of the time are theirs."""
DECODE_SHARE = 0.75
"""Of a step with chunks, at most so much is put down to its single rows."""
LEAST_CHUNK = 16
"""Chunk rows that a step gives in any case, so that prefill goes on whatever the decoding."""
_RANK = {priority: rank for rank, priority in enumerate(PRIORITIES)}


class Slice(msgspec.Struct, frozen=True):
    """Rows [start, start + n) of one sequence; ``last``: they complete its first work."""

    key: str
    start: int
    n: int
    last: bool


class Group(msgspec.Struct, frozen=True):
    """One packed forward: sequences over the same layers of the same model."""

    model: ModelId
    start: int
    end: int
    slices: tuple[Slice, ...]


class StepPlan(msgspec.Struct, frozen=True):
    """One step of the device."""

    groups: tuple[Group, ...] = ()

    @property
    def rows(self) -> int:
        return sum(piece.n for group in self.groups for piece in group.slices)


def plan_step(sequences: Iterable[Sequence], step_rows: int, chunk_rows: int) -> StepPlan:
    """Choose the rows of the next step: at most ``step_rows``, of them at most ``chunk_rows`` of longer works.

    Classes go in order (interactive, normal, batch).  Within a class streams that are rebuilt come first, one after the
    other, the one that is done soonest before the others: so half of them wait for less than half of the time.  Then
    rows go to whoever was served longest ago: prompts take turns chunk by chunk, so that a short one does not wait for
    all of a long one.
    """
    everyone = list(sequences)
    ready = [s for s in everyone if s.ready]
    singles = sorted((s for s in ready if s.ready == 1), key=lambda s: (_RANK[s.spec.priority], s.served, s.arrival))
    longer = sorted(
        (s for s in ready if s.ready > 1),
        key=lambda s: (_RANK[s.spec.priority], not s.behind, s.behind, s.served, s.arrival),
    )
    reserved = min(chunk_rows, step_rows // 2) if longer else 0
    chosen = [(s, 1) for s in _micro_batch(singles, everyone)[: step_rows - reserved]]
    left = min(chunk_rows, step_rows - len(chosen))
    for sequence in longer:
        if left <= 0:
            break
        n = min(sequence.ready, left)
        chosen.append((sequence, n))
        left -= n
    return _grouped(chosen)


def ratio(sequences: Iterable[Sequence]) -> float:
    """How much longer than without chunks the next step may be; 0: as long as it likes, for nobody decodes.

    A step twice as long holds up each stream that decodes, and brings on each that waits: the more there are of these,
    the longer it may be.  Streams of a lower class than one that decodes wait, and are rebuilt, without haste.
    """
    everyone = list(sequences)
    decoding = [_RANK[s.spec.priority] for s in everyone if s.decoding]
    if not decoding:
        return 0.0
    waiting = [s for s in everyone if s.ready > 1 and _RANK[s.spec.priority] <= min(decoding)]
    if any(s.behind for s in waiting):
        return LONGEST_RATIO
    return min(LONGEST_RATIO, RATIO * max(1.0, len(waiting) / len(decoding)))


def _micro_batch(singles: list[Sequence], everyone: list[Sequence]) -> list[Sequence]:
    """At hop 0 of a route of H hops, a step takes one H-th of the sequences that are decoding.

    All tokens of a step come back together one lap later.  Were all sequences in one step, they would stay in step
    for good, and all hops but one would wait.  In H groups every hop has one to work on.
    """
    piped = [s for s in everyone if s.decoding and s.spec.hops > 1 and s.spec.start == 0]
    if not piped:
        return singles
    room = -(-len(piped) // max(s.spec.hops for s in piped))
    chosen = []
    for sequence in singles:
        if sequence.spec.hops > 1 and sequence.spec.start == 0:
            if room == 0:
                continue
            room -= 1
        chosen.append(sequence)
    return chosen


def _grouped(chosen: list[tuple[Sequence, int]]) -> StepPlan:
    groups: dict[tuple[ModelId, int, int], list[Slice]] = {}
    for sequence, n in chosen:
        spec = sequence.spec
        piece = Slice(spec.key, sequence.length, n, n == sequence.wanted)
        groups.setdefault((spec.model, spec.start, spec.end), []).append(piece)
    return StepPlan(tuple(Group(*where, tuple(slices)) for where, slices in groups.items()))


class Pace:
    """How long steps take, and from that how many chunk rows may ride beside decoding."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.step_s = 0.0
        self._decode_s = 0.0
        self._row_s = 0.0

    def observe(self, singles: int, chunk_rows: int, seconds: float) -> None:
        """A step of ``singles`` single rows and ``chunk_rows`` others took ``seconds``."""
        self.step_s = _mean(self.step_s, seconds)
        if chunk_rows == 0:
            self._decode_s = _mean(self._decode_s, seconds)
        elif chunk_rows >= LEAST_CHUNK:
            # What single rows take is known of recent steps only, which may have had more of them.
            alone = min(self._decode_s, DECODE_SHARE * seconds) if singles else 0.0
            self._row_s = _mean(self._row_s, (seconds - alone) / chunk_rows)

    def chunk_rows(self, ratio: float) -> int:
        """Rows of longer works that the next step may take, to be ``ratio`` times as long as without (0: any)."""
        if not ratio:
            return self.most
        if not self._decode_s or not self._row_s:
            return min(self.most, 2 * LEAST_CHUNK)
        spare = (ratio - 1.0) * self._decode_s / self._row_s
        return max(LEAST_CHUNK, min(self.most, int(spare) // 4 * 4))


def _mean(old: float, new: float, weight: float = 0.2) -> float:
    return new if old == 0.0 else old + weight * (new - old)
