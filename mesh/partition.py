"""The fastest way to split a model's layers into one contiguous stage per node, and the one that moves the least.

Stages in the middle cost the same wherever they stand, so an order matters only at the two ends, where the
embedding and the head count.  Hence "is there a split whose slowest stage takes at most T?" is a sum over nodes
of how many layers each can run in T, corrected for the best choice of the two end nodes; bisection over T gives
the optimum exactly, for any number of unlike nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from mesh.capacity import Worker, overlap
from mesh.types import NodeId

Bounds = tuple[int, int]
"""[start, end)"""

FOREVER_MS = 1e12


class Part(NamedTuple):
    """Layers [start, end) given to ``node``."""

    node: NodeId
    start: int
    end: int


class Fastest(NamedTuple):
    """The optimum: the slowest stage's time, and the end nodes that reach it (the same node: one stage)."""

    ms: float
    first: NodeId
    last: NodeId


def possible(workers: Sequence[Worker], n_layers: int) -> bool:
    """Whether the model fits at all, however slow."""
    return _ends(workers, n_layers, FOREVER_MS) is not None


def fastest(workers: Sequence[Worker], n_layers: int) -> Fastest | None:
    """The smallest possible time of the slowest stage; ``None``: the model does not fit."""
    if not possible(workers, n_layers):
        return None
    high = 1.0
    while _ends(workers, n_layers, high) is None:
        high *= 4
    low = 0.0
    while high - low > 1e-7 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _ends(workers, n_layers, middle) else (middle, high)
    ends = _ends(workers, n_layers, high)
    assert ends is not None
    return Fastest(high, *ends)


def _ends(workers: Sequence[Worker], n_layers: int, ms: float) -> tuple[NodeId, NodeId] | None:
    """End nodes with which all layers run in stages of at most ``ms``, or ``None``."""
    for worker in workers:
        if worker.within(ms, True, True) >= n_layers:
            return worker.id, worker.id
    if n_layers < 2:
        return None
    middle = [worker.within(ms, False, False) for worker in workers]
    spare = sum(middle) - n_layers
    if spare < 0:
        return None
    first = _cheapest(workers, middle, ms, first=True)
    last = _cheapest(workers, middle, ms, first=False)
    fitting = [(a + b, f, e) for a, f in first for b, e in last if f != e and a + b <= spare]
    if not fitting:
        return None
    _, f, e = min(fitting)
    return workers[f].id, workers[e].id


def _cheapest(workers: Sequence[Worker], middle: list[int], ms: float, *, first: bool) -> list[tuple[int, int]]:
    """The two nodes that lose the fewest layers by standing at an end, as (layers lost, index)."""
    losses = []
    for index, worker in enumerate(workers):
        layers = worker.within(ms, first, not first)
        if layers > 0:
            losses.append((middle[index] - layers, index))
    return sorted(losses)[:2]


def split(order: Sequence[Worker], n_layers: int, ms: float) -> list[Part] | None:
    """A split in this order whose stages take at most ``ms``, with as few stages as greed finds.

    The first and the last of ``order`` stand at the ends; those between that run the most layers are used first.
    """
    if len(order) == 1 or order[0].within(ms, True, True) >= n_layers:
        return [Part(order[0].id, 0, n_layers)] if order[0].within(ms, True, True) >= n_layers else None
    limits = [w.within(ms, i == 0, i == len(order) - 1) for i, w in enumerate(order)]
    if min(limits[0], limits[-1]) < 1 or sum(limits) < n_layers:
        return None
    counts = [0] * len(order)
    counts[0] = min(limits[0], n_layers - 1)
    counts[-1] = min(limits[-1], n_layers - counts[0])
    left = n_layers - counts[0] - counts[-1]
    for index in sorted(range(1, len(order) - 1), key=lambda i: -limits[i]):
        counts[index] = min(limits[index], left)
        left -= counts[index]
    edges = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return [Part(w.id, a, b) for w, (a, b) in zip(order, pairwise(edges), strict=True) if a < b]


class _Chain(NamedTuple):
    """A split of [0, x) in the making; tuples compare as chains do: more kept layers first, then fewer stages."""

    kept: int
    stages: int
    """Negative."""
    parts: tuple[Part, ...]


_EXACT_LIMIT = 100_000


