"""One plan for several models on the same nodes: primaries first, then copies, then what is left.

``mesh.placement`` makes plans that may move more and more of a previous placement, and takes a later one only for
a stated gain.  Everything here is a function of its arguments; nodes are visited in the order given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, permutations
from math import factorial
from typing import Literal

import msgspec

from mesh.capacity import NodeCapacity, Worker, span_bytes, stage_ms
from mesh.cover import cover, deepest, fill, holders, trimmed
from mesh.partition import Bounds, Fastest, Part, fastest, kept_layers, possible, rearrange, split
from mesh.types import ModelId, ModelInfo, NodeId

ORDERS_TRIED = 60
"""Orders of stages tried, of few nodes, to find one that can be replicated best."""

Moves = Literal["least", "excess", "replicas", "all"]
"""What may give way to more copies or speed: nothing that is held and fits; layers with more holders than the others
need; all but the primaries; everything.  With all but the last, primaries move only for ``improvement``."""

Room = dict[NodeId, int]
"""Weight memory left on each node, in bytes."""


class Prior(msgspec.Struct, frozen=True):
    """What the previous placement said of a model."""

    spans: dict[NodeId, Bounds] = {}
    primary: tuple[Part, ...] = ()


class Planned(msgspec.Struct):
    """A model's place in a plan in the making."""

    model: ModelInfo
    prior: Prior
    primary: tuple[Part, ...] = ()
    spans: dict[NodeId, Bounds] = {}
    missing: str = ""


