"""Routes: which nodes run which layers of one session.  A pure function of a view and a request.

A route is a shortest path over layer boundaries: an edge is a hop, a node that holds layers [a, b) and runs any
part of them.  Hops cost what the balancing policy says; on top of that, nodes that one would rather not use cost
so much that they serve only where nothing else covers the layers.  A node is used once in a route.

Because hops cost in proportion to their layers, a cut between two hops is best where one of their spans begins or
ends: only such cuts are tried.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from mesh.balance import Balance, Holder, HopCost, Measured, hop_cost
from mesh.errors import NoRoute
from mesh.types import Hop, LayerSpan, ModelId, ModelInfo, NodeId, Route
from mesh.view import MemberView, MeshView, gaps

UNHEALTHY = 1e12
"""Suspected, degraded or draining: only where nothing else covers a layer."""
FULL = 1e10
"""Says that it has no room for the positions asked for: it would answer Busy."""
OTHER_HARDWARE = 1e8
"""Would replay with other bits: only tokens, not bitwise, would be equal (recovery)."""

PATHS_KEPT = 3
"""Partial paths kept at each boundary: more than one, since a node may be used only once."""


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a route."""

    model: ModelId
    positions: int = 0
    """Keys and values that the session may need, in positions; nodes with less room are avoided."""
    balance: Balance = "latency"
    allowed_nodes: tuple[NodeId, ...] | None = None
    """Only these (ids or names); ``None``: all."""
    exclude: tuple[NodeId, ...] = ()
    """Never these."""
    max_layers: int = 0
    """At most so many layers in one hop, to split finer than is needed; 0: as the costs say."""
    keep: tuple[Hop, ...] = ()
    """Hops that stay exactly as they are; only the layers between them are routed."""
    seed: int = 0
    """Decides between equals; a counter for ``round_robin``."""
    hardware: str = ""
    """Prefer nodes of this hardware class that replay exactly; empty: no preference."""
    prefix: str = ""
    """Names the prompt's beginning, for ``prefix_affinity``."""
    outstanding: Mapping[NodeId, int] = {}
    """Sessions that this node has running at each node, fresher than any profile."""


class _Path(NamedTuple):
    """A chain of hops in the making; paths compare by cost, then by number of hops."""

    cost: float
    n_hops: int
    before: _Path | None
    hop: Hop | None

    def hops(self) -> list[Hop]:
        found, path = [], self
        while path.before is not None and path.hop is not None:
            found.append(path.hop)
            path = path.before
        return found[::-1]


def find_route(view: MeshView, request: RouteRequest) -> Route:
    """The cheapest route; raises ``NoRoute`` naming the model and the layers [a, b) that nothing covers."""
    model = view.model(request.model)
    if model is None:
        raise NoRoute(f"no live node offers model {request.model!r}")
    holders = _holders(view, request)
    wanted = _between(request.keep, model.n_layers)
    if not wanted:
        return Route(model.id, _in_order(request.keep))
    if not holders:
        raise NoRoute(_no_route(model, wanted))
    cost = _cost(view, request, model, holders)
    for _ in wanted:
        used = frozenset(hop.node for hop in request.keep)
        hops, failed = _fill_gaps(holders, cost, wanted, used, request.max_layers)
        if failed is None:
            return Route(model.id, _in_order([*request.keep, *hops]))
        wanted = (failed, *(gap for gap in wanted if gap != failed))  # give it the first choice of nodes
    raise NoRoute(_no_route(model, _uncovered([span for _, span in holders], *wanted[0])))


def find_substitute(view: MeshView, request: RouteRequest) -> Route:
    """``find_route``; where no route has all the hops that were to be kept, one that has fewer of them.

    The node of a kept hop may be the only one left that holds the lost layers: it can serve both, if it gives up
    what it has computed so far.
    """
    missing: NoRoute | None = None
    for keep in fewer(request.keep):
        try:
            return find_route(view, msgspec.structs.replace(request, keep=keep))
        except NoRoute as error:
            missing = missing or error
    assert missing is not None
    raise missing


def fewer(keep: tuple[Hop, ...]) -> Iterator[tuple[Hop, ...]]:
    """All of ``keep``, all but one, that with the fewest layers first, and none."""
    yield keep
    if len(keep) > 1:
        for least in sorted(keep, key=lambda hop: hop.end - hop.start):
            yield tuple(hop for hop in keep if hop != least)
    if keep:
        yield ()


