"""Which node shall hold which layers: a pure function from what was measured to a value.

``place`` aims, in this order: every model whole; its slowest stage as fast as possible; with the memory that is
left, as many failures survived as possible; and, against a previous placement, few layers moved.  A node holds
at most one contiguous span of a model.

* The *primary* is one split of the layers over nodes whose slowest stage is optimal (``mesh.partition``).
* Spans are the primary's parts, extended, and idle nodes, until each layer has 2, 3, ... holders
  (``mesh.cover``); what is left is filled where holders are fewest.  Several models take turns.
* A previous placement stays unless the slowest stage becomes faster by 15 % (``Rules.improvement``) or more
  failures are survived; when a node is gone, only what it leaves uncovered is given to others, again within 15 %
  of the best.  Draining nodes count as gone, but keep their spans while the others cannot hold a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec

from mesh.capacity import NodeCapacity, span_bytes, stage_ms
from mesh.cover import holders
from mesh.partition import Part
from mesh.planner import Moves, Planned, Planner, Prior
from mesh.types import LayerSpan, ModelId, ModelInfo, NodeId

__all__ = [
    "Assigned",
    "ModelPlacement",
    "NodeCapacity",
    "Placement",
    "Rules",
    "Score",
    "diff",
    "place",
    "score",
    "survivability",
]


class Assigned(msgspec.Struct, frozen=True):
    """``node`` shall hold ``span``; spans of several nodes may overlap."""

    node: NodeId
    span: LayerSpan


class ModelPlacement(msgspec.Struct, frozen=True):
    """Where one model's layers are."""

    model: ModelInfo
    spans: tuple[Assigned, ...]
    """What each node holds: at most one span a node."""
    missing: str = ""
    """Why the model is not placed, and what to do; empty: it is.  Spans may be left even so: they wait there."""
    primary: tuple[Assigned, ...] = ()
    """The split with the fastest slowest stage, in layer order; each part lies within its node's span."""


class Placement(msgspec.Struct, frozen=True):
    """The coordinator's decision, one entry a model."""

    models: tuple[ModelPlacement, ...] = ()

    def of(self, model: ModelId) -> ModelPlacement | None:
        return next((entry for entry in self.models if entry.model.id == model), None)

    def spans_of(self, node: NodeId) -> tuple[LayerSpan, ...]:
        """What ``node`` shall hold, in the order of models."""
        return tuple(a.span for entry in self.models for a in entry.spans if a.node == node)


class Rules(msgspec.Struct, frozen=True):
    """What a person may set of placement."""

    improvement: float = 0.15
    """A new plan must make the slowest stage faster by this share, else layers stay where they are."""
    max_copies: int = 0
    """Most holders that a layer is given (2: survive one failure); 0: as many as fit."""


DEFAULT_RULES = Rules()

SETTLE = 4
"""Rounds in which several models come to rest on the same nodes."""


class Score(msgspec.Struct, frozen=True):
    """How good one model's placement is."""

    slowest_ms: float
    """Step time of the primary's slowest stage; infinite where the model is not placed."""
    survivability: int
    layers_moved: int
    """Layers that nodes must load which they did not hold before."""