class Planner:
    """Plans models in the order given on ``nodes``; draining ones serve only where the others do not suffice."""

    def __init__(
        self, nodes: Sequence[NodeCapacity], priors: Mapping[ModelId, Prior], improvement: float, max_copies: int
    ) -> None:
        self.steady = [node for node in nodes if not node.draining]
        self.all = [*self.steady, *(node for node in nodes if node.draining)]
        self.priors = priors
        self.keep_share = 1.0 - improvement
        self.max_copies = max_copies or len(nodes)
        self._known: dict[tuple[object, ...], tuple[list[Planned], Room]] = {}

    def plan(self, models: Sequence[ModelInfo], moves: Moves) -> list[Planned]:
        """The plan that ``moves`` as much as it may; entries in the order of ``models``."""
        entries, room = self._primaries(models, keep=moves != "all")
        for entry in entries:
            self._start_spans(entry, room, moves)
        placed = [entry for entry in entries if entry.primary]
        self._raise_copies(placed, room)
        self._fill(placed, room)
        return entries

    # --- primaries

    def _primaries(self, models: Sequence[ModelInfo], keep: bool) -> tuple[list[Planned], Room]:
        """Fresh entries with their primaries, and the memory left; worked out once for each order of models."""
        key = (keep, *(model.id for model in models))
        if key not in self._known:
            self._known[key] = self._place_primaries(models, keep)
        entries, room = self._known[key]
        return [Planned(e.model, e.prior, e.primary, {}, e.missing) for e in entries], dict(room)

    def _place_primaries(self, models: Sequence[ModelInfo], keep: bool) -> tuple[list[Planned], Room]:
        """One after the other; again, without keeping memory for models that found no place anyway."""
        homeless: frozenset[ModelId] = frozenset()
        while True:
            entries = [Planned(model, self.priors.get(model.id, Prior())) for model in models]
            room = {node.id: node.weight_bytes for node in self.all}
            for index, entry in enumerate(entries):
                later = [other for other in entries[index + 1 :] if keep and other.model.id not in homeless]
                self._place_primary(entry, room, later, keep)
            missing = frozenset(entry.model.id for entry in entries if entry.missing)
            if missing <= homeless or not keep:
                return entries, room
            homeless |= missing

    def _place_primary(self, entry: Planned, room: Room, later: Sequence[Planned], keep: bool) -> None:
        """Give ``entry`` its primary and take its memory from ``room``.

        Memory that the primaries of later models hold already is left to them if the model fits without it.
        """
        reserved = dict(room)
        for other in later:
            for part in other.prior.primary:
                if part.node in reserved:
                    reserved[part.node] -= span_bytes(other.model, part.start, part.end)
        for nodes, left in ((self.steady, reserved), (self.steady, room), (self.all, room)):
            workers = [Worker(entry.model, node, left[node.id]) for node in nodes]
            best = fastest(workers, entry.model.n_layers)
            if best is not None:
                entry.primary = tuple(self._primary(entry, workers, best, keep))
                break
        else:
            entry.missing = missing_text(entry.model, [Worker(entry.model, node, room[node.id]) for node in self.all])
        for part in entry.primary:
            room[part.node] -= span_bytes(entry.model, part.start, part.end)

    def _primary(self, entry: Planned, workers: list[Worker], best: Fastest, keep: bool) -> Sequence[Part]:
        prior, n_layers = entry.prior, entry.model.n_layers
        usable = {worker.id: worker for worker in workers}
        held = {node: bounds for node, bounds in prior.spans.items() if node in usable}
        if not keep or not held:
            return self._replicable(workers, n_layers, best, held)
        nodes = {node.id: node for node in self.all}
        intact = prior.primary and all(p.node in usable and usable[p.node].fits(p.start, p.end) for p in prior.primary)
        if not intact:
            return rearrange(workers, n_layers, best, 1.0 / self.keep_share, held)
        now_ms = max(stage_ms(entry.model, nodes[p.node], p.start, p.end) for p in prior.primary)
        if best.ms > now_ms * self.keep_share:
            return prior.primary
        return rearrange(workers, n_layers, best, 1.0, held)

    def _replicable(
        self, workers: list[Worker], n_layers: int, best: Fastest, held: Mapping[NodeId, Bounds]
    ) -> Sequence[Part]:
        """Among splits that reach the optimum, the one that can be copied most, then the one that moves least."""
        ideal, spread = deepest(workers, n_layers, {}, self.max_copies)
        chosen: tuple[tuple[int, int], Sequence[Part]] | None = None
        for order in _orders(workers, best, spread, held):
            parts = split(order, n_layers, best.ms)
            if parts is None:
                continue
            copies, _ = deepest(workers, n_layers, {p.node: (p.start, p.end) for p in parts}, self.max_copies)
            merit = (copies, kept_layers(parts, held))
            if chosen is None or merit > chosen[0]:
                chosen = (merit, parts)
            if copies >= ideal:
                break
        assert chosen is not None, "the order with the optimum's own end nodes always splits"
        return chosen[1]

    # --- copies

    def _start_spans(self, entry: Planned, room: Room, moves: Moves) -> None:
        """Spans begin as the primary's parts; what the nodes hold already is added as far as it fits and may stay."""
        primary = {part.node: (part.start, part.end) for part in entry.primary}
        entry.spans = dict(primary)
        if entry.primary and moves in ("replicas", "all"):
            return
        self._keep_held(entry, room)
        if entry.primary and moves == "excess":
            spans = self._steady_spans(entry)
            wanted = min(holders(spans, entry.model.n_layers)) + 1
            needed = trimmed(spans, entry.model.n_layers, wanted, primary)
            for node in spans:
                self._assign(entry, node, needed.get(node, (0, 0)), room)
            entry.spans = {node: bounds for node, bounds in entry.spans.items() if bounds[0] < bounds[1]}

    def _keep_held(self, entry: Planned, room: Room) -> None:
        steady = {node.id for node in self.steady}
        for node in self.all:
            before = entry.prior.spans.get(node.id)
            if before is None or (entry.primary and node.id not in steady):
                continue
            worker = self._worker(entry, node, room)
            after = _regrown(worker, entry.spans.get(node.id), before)
            if after is not None:
                self._assign(entry, node.id, after, room)

    def _worker(self, entry: Planned, node: NodeCapacity, room: Room) -> Worker:
        """The node with all the memory that this model has or may still take there."""
        return Worker(entry.model, node, room[node.id] + span_bytes(entry.model, *entry.spans.get(node.id, (0, 0))))

    def _assign(self, entry: Planned, node: NodeId, after: Bounds, room: Room) -> None:
        before = entry.spans.get(node, (0, 0))
        room[node] += span_bytes(entry.model, *before) - span_bytes(entry.model, *after)
        entry.spans[node] = after

    def at_bound(self, entry: Planned) -> bool:
        """Whether no plan could give ``entry`` more copies, as all memory together has no room for them."""
        copies = min(holders(self._steady_spans(entry), entry.model.n_layers))
        mine = {node: span_bytes(entry.model, *bounds) for node, bounds in entry.spans.items()}
        return copies >= self._bound(entry, {node.id: node.weight_bytes - mine.get(node.id, 0) for node in self.all})

    def _raise_copies(self, entries: list[Planned], room: Room) -> None:
        """Raise the number of holders a layer, in step for all models, then for those that can go on alone."""
        level = 1
        while entries and level < self.max_copies:
            low, high = level, min(self._bound(entry, room) for entry in entries)
            best: list[dict[NodeId, Bounds]] = []
            while low < high:
                k = (low + high + 1) // 2
                raised = self._raised(entries, k, room)
                low, high, best = (low, k - 1, best) if raised is None else (k, high, raised)
            for entry, spans in zip(entries, best, strict=False):
                self._adopt(entry, spans, room)
            level = low + 1
            entries = [e for e in entries if level <= self.max_copies and self._raise_alone(e, level, room)]

    def _raise_alone(self, entry: Planned, k: int, room: Room) -> bool:
        reached = self._raised([entry], k, room)
        if reached is None:
            return False
        self._adopt(entry, reached[0], room)
        return True

    def _adopt(self, entry: Planned, spans: Mapping[NodeId, Bounds], room: Room) -> None:
        for node, bounds in spans.items():
            self._assign(entry, node, bounds, room)

    def _raised(self, entries: Sequence[Planned], k: int, room: Room) -> list[dict[NodeId, Bounds]] | None:
        """Spans with which all ``entries`` have ``k`` holders a layer together, each with a fair share of the memory
        left, or else first come first served; ``None``: none found."""
        fair = self._raised_with(entries, k, room, fair=True)
        return fair if fair is not None or len(entries) == 1 else self._raised_with(entries, k, room, fair=False)

    def _raised_with(
        self, entries: Sequence[Planned], k: int, room: Room, *, fair: bool
    ) -> list[dict[NodeId, Bounds]] | None:
        left, raised = dict(room), []
        for index, entry in enumerate(entries):
            spans = self._steady_spans(entry)
            if min(holders(spans, entry.model.n_layers)) < k:
                sharers = len(entries) - index if fair else 1
                share = {node: free // sharers for node, free in left.items()}
                workers = [self._worker(entry, node, share) for node in self.steady]
                found = cover(workers, entry.model.n_layers, k, spans)
                if found is None:
                    return None
                spans = found
            for node, bounds in spans.items():
                before = entry.spans.get(node, (0, 0))
                left[node] += span_bytes(entry.model, *before) - span_bytes(entry.model, *bounds)
            raised.append(spans)
        return raised

    def _bound(self, entry: Planned, room: Room) -> int:
        """More copies than this do not fit, even with all free memory."""
        layers = sum(self._worker(entry, node, room).by_memory(False, False) for node in self.steady)
        return min(self.max_copies, len(self.steady), layers // entry.model.n_layers)

    def _steady_spans(self, entry: Planned) -> dict[NodeId, Bounds]:
        steady = {node.id for node in self.steady}
        return {node: bounds for node, bounds in entry.spans.items() if node in steady}

    def _fill(self, entries: Sequence[Planned], room: Room) -> None:
        """Give what memory is left to the layers with the fewest holders, models taking turns, one layer at a time."""
        counts = {e.model.id: holders(self._steady_spans(e), e.model.n_layers) for e in entries}
        for node in self.steady:
            growing = list(entries)
            while growing:
                growing = [entry for entry in growing if self._grow(entry, node, room, counts[entry.model.id])]

    def _grow(self, entry: Planned, node: NodeCapacity, room: Room, counts: list[int]) -> bool:
        before = entry.spans.get(node.id)
        after = fill(self._worker(entry, node, room), entry.model.n_layers, before, counts, self.max_copies)
        if after is None:
            return False
        for layer in range(*after):
            if before is None or not before[0] <= layer < before[1]:
                counts[layer] += 1
        self._assign(entry, node.id, after, room)
        return True


def _regrown(worker: Worker, base: Bounds | None, before: Bounds) -> Bounds | None:
    """The largest span that fits, contains ``base`` and lies within the hull of ``base`` and ``before``.

    ``before`` counts only where it touches ``base``: a gap between them would have to be loaded.
    """
    if base is None:
        end = min(before[1], worker.reach(before[0]))
        return (before[0], end) if end > before[0] else None
    start, end = base
    if before[0] > end or before[1] < start:
        return base
    while start > before[0] and worker.fits(start - 1, end):
        start -= 1
    while end < before[1] and worker.fits(start, end + 1):
        end += 1
    return start, end


def _orders(
    workers: list[Worker], best: Fastest, spread: Mapping[NodeId, Bounds], held: Mapping[NodeId, Bounds]
) -> Iterator[list[Worker]]:
    """Orders of stages worth trying: as held, as spread for most copies, by memory, and of few nodes many more."""
    by_spread = sorted(workers, key=lambda w: sum(spread.get(w.id, (0, 0))))
    by_room = sorted(workers, key=lambda w: (-w.room, w.id))
    by_held = sorted(workers, key=lambda w: sum(held.get(w.id, (0, 0))))
    for order in (by_held, by_spread, by_room) if held else (by_spread, by_room):
        middle = [worker for worker in order if worker.id not in (best.first, best.last)]
        ends = {worker.id: worker for worker in order}
        yield [ends[best.first], *middle, *([ends[best.last]] if best.first != best.last else [])]
        yield order
    if len(workers) <= 8:
        step = max(1, factorial(len(workers)) // ORDERS_TRIED)
        yield from (list(order) for order in islice(permutations(by_room), 0, None, step | 1))


def missing_text(model: ModelInfo, workers: Sequence[Worker]) -> str:
    """Why ``model`` does not fit on ``workers``, how many bytes are missing, and what to do."""
    whole = span_bytes(model, 0, model.n_layers)
    free = sum(max(0, worker.room) for worker in workers)
    lack = _lacking(model, workers)
    return (
        f"model {model.id} does not fit: {lack} more bytes ({lack / 2**30:.2f} GiB) of weight memory are missing; "
        f"it needs {whole} bytes, and {len(workers)} nodes have {free} bytes free: "
        "add nodes, or give them more with --memory"
    )


def _lacking(model: ModelInfo, workers: Sequence[Worker]) -> int:
    """The fewest bytes that would do, on one more node or on the one with the most free."""
    low, high = 0, span_bytes(model, 0, model.n_layers)
    largest = max(workers, key=lambda worker: worker.room, default=None)
    while high - low > 1:
        extra = (low + high) // 2
        grown = [Worker(model, NodeCapacity(NodeId(""), extra), extra), *workers]
        if largest is not None and not possible(grown, model.n_layers):
            others = [worker for worker in workers if worker is not largest]
            grown = [Worker(model, NodeCapacity(NodeId(""), 0), largest.room + extra), *others]
        low, high = (low, extra) if possible(grown, model.n_layers) else (extra, high)
    return high
