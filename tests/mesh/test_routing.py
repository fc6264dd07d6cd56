"""Routes: cover every layer once, avoid the doubtful, keep what survives, spread the load."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from itertools import permutations

import pytest

from mesh.errors import NoRoute
from mesh.routing import RouteRequest, find_route, find_substitute
from mesh.types import Hop, Route
from mesh.view import MeshView
from tests.mesh.exhaustive import model
from tests.mesh.views import member, view

Finder = Callable[[MeshView, RouteRequest], Route]


def ask(mesh: MeshView, find: Finder = find_route, **more: object) -> list[tuple[str, int, int]]:
    route = find(mesh, RouteRequest(model="m", **more))  # type: ignore[arg-type]
    return [(hop.node, hop.start, hop.end) for hop in route.hops]


def test_a_chain_of_spans() -> None:
    mesh = view(member("b", (3, 8)), member("a", (0, 3)))
    assert ask(mesh) == [("a", 0, 3), ("b", 3, 8)]


def test_a_hop_may_use_part_of_what_its_node_holds() -> None:
    mesh = view(member("a", (0, 5), bandwidth=2e6), member("b", (2, 8)))
    assert ask(mesh) == [("a", 0, 5), ("b", 5, 8)]
    mesh = view(member("a", (0, 5)), member("b", (2, 8), bandwidth=2e6))
    assert ask(mesh) == [("a", 0, 2), ("b", 2, 8)]


def test_few_hops_on_ties() -> None:
    mesh = view(member("a", (0, 4)), member("b", (4, 8)), member("c", (0, 8)))
    assert ask(mesh) == [("c", 0, 8)]


def test_the_wire_counts() -> None:
    mesh = view(member("far", (0, 8), rtt_ms=50.0), member("a", (0, 4), rtt_ms=1.0), member("b", (4, 8), rtt_ms=1.0))
    assert ask(mesh) == [("a", 0, 4), ("b", 4, 8)]


def test_a_node_is_used_once() -> None:
    mesh = view(member("a", (0, 2), (6, 8)), member("b", (2, 6)), member("c", (4, 8), bandwidth=1e4))
    assert ask(mesh) == [("a", 0, 2), ("b", 2, 6), ("c", 6, 8)]


# --- whom to avoid


@pytest.mark.parametrize(
    "doubtful",
    [
        member("bad", (0, 8), state="suspect", bandwidth=1e9),
        member("bad", (0, 8), degraded=True, bandwidth=1e9),
        member("bad", (0, 8), draining=True, bandwidth=1e9),
        member("bad", (0, 8), load={"free_tokens": 10}, bandwidth=1e9),
    ],
    ids=["suspect", "degraded", "draining", "full"],
)
def test_the_doubtful_serve_only_where_nothing_else_covers(doubtful: object) -> None:
    mesh = view(doubtful, member("slow", (0, 8), bandwidth=1e3))  # type: ignore[arg-type]
    assert ask(mesh, positions=100) == [("slow", 0, 8)]
    short = view(doubtful, member("slow", (0, 6), bandwidth=1e3))  # type: ignore[arg-type]
    assert "bad" in dict.fromkeys(node for node, _, _ in ask(short, positions=100))


@pytest.mark.parametrize("state", ["dead", "left"])
def test_the_dead_never(state: str) -> None:
    with pytest.raises(NoRoute, match=r"\[0, 8\) of model m"):
        ask(view(member("a", (0, 8), state=state)))


def test_excluded_and_not_allowed() -> None:
    mesh = view(member("a", (0, 8)), member("b", (0, 8)))
    assert ask(mesh, exclude=("a",)) == [("b", 0, 8)]
    assert ask(mesh, allowed_nodes=("b",)) == [("b", 0, 8)]
    assert ask(mesh, allowed_nodes=("name-b",)) == [("b", 0, 8)]
    with pytest.raises(NoRoute):
        ask(mesh, allowed_nodes=())


def test_no_route_names_the_layers() -> None:
    with pytest.raises(NoRoute, match=r"layers \[2, 3\), \[6, 8\) of model m"):
        ask(view(member("a", (0, 2)), member("b", (3, 6))))
    with pytest.raises(NoRoute, match="offers model 'other'"):
        find_route(view(), RouteRequest(model="other"))


def test_bitwise_substitutes_are_preferred_to_fast_ones() -> None:
    mesh = view(member("fast", (0, 8), bandwidth=1e9, hardware="x"), member("same", (0, 8), hardware="y", exact=True))
    assert ask(mesh, hardware="y") == [("same", 0, 8)]
    assert ask(mesh) == [("fast", 0, 8)]


@pytest.mark.parametrize("lags", [(0, 0, 0, 0, 0), (2, 3, 1, 4, 19), (25, 0, 15, 20, 5)])
def test_streams_are_spread_over_nodes_that_are_alike_though_their_lags_are_noisy(lags: tuple[int, ...]) -> None:
    """So a node that is lost takes few streams along, and more than one rebuilds them."""
    mesh = view(*(member(f"n{i}", (0, 8), load={"lag_ms": float(lag)}) for i, lag in enumerate(lags)))
    sent: Counter[str] = Counter()
    for seed in range(16):
        sent.update(node for node, _, _ in ask(mesh, seed=seed, max_layers=2, outstanding=dict(sent)))
    assert max(sent.values()) <= 16
    assert min(sent.values()) >= 16 * 4 / 5 / 2, sent


# --- recovery


def test_surviving_hops_stay_exactly() -> None:
    mesh = view(member("a", (0, 8)), member("b", (0, 8)), member("c", (2, 5)), member("d", (0, 8), bandwidth=1e9))
    keep = (Hop("a", 0, 2), Hop("b", 5, 8))
    assert ask(mesh, keep=keep, exclude=("d",)) == [("a", 0, 2), ("c", 2, 5), ("b", 5, 8)]
    assert ask(mesh, keep=(Hop("d", 0, 8),)) == [("d", 0, 8)]


def test_two_lost_spans_do_not_take_each_others_only_node() -> None:
    mesh = view(
        member("keep", (2, 6)), member("both", (0, 8), bandwidth=1e9), member("one", (0, 2)), member("none", (7, 8))
    )
    keep = (Hop("keep", 2, 6),)
    assert ask(mesh, keep=keep) == [("one", 0, 2), ("keep", 2, 6), ("both", 6, 8)]


def test_a_lost_span_without_a_holder_is_named() -> None:
    mesh = view(member("a", (0, 4)), member("b", (4, 8)))
    with pytest.raises(NoRoute, match=r"\[4, 8\)"):
        ask(mesh, keep=(Hop("a", 0, 4),), exclude=("b",))


def test_a_kept_node_serves_more_where_it_alone_can() -> None:
    mesh = view(member("big", (0, 8)), member("small", (0, 4)), member("one", (0, 2)))
    keep = (Hop("big", 4, 8),)
    assert ask(mesh, find_substitute, keep=keep, exclude=("one",)) == [("small", 0, 4), ("big", 4, 8)]
    assert ask(mesh, find_substitute, keep=keep, exclude=("one", "small")) == [("big", 0, 8)]
    keep = (Hop("one", 0, 2), Hop("big", 2, 6))
    assert ask(mesh, find_substitute, keep=keep) == [("one", 0, 2), ("big", 2, 8)], "who need not, does nothing again"
    with pytest.raises(NoRoute):
        ask(mesh, keep=keep)


def test_what_no_node_holds_is_named_whatever_is_kept() -> None:
    mesh = view(member("a", (0, 4)), member("b", (2, 6)))
    with pytest.raises(NoRoute, match=r"\[6, 8\)"):
        ask(mesh, find_substitute, keep=(Hop("a", 0, 4),))


# --- balance


def spread(mesh: MeshView, n: int = 200, **more: object) -> Counter[str]:
    return Counter(ask(mesh, seed=seed, **more)[0][0] for seed in range(n))


TWINS = view(member("a", (0, 8)), member("b", (0, 8)), member("c", (0, 8)))


def test_round_robin_takes_turns() -> None:
    assert spread(TWINS, 99, balance="round_robin") == {"a": 33, "b": 33, "c": 33}


def test_weighted_draws_in_proportion() -> None:
    mesh = view(
        member("slow", (0, 8), load={"tokens_per_s": 10.0}), member("fast", (0, 8), load={"tokens_per_s": 30.0})
    )
    counts = spread(mesh, 1000, balance="weighted")
    assert 700 < counts["fast"] < 800


def test_least_connections() -> None:
    mesh = view(member("a", (0, 8), load={"running": 3}), member("b", (0, 8), load={"running": 1, "waiting": 1}))
    assert ask(mesh, balance="least_connections") == [("b", 0, 8)]
    assert ask(mesh, balance="least_connections", outstanding={"b": 9}) == [("a", 0, 8)]


def test_memory() -> None:
    mesh = view(member("a", (0, 8), load={"free_tokens": 100}), member("b", (0, 8), load={"free_tokens": 900}))
    assert ask(mesh, balance="memory") == [("b", 0, 8)]


def test_prefix_affinity_is_faithful_until_a_node_is_overrun() -> None:
    chosen = {ask(TWINS, balance="prefix_affinity", prefix="p", seed=seed)[0][0] for seed in range(20)}
    assert len(chosen) == 1
    assert len({ask(TWINS, balance="prefix_affinity", prefix=str(i))[0][0] for i in range(30)}) == 3
    (favourite,) = chosen
    assert ask(TWINS, balance="prefix_affinity", prefix="p", outstanding={favourite: 60})[0][0] != favourite


def test_latency_spreads_sessions_over_equal_replicas() -> None:
    outstanding: Counter[str] = Counter()
    for seed in range(30):
        outstanding[ask(TWINS, seed=seed, outstanding=outstanding)[0][0]] += 1
    assert max(outstanding.values()) - min(outstanding.values()) <= 1


def test_the_same_request_gets_the_same_route() -> None:
    assert len({str(ask(TWINS, seed=7)) for _ in range(5)}) == 1


# --- against trying everything


@pytest.mark.parametrize("seed", range(80))
def test_valid_whenever_possible_and_near_the_cheapest(seed: int) -> None:
    rng = random.Random(seed)
    n_layers = rng.randint(2, 8)
    members = []
    for i in range(rng.randint(1, 5)):
        start = rng.randrange(n_layers)
        span = (start, rng.randint(start + 1, n_layers))
        members.append(member(f"n{i}", span, bandwidth=rng.uniform(1e5, 1e6), rtt_ms=rng.uniform(0, 3)))
    mesh = view(*members, offered=model(n_layers, 1000, 0, 0, hidden=0))
    best = cheapest(mesh, n_layers)
    if best is None:
        with pytest.raises(NoRoute):
            ask(mesh)
        return
    route = find_route(mesh, RouteRequest(model="m"))
    layers = [layer for hop in route.hops for layer in range(hop.start, hop.end)]
    assert layers == list(range(n_layers))
    assert len(set(route.nodes)) == len(route.nodes)
    assert milliseconds(mesh, route) <= best * 1.02 + 1e-6


def milliseconds(mesh: MeshView, route: Route) -> float:
    total = 0.0
    for hop in route.hops:
        m = mesh.member(hop.node)
        assert m is not None
        assert any(span.covers(hop.start, hop.end) for span in m.profile.spans)
        total += 0.3 + 1e3 * 1000 * (hop.end - hop.start) / m.profile.bandwidth + m.rtt_ms / 2
    return total


def cheapest(mesh: MeshView, n_layers: int) -> float | None:
    best = None
    holders = [(m.id, m.profile.spans[0]) for m in mesh.members if m.profile.spans]
    for count in range(1, len(holders) + 1):
        for order in permutations(holders, count):
            for cuts in _cuts(n_layers, count):
                hops = [Hop(node, a, b) for (node, _), a, b in zip(order, cuts, cuts[1:], strict=False)]
                if all(span.covers(h.start, h.end) for (_, span), h in zip(order, hops, strict=True)):
                    ms = milliseconds(mesh, Route("m", tuple(hops)))
                    best = ms if best is None else min(best, ms)
    return best


def _cuts(n_layers: int, count: int) -> list[tuple[int, ...]]:
    if count == 1:
        return [(0, n_layers)]
    return [(*rest[:-1], cut, n_layers) for rest in _cuts(n_layers, count - 1) for cut in range(rest[-2] + 1, n_layers)]


def test_a_large_mesh_is_routed_at_once() -> None:
    """Twice the members cost four times the work, or little more: not the number of ways through them."""
    assert processor_s(100) < 12 * processor_s(50)


def processor_s(members: int) -> float:
    rng = random.Random(2)
    holders = []
    for i in range(members):
        start = rng.randrange(70)
        holders.append(member(f"n{i:03}", (start, start + rng.randint(5, 10)), rtt_ms=rng.uniform(0, 3)))
    mesh = view(*holders, member("z", (70, 80)), member("y", (0, 5)), offered=model(80, 1000, 0, 0, hidden=0))
    taken = []
    for _ in range(3):
        started = time.process_time()
        ask(mesh)
        taken.append(time.process_time() - started)
    return min(taken)