def arrange(order: Sequence[Worker], n_layers: int, ms: float, held: Mapping[NodeId, Bounds]) -> list[Part] | None:
    """The split in this order, stages of at most ``ms``, that keeps the most layers where ``held`` has them.

    Ties go to fewer stages.  Nodes may be left out.  Dynamic programming over (node, layers covered so far);
    where that would be large, only cuts at the edges of what is held, and full stages, are tried.
    """
    work = n_layers * sum(worker.within(ms, False, False) for worker in order)
    cuts = sorted({edge for bounds in held.values() for edge in bounds}) if work > _EXACT_LIMIT else None
    best: dict[int, _Chain] = {0: _Chain(0, 0, ())}
    for worker in order:
        low, high = held.get(worker.id, (0, 0))
        longer: list[tuple[int, _Chain]] = []
        for start, end in _stages(worker, sorted(best), n_layers, ms, cuts):
            chain, known = best[start], best.get(end)
            kept = chain.kept + max(0, min(high, end) - max(low, start))
            if known is None or (kept, chain.stages - 1) > known[:2]:
                longer.append((end, _Chain(kept, chain.stages - 1, (*chain.parts, Part(worker.id, start, end)))))
        for end, chain in longer:
            if end not in best or chain[:2] > best[end][:2]:
                best[end] = chain
    return list(best[n_layers].parts) if n_layers in best else None


def _stages(
    worker: Worker, starts: Sequence[int], n_layers: int, ms: float, cuts: list[int] | None
) -> Iterator[tuple[int, int]]:
    """Every [start, end) that ``worker`` runs in ``ms``; with ``cuts``, only ends there and the furthest."""
    limits = {(first, last): worker.within(ms, first, last) for first in (True, False) for last in (True, False)}
    for start in starts:
        furthest = min(start + limits[start == 0, False], n_layers - 1)
        if cuts is None:
            yield from ((start, end) for end in range(start + 1, furthest + 1))
        elif furthest > start:
            yield from ((start, cut) for cut in cuts if start < cut < furthest)
            yield start, furthest
        if 0 < n_layers - start <= limits[start == 0, True]:
            yield start, n_layers


def kept_layers(parts: Sequence[Part], held: Mapping[NodeId, Bounds]) -> int:
    """How many layers of a split are already where it wants them."""
    return sum(overlap(held[part.node], part.start, part.end) for part in parts if part.node in held)


def rearrange(
    workers: Sequence[Worker], n_layers: int, best: Fastest, slack: float, held: Mapping[NodeId, Bounds]
) -> list[Part]:
    """A split with a slowest stage of at most ``best.ms * slack`` that moves as few layers as the orders tried allow.

    Among those that move equally few, the fastest that a short bisection finds.
    """
    orders = _orders(workers, n_layers, best, held)
    found = [(parts, order) for order in orders if (parts := arrange(order, n_layers, best.ms * slack, held))]
    parts, order = max(found, key=lambda pair: (kept_layers(pair[0], held), -len(pair[0])))
    kept = kept_layers(parts, held)
    low, high = best.ms, best.ms * slack
    for _ in range(4 if slack > 1 else 0):
        middle = (low + high) / 2
        tighter = arrange(order, n_layers, middle, held)
        if tighter and kept_layers(tighter, held) >= kept:
            parts, high = tighter, middle
        else:
            low = middle
    return parts


def _orders(
    workers: Sequence[Worker], n_layers: int, best: Fastest, held: Mapping[NodeId, Bounds]
) -> list[list[Worker]]:
    """Orders worth trying: holders as they stand, newcomers as a block at some places, or spread among them."""
    old = sorted((w for w in workers if w.id in held), key=lambda w: (sum(held[w.id]), w.id))
    new = sorted((w for w in workers if w.id not in held), key=lambda w: (-w.room, w.id))
    orders = [old]
    if new:
        places = {0, len(old) // 2, len(old), *_gaps(old, n_layers, held)}
        orders = [old[:place] + new + old[place:] for place in sorted(places)] + [_interleaved(old, new)]
    by_id = {worker.id: worker for worker in workers}
    middle = [worker for worker in orders[0] if worker.id not in (best.first, best.last)]
    orders.append([by_id[best.first], *middle, *([by_id[best.last]] if best.last != best.first else [])])
    return orders


def _gaps(old: Sequence[Worker], n_layers: int, held: Mapping[NodeId, Bounds]) -> list[int]:
    """Where in the order of holders an uncovered layer begins (three places at most)."""
    gaps, reached = [], 0
    for index, worker in enumerate(old):
        start, end = held[worker.id]
        if start > reached:
            gaps.append(index)
        reached = max(reached, end)
    return gaps[:3]


def _interleaved(old: list[Worker], new: list[Worker]) -> list[Worker]:
    keyed = [((i + 0.5) / len(old), 0, w) for i, w in enumerate(old)]
    keyed += [((i + 1.0) / len(new), 1, w) for i, w in enumerate(new)]
    return [worker for _, _, worker in sorted(keyed, key=lambda item: item[:2])]