def place(
    models: Sequence[ModelInfo],
    nodes: Sequence[NodeCapacity],
    previous: Placement | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Placement:
    """The placement of ``models`` on ``nodes``; see the module's text for what it aims at.

    Nodes whose role holds no layers, and those not named, get none.  Same arguments, in the same order: same
    result; and ``place(m, n, place(m, n, p)) == place(m, n, p)``, so that a coordinator may ask again at any time.
    """
    placement = _place(models, nodes, previous, rules)
    for _ in range(SETTLE if len(models) > 1 else 0):
        # What one model gave up may be worth a move to another: several settle in a step or two.
        settled = _place(models, nodes, placement, rules)
        if settled == placement:
            break
        placement = settled
    return placement


def _place(
    models: Sequence[ModelInfo], nodes: Sequence[NodeCapacity], previous: Placement | None, rules: Rules
) -> Placement:
    by_id = {node.id: node for node in nodes if node.holds_layers and node.weight_bytes > 0}
    priors = {model.id: _prior(model, previous) for model in models}
    planner = Planner(list(by_id.values()), priors, rules.improvement, rules.max_copies)
    moved = any(prior.spans for prior in priors.values())
    chosen = _plan(planner, models, "least" if moved else "all")
    further: tuple[Moves, ...] = ("excess", "replicas", "all") if moved else ()
    for moves in further:
        if all(planned.primary and planner.at_bound(planned) for planned in chosen):
            break
        other = _plan(planner, models, moves)
        if _worth_moving(other, chosen, by_id):
            chosen = other
    return Placement(tuple(_entry(planned) for planned in chosen))


def _prior(model: ModelInfo, previous: Placement | None) -> Prior:
    spans = held_before(model, previous)
    entry = previous.of(model.id) if previous and spans else None
    primary = tuple(Part(a.node, a.span.start, a.span.end) for a in entry.primary) if entry else ()
    return Prior(spans, primary)


def _plan(planner: Planner, models: Sequence[ModelInfo], moves: Moves) -> list[Planned]:
    """A plan in the order given; if a model finds no place, in order of size, if more find one so."""
    given = planner.plan(models, moves)
    if not any(planned.missing for planned in given) or len(models) < 2:
        return given
    by_size = sorted(models, key=lambda model: -span_bytes(model, 0, model.n_layers))
    sized = planner.plan(by_size, moves)
    if sum(not p.missing for p in sized) <= sum(not p.missing for p in given):
        return given
    by_id = {planned.model.id: planned for planned in sized}
    return [by_id[model.id] for model in models]


def _worth_moving(new: list[Planned], old: list[Planned], by_id: dict[NodeId, NodeCapacity]) -> bool:
    """Whether ``new`` places more models, or survives more failures of some and fewer of none at the same speed."""
    placed_new, placed_old = ([p.model.id for p in plan if not p.missing] for plan in (new, old))
    if placed_new != placed_old:
        return len(placed_new) > len(placed_old)
    copies = [(_copies(a, by_id), _copies(b, by_id)) for a, b in zip(new, old, strict=True)]
    slower = any(
        slowest_ms(_entry(a), by_id) > slowest_ms(_entry(b), by_id) * 1.0001
        for a, b in zip(new, old, strict=True)
        if not a.missing
    )
    return not slower and all(a >= b for a, b in copies) and any(a > b for a, b in copies)


def _copies(planned: Planned, by_id: dict[NodeId, NodeCapacity]) -> int:
    spans = {node: bounds for node, bounds in planned.spans.items() if not by_id[node].draining}
    return min(holders(spans, planned.model.n_layers))


def _entry(planned: Planned) -> ModelPlacement:
    model = planned.model
    spans = sorted(planned.spans.items(), key=lambda item: (item[1], item[0]))
    return ModelPlacement(
        model,
        tuple(Assigned(node, LayerSpan(model.id, *bounds)) for node, bounds in spans),
        planned.missing,
        tuple(Assigned(part.node, LayerSpan(model.id, part.start, part.end)) for part in planned.primary),
    )


def survivability(placement: Placement, alive: Collection[NodeId]) -> dict[ModelId, int]:
    """How many nodes, whichever they are, may fail so that every layer still has a holder.

    The smallest number of holders of any layer, less one; -1: some layer has none even now.
    """
    living = set(alive)
    result = {}
    for entry in placement.models:
        spans = {a.node: (a.span.start, a.span.end) for a in entry.spans if a.node in living}
        result[entry.model.id] = min(holders(spans, entry.model.n_layers), default=0) - 1
    return result


def diff(
    placement: Placement, node: NodeId, loaded: Iterable[LayerSpan]
) -> tuple[tuple[LayerSpan, ...], tuple[LayerSpan, ...]]:
    """What ``node`` has to do: (spans wanted that are not fully loaded, loaded layers that are not wanted).

    A wanted span is named whole, also where a part of it is loaded.  A function of state and wish: restart-proof.
    """
    have = tuple(loaded)
    wanted = placement.spans_of(node)
    to_load = tuple(w for w in wanted if not any(h.model == w.model and h.covers(w.start, w.end) for h in have))
    return to_load, tuple(piece for span in have for piece in _without(span, wanted))


def _without(span: LayerSpan, wanted: Sequence[LayerSpan]) -> list[LayerSpan]:
    """The parts of ``span`` outside the wanted span of its model."""
    for want in wanted:
        if want.model == span.model and want.start < span.end and span.start < want.end:
            pieces = [(span.start, min(span.end, want.start)), (max(span.start, want.end), span.end)]
            return [LayerSpan(span.model, a, b) for a, b in pieces if a < b]
    return [span]


def score(
    placement: Placement, nodes: Sequence[NodeCapacity], previous: Placement | None = None
) -> dict[ModelId, Score]:
    """The figures by which placements are compared and explained, one a model."""
    survived = survivability(placement, [node.id for node in nodes if not node.draining])
    by_id = {node.id: node for node in nodes}
    return {
        entry.model.id: Score(slowest_ms(entry, by_id), survived[entry.model.id], _moved(entry, previous))
        for entry in placement.models
    }


def slowest_ms(entry: ModelPlacement, by_id: dict[NodeId, NodeCapacity]) -> float:
    """Step time of the slowest stage of the primary; infinite without one, or when a node of it is gone."""
    if not entry.primary or any(a.node not in by_id for a in entry.primary):
        return float("inf")
    return max(stage_ms(entry.model, by_id[a.node], a.span.start, a.span.end) for a in entry.primary)


def _moved(entry: ModelPlacement, previous: Placement | None) -> int:
    before = held_before(entry.model, previous)
    moved = 0
    for assigned in entry.spans:
        start, end = before.get(assigned.node, (0, 0))
        kept = max(0, min(end, assigned.span.end) - max(start, assigned.span.start))
        moved += len(assigned.span) - kept
    return moved


def held_before(model: ModelInfo, previous: Placement | None) -> dict[NodeId, tuple[int, int]]:
    """Spans of the same weights in the previous placement; another manifest is another model."""
    entry = previous.of(model.id) if previous else None
    if entry is None or entry.model.manifest != model.manifest:
        return {}
    return {a.node: (a.span.start, a.span.end) for a in entry.spans}