def _fill_gaps(
    holders: list[Holder],
    cost: HopCost,
    wanted: tuple[tuple[int, int], ...],
    used: frozenset[NodeId],
    max_layers: int,
) -> tuple[list[Hop], tuple[int, int] | None]:
    """Hops for all gaps, each node used once; or the gap for which no node was left."""
    hops: list[Hop] = []
    for start, end in wanted:
        path = _shortest(holders, cost, start, end, used, max_layers or end)
        if path is None:
            return hops, (start, end)
        hops += path
        used |= {hop.node for hop in path}
    return hops, None


def _holders(view: MeshView, request: RouteRequest) -> list[Holder]:
    """Spans that may be used at all: ready, of present members that are allowed and not excluded or kept."""
    barred = {*request.exclude, *(hop.node for hop in request.keep)}
    allowed = None if request.allowed_nodes is None else set(request.allowed_nodes)
    return [
        (member, span)
        for member, span in view.ready_spans(request.model)
        if member.id not in barred and (allowed is None or member.id in allowed or member.profile.name in allowed)
    ]


def _cost(view: MeshView, request: RouteRequest, model: ModelInfo, holders: list[Holder]) -> HopCost:
    measured = Measured(model, view.me, request.outstanding)
    by_policy = hop_cost(request.balance, measured, holders, request.seed, request.prefix)
    avoided = {member.id: _avoidance(member, request) for member, _ in holders}
    return lambda member, span, start, end: avoided[member.id] + by_policy(member, span, start, end)


def _avoidance(member: MemberView, request: RouteRequest) -> float:
    profile, cost = member.profile, 0.0
    if member.state != "alive" or member.degraded or profile.draining:
        cost += UNHEALTHY
    if request.positions > profile.load.free_tokens:
        cost += FULL
    if request.hardware and not (profile.hardware == request.hardware and profile.exact):
        cost += OTHER_HARDWARE
    return cost


def _between(keep: tuple[Hop, ...], n_layers: int) -> tuple[tuple[int, int], ...]:
    """Layers that the kept hops leave to be routed."""
    return gaps([LayerSpan(ModelId(""), hop.start, hop.end) for hop in keep], n_layers)


def _in_order(hops: tuple[Hop, ...] | list[Hop]) -> tuple[Hop, ...]:
    return tuple(sorted(hops, key=lambda hop: hop.start))


def _shortest(
    holders: list[Holder], cost: HopCost, start: int, end: int, used: frozenset[NodeId], max_layers: int
) -> list[Hop] | None:
    """The cheapest chain of hops over [start, end), each on a node of its own that is not in ``used``."""
    starts = sorted({span.start for _, span in holders if start < span.start < end})
    cuts = sorted({start, *starts, *(span.end for _, span in holders if start < span.end < end)})
    if max_layers < end - start:
        cuts = list(range(start, end))  # a limited hop may end anywhere
    paths: dict[int, list[_Path]] = {start: [_Path(0.0, 0, None, None)]}
    for cut in cuts:
        here = [holder for holder in holders if holder[1].start <= cut < holder[1].end and holder[0].id not in used]
        for path, taken in _best(paths.pop(cut, [])):
            for member, span in here:
                if member.id in taken:
                    continue
                furthest = min(span.end, end, cut + max_layers)
                for to in (*(s for s in starts if cut < s < furthest), furthest):
                    dearer = path.cost + cost(member, span, cut, to)
                    paths.setdefault(to, []).append(_Path(dearer, path.n_hops + 1, path, Hop(member.id, cut, to)))
    final = paths.get(end)
    return None if not final else min(final, key=_rank).hops()


def _rank(path: _Path) -> tuple[float, int]:
    return path[:2]


def _best(paths: list[_Path]) -> list[tuple[_Path, frozenset[NodeId]]]:
    """The cheapest few, each with its nodes, each of other nodes."""
    kept: dict[frozenset[NodeId], _Path] = {}
    for path in heapq.nsmallest(2 * PATHS_KEPT, paths, key=_rank):
        kept.setdefault(frozenset(hop.node for hop in path.hops()), path)
    return [(path, nodes) for nodes, path in kept.items()][:PATHS_KEPT]


def _uncovered(spans: list[LayerSpan], start: int, end: int) -> tuple[tuple[int, int], ...]:
    cut = [(max(a, start), min(b, end)) for a, b in gaps(spans, end)]
    return tuple((a, b) for a, b in cut if a < b) or ((start, end),)


def _no_route(model: ModelInfo, missing: tuple[tuple[int, int], ...]) -> str:
    ranges = ", ".join(f"[{start}, {end})" for start, end in missing)
    return f"no live node that may be used holds layers {ranges} of model {model.id}"
