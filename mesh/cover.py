"""Replicas: place contiguous intervals so that every layer has at least k holders.

Each node offers one interval of limited length; a node that already holds a span offers intervals that contain
it.  Whether k holders a layer can be reached is bin covering, which is NP-hard, so the search is a sweep over the
layers with a bounded number of branches: exact for a handful of nodes, greedy (earliest deadline first) for many.

Why the sweep is complete: push every interval of a solution to the right as long as it stays a solution.  Then
each one starts either as late as it may, or at a layer that would otherwise lack a holder.  Only those starts
are tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mesh.capacity import Worker
from mesh.partition import Bounds
from mesh.types import NodeId

BRANCHES = 12_000
"""Bound of one search, in branches times nodes: 6 nodes are searched out, 100 nodes cost some 10 ms."""


class _Item(NamedTuple):
    worker: Worker
    earliest: int
    """No interval that starts before this reaches the end of what must be held."""
    latest: int
    """Start of what must be held; beyond the last layer: nothing must."""


def holders(spans: Mapping[NodeId, Bounds], n_layers: int) -> list[int]:
    """How many spans hold each layer."""
    steps = [0] * (n_layers + 1)
    for start, end in spans.values():
        steps[start] += 1
        steps[end] -= 1
    counts, running = [], 0
    for step in steps[:n_layers]:
        running += step
        counts.append(running)
    return counts


def cover(
    workers: Sequence[Worker], n_layers: int, k: int, anchors: Mapping[NodeId, Bounds]
) -> dict[NodeId, Bounds] | None:
    """Spans with at least ``k`` holders a layer, each containing its anchor; ``None``: none found."""
    items = []
    for worker in workers:
        anchor = anchors.get(worker.id)
        if anchor is not None:
            items.append(_Item(worker, worker.earliest(anchor[1]), anchor[0]))
        elif worker.reach(0) > 0 or worker.reach(1) > 1:
            items.append(_Item(worker, 0, n_layers))
    found = _Search(items, n_layers, k).run()
    return None if found is None else trimmed(found, n_layers, k, anchors)


class _Search:
    def __init__(self, items: list[_Item], n_layers: int, k: int) -> None:
        self.items = sorted(items, key=lambda item: (item.latest, -item.worker.room, item.worker.id))
        """In the order to be tried: what must start soonest, then the free, the longest first."""
        self.n = n_layers
        self.k = k
        self.budget = BRANCHES // max(1, len(items))
        self.failed: set[tuple[int, tuple[int, ...], frozenset[int]]] = set()
        self.longest = [max(i.worker.by_memory(False, False), i.worker.reach(0)) for i in self.items]

    def run(self) -> dict[NodeId, Bounds] | None:
        starts = self._from(0, (), frozenset(range(len(self.items))))
        if starts is None:
            return None
        spans = {self.items[i].worker.id: (start, self.items[i].worker.reach(start)) for i, start in starts}
        return {node: bounds for node, bounds in spans.items() if bounds[0] < bounds[1]}

    def _from(self, x: int, ends: tuple[int, ...], rest: frozenset[int]) -> list[tuple[int, int]] | None:
        """Starts for ``rest`` so that [x, n) is covered k times, given the sorted ends of intervals that cover x."""
        placed: list[tuple[int, int]] = []
        while x < self.n:
            forced = sorted(i for i in rest if self.items[i].latest == x)
            placed += [(i, x) for i in forced]
            rest = rest.difference(forced)
            ends = tuple(sorted([e for e in ends if e > x] + [self.items[i].worker.reach(x) for i in forced]))
            if len(ends) < self.k:
                deeper = self._branch(x, ends, rest)
                return None if deeper is None else placed + deeper
            x = self._next(x, ends, rest)
        return placed

    def _next(self, x: int, ends: tuple[int, ...], rest: frozenset[int]) -> int:
        """The next layer where an interval must start, or where a holder is lacking."""
        lacking = ends[len(ends) - self.k]
        return min([lacking, *(self.items[i].latest for i in rest if self.items[i].latest > x)])

    def _branch(self, x: int, ends: tuple[int, ...], rest: frozenset[int]) -> list[tuple[int, int]] | None:
        state = (x, ends, rest)
        if self.budget <= 0 or state in self.failed or not self._enough(x, ends, rest):
            return None
        seen: set[tuple[int, int, int]] = set()
        for i in sorted(rest):
            item = self.items[i]
            end = item.worker.reach(x) if item.earliest <= x else x
            alike = (item.worker.room, item.earliest, item.latest)
            if end <= x or alike in seen:
                continue
            seen.add(alike)
            self.budget -= 1
            deeper = self._from(x, tuple(sorted((*ends, end))), rest - {i})
            if deeper is not None:
                return [(i, x), *deeper]
            if self.budget <= 0:
                return None
        self.failed.add(state)
        return None

    def _enough(self, x: int, ends: tuple[int, ...], rest: frozenset[int]) -> bool:
        have = sum(end - x for end in ends) + sum(min(self.longest[i], self.n - x) for i in rest)
        return have >= self.k * (self.n - x)


def trimmed(
    spans: dict[NodeId, Bounds], n_layers: int, k: int, anchors: Mapping[NodeId, Bounds]
) -> dict[NodeId, Bounds]:
    """``spans`` without what k holders a layer do not need; anchors stay."""
    counts = holders(spans, n_layers)
    kept: dict[NodeId, Bounds] = {}
    for node, (start, end) in sorted(spans.items(), key=lambda item: -item[1][0]):
        low, high = anchors.get(node, (end, start))
        while end > max(high, start) and counts[end - 1] > k:
            end -= 1
            counts[end] -= 1
        while start < min(low, end) and counts[start] > k:
            counts[start] -= 1
            start += 1
        if start < end:
            kept[node] = (start, end)
    return kept


def deepest(
    workers: Sequence[Worker], n_layers: int, anchors: Mapping[NodeId, Bounds], at_most: int
) -> tuple[int, dict[NodeId, Bounds]]:
    """The largest k <= ``at_most`` that ``cover`` reaches, with its spans; (0, anchors) where it reaches none."""
    longest = sum(max(w.by_memory(False, False), w.reach(0)) for w in workers)
    low, spans = 0, dict(anchors)
    high = min(at_most, len(workers), longest // n_layers)
    while low < high:
        k = (low + high + 1) // 2
        found = cover(workers, n_layers, k, anchors)
        if found is None:
            high = k - 1
        else:
            low, spans = k, found
    return low, spans


def fill(worker: Worker, n_layers: int, span: Bounds | None, counts: list[int], at_most: int) -> Bounds | None:
    """``span`` grown by one layer to the side with fewer holders, or begun where they are fewest; ``None``: full.

    ``counts`` (holders a layer) is not changed; layers with ``at_most`` holders or more get no further one.
    """
    if span is None:
        starts = [x for x in range(n_layers) if counts[x] < at_most and worker.fits(x, x + 1)]
        return None if not starts else (best := min(starts, key=lambda x: (counts[x], x)), best + 1)
    start, end = span
    grown = [
        (counts[layer], layer, bounds)
        for layer, bounds in ((start - 1, (start - 1, end)), (end, (start, end + 1)))
        if 0 <= layer < n_layers and counts[layer] < at_most and worker.fits(*bounds)
    ]
    return min(grown)[2] if grown else None
