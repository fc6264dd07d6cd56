"""Placement: optimal against trying everything, stable against the previous one, honest about what does not fit."""

from __future__ import annotations

import random
import re
import time

import msgspec
import pytest

from mesh.capacity import span_bytes, stage_ms
from mesh.placement import (
    Assigned,
    ModelPlacement,
    NodeCapacity,
    Placement,
    Rules,
    diff,
    place,
    score,
    survivability,
)
from mesh.types import LayerSpan, ModelInfo
from tests.mesh.exhaustive import NEVER, model, most_copies, most_copies_at_best_speed, slowest_possible


def node(name: str, layers: float, speed: float = 1.0, **more: object) -> NodeCapacity:
    """A node with room for ``layers`` of the plain model's layers; ``speed`` 1 needs 100 ms a layer."""
    return NodeCapacity(name, int(layers * 100), flops=1e9, bandwidth=1e3 * speed, **more)  # type: ignore[arg-type]


def plain(n_layers: int = 8, name: str = "m") -> ModelInfo:
    return model(n_layers, embed=0, head=0, name=name, hidden=0)


def shape(placement: Placement, name: str = "m") -> dict[str, tuple[int, int]]:
    entry = placement.of(name)
    assert entry is not None
    return {a.node: (a.span.start, a.span.end) for a in entry.spans}


def unlike_nodes(rng: random.Random, most: int) -> tuple[ModelInfo, list[NodeCapacity]]:
    n_layers = rng.randint(1, 10)
    weights = model(n_layers, 100, rng.choice([0, 30, 150]), rng.choice([0, 50, 250]))
    if rng.random() < 0.3:
        weights = msgspec.structs.replace(weights, tied_bytes=min(weights.embed_bytes, weights.head_bytes))
    scale = int(100 * n_layers * rng.choice([0.4, 0.8, 1.1, 1.5]))
    nodes = [
        NodeCapacity(
            f"n{i}",
            rng.choice([0, 150]) + rng.randint(0, scale),
            flops=rng.choice([1e3, 1e5, 1e6]),
            bandwidth=rng.uniform(1e3, 2e4) * rng.choice([1, 5]),
            rtt_ms=rng.choice([0.0, 0.0, rng.uniform(0, 30)]),
        )
        for i in range(rng.randint(1, most))
    ]
    return weights, nodes


def assert_sound(placement: Placement, nodes: list[NodeCapacity]) -> None:
    """Spans fit in memory together, one a node and model; the primary covers all layers within them."""
    for n in nodes:
        held = [a.span for e in placement.models for a in e.spans if a.node == n.id]
        sizes = [
            span_bytes(e.model, a.span.start, a.span.end) for e in placement.models for a in e.spans if a.node == n.id
        ]
        assert len({span.model for span in held}) == len(held)
        assert sum(sizes) <= n.weight_bytes
    for entry in placement.models:
        assert bool(entry.missing) == (not entry.primary)
        spans = {a.node: a.span for a in entry.spans}
        assert all(spans[a.node].covers(a.span.start, a.span.end) for a in entry.primary)
        layers = [layer for a in entry.primary for layer in range(a.span.start, a.span.end)]
        assert layers == (list(range(entry.model.n_layers)) if entry.primary else [])


# --- against trying everything


@pytest.mark.parametrize("seed", range(120))
def test_as_fast_and_as_safe_as_trying_everything(seed: int) -> None:
    weights, nodes = unlike_nodes(random.Random(seed), most=6)
    placement = place([weights], nodes)
    entry = placement.models[0]
    assert_sound(placement, nodes)
    best = slowest_possible(weights, nodes)
    assert (best == NEVER) == bool(entry.missing), entry.missing
    if entry.missing:
        return
    got = score(placement, nodes)["m"]
    assert got.slowest_ms <= best * 1.00001
    anchors = {a.node: (a.span.start, a.span.end) for a in entry.primary}
    if len(nodes) <= 5 or weights.n_layers <= 6:
        assert got.survivability + 1 == most_copies(weights, nodes, anchors)


@pytest.mark.parametrize("seed", range(1000, 1040))
def test_no_other_split_of_the_same_speed_survives_more(seed: int) -> None:
    weights, nodes = unlike_nodes(random.Random(seed), most=4)
    placement = place([weights], nodes)
    if not placement.models[0].missing:
        assert survivability(placement, [n.id for n in nodes])["m"] + 1 == most_copies_at_best_speed(weights, nodes)


# --- what it aims at, one case each


def test_faster_nodes_run_more_layers() -> None:
    placement = place([plain(9)], [node("slow", 9), node("fast", 9, speed=2)])
    primary = {a.node: len(a.span) for a in placement.models[0].primary}
    assert primary == {"slow": 3, "fast": 6}


def test_what_is_left_of_the_memory_is_filled_with_copies() -> None:
    placement = place([plain(8)], [node("a", 8), node("b", 8), node("c", 8)])
    assert shape(placement) == {"a": (0, 8), "b": (0, 8), "c": (0, 8)}
    assert survivability(placement, ["a", "b", "c"]) == {"m": 2}
    assert survivability(placement, ["a"]) == {"m": 0}
    assert survivability(placement, []) == {"m": -1}


def test_four_equal_nodes_hold_every_layer_twice_when_memory_allows_just_that() -> None:
    placement = place([plain(8)], [node(name, 4) for name in "abcd"])
    assert survivability(placement, "abcd") == {"m": 1}
    assert len(placement.models[0].primary) == 4


def test_copies_can_be_limited() -> None:
    placement = place([plain(8)], [node(name, 8) for name in "abcd"], rules=Rules(max_copies=2))
    assert survivability(placement, "abcd") == {"m": 1}
    assert sum(len(a.span) for a in placement.models[0].spans) == 16


def test_a_far_node_is_used_only_when_memory_needs_it() -> None:
    near, far = node("near", 8), node("far", 8, rtt_ms=5000.0)
    assert [a.node for a in place([plain(8)], [near, far]).models[0].primary] == ["near"]
    short = node("near", 5)
    assert {a.node for a in place([plain(8)], [short, far]).models[0].primary} == {"near", "far"}


def test_prefill_bound_nodes_are_judged_by_arithmetic() -> None:
    weak = NodeCapacity("weak", 800, flops=1e4, bandwidth=1e9)
    strong = NodeCapacity("strong", 800, flops=3e4, bandwidth=1e9)
    primary = {a.node: len(a.span) for a in place([plain(8)], [weak, strong]).models[0].primary}
    assert primary == {"weak": 2, "strong": 6}


def test_the_ends_need_room_for_embedding_and_head() -> None:
    weights = model(4, layer=100, embed=150, head=300)
    nodes = [
        NodeCapacity("x", 200, bandwidth=1e3),
        NodeCapacity("h", 400, bandwidth=1e3),
        NodeCapacity("e", 260, bandwidth=1e3),
    ]
    placement = place([weights], nodes)
    assert [a.node for a in placement.models[0].primary] == ["e", "x", "h"]


def test_a_tied_embedding_is_held_once_by_a_node_that_holds_all() -> None:
    tied = msgspec.structs.replace(model(4, layer=100, embed=300, head=310), tied_bytes=300)
    assert not place([tied], [NodeCapacity("a", 710)]).models[0].missing
    assert place([tied], [NodeCapacity("a", 709)]).models[0].missing
    assert place([tied], [NodeCapacity("a", 500), NodeCapacity("b", 509)]).models[0].missing


@pytest.mark.parametrize("role", ["entry", "witness"])
def test_entries_and_witnesses_hold_nothing(role: str) -> None:
    placement = place([plain(4)], [node("a", 4), node("b", 4, role=role)])
    assert set(shape(placement)) == {"a"}


# --- what does not fit


def test_a_model_that_does_not_fit_says_which_how_much_and_what_to_do() -> None:
    placement = place([plain(8, "big")], [node("a", 3), node("b", 3.5)])
    entry = placement.models[0]
    assert (entry.spans, entry.primary) == ((), ())
    assert "model big does not fit: 150 more bytes" in entry.missing
    assert "add nodes, or give them more with --memory" in entry.missing


@pytest.mark.parametrize("seed", range(40))
def test_what_is_said_to_be_missing_is_just_enough(seed: int) -> None:
    weights, nodes = unlike_nodes(random.Random(seed), most=4)
    entry = place([weights], nodes).models[0]
    if entry.missing:
        lack = int(re.search(r": (\d+) more bytes", entry.missing)[1])  # type: ignore[index]
        grown = [
            [*nodes, NodeCapacity("more", lack)],
            *(
                [*nodes[:i], msgspec.structs.replace(n, weight_bytes=n.weight_bytes + lack), *nodes[i + 1 :]]
                for i, n in enumerate(nodes)
            ),
        ]
        assert any(not place([weights], more).models[0].missing for more in grown)


def test_no_nodes_at_all() -> None:
    assert "800 more bytes" in place([plain(8)], []).models[0].missing
    assert place([], [node("a", 4)]) == Placement()


def test_spans_of_a_model_that_no_longer_fits_wait_where_they_are() -> None:
    nodes = [node("a", 4), node("b", 4)]
    before = place([plain(8)], nodes)
    without = place([plain(8)], nodes[:1], before)
    assert without.models[0].missing
    assert shape(without) == {"a": shape(before)["a"]}
    assert place([plain(8)], nodes, without) == before


# --- several models


def test_every_model_is_placed_before_any_is_copied() -> None:
    nodes = [node("a", 8), node("b", 8)]
    placement = place([plain(8, "x"), plain(8, "y")], nodes)
    assert_sound(placement, nodes)
    assert [entry.missing for entry in placement.models] == ["", ""]


def test_models_share_what_is_left_in_turn() -> None:
    nodes = [node(name, 8) for name in "abcd"]
    placement = place([plain(8, "x"), plain(8, "y")], nodes)
    assert survivability(placement, "abcd") == {"x": 1, "y": 1}


def test_a_new_model_takes_copies_but_no_primary() -> None:
    nodes = [node(name, 8) for name in "ab"]
    before = place([plain(8, "x")], nodes)
    after = place([plain(8, "x"), plain(8, "y")], nodes, before)
    assert_sound(after, nodes)
    assert after.models[0].primary == before.models[0].primary
    assert not after.models[1].missing


def test_a_large_model_is_not_kept_out_by_smaller_ones_before_it() -> None:
    nodes = [node("a", 4), node("b", 2)]
    placement = place([plain(2, "small"), plain(4, "large")], nodes)
    assert_sound(placement, nodes)
    assert not any(entry.missing for entry in placement.models)


# --- against a previous placement


def test_nothing_changed_nothing_moves() -> None:
    nodes = [node("a", 5), node("b", 4, speed=3), node("c", 6)]
    before = place([plain(8)], nodes)
    assert place([plain(8)], nodes, before) == before


def test_a_join_that_gains_less_than_15_percent_moves_nobody() -> None:
    nodes = [node(name, 10) for name in "abcdefghi"]
    before = place([plain(90)], nodes)
    after = place([plain(90)], [*nodes, node("j", 10)], before)
    assert {name: span for name, span in shape(after).items() if name != "j"} == shape(before)
    assert after.models[0].primary == before.models[0].primary
    assert "j" in shape(after), "its memory is used for copies"


def test_a_join_that_gains_more_is_used() -> None:
    before = place([plain(8)], [node("a", 8)])
    nodes = [node("a", 8), node("b", 8)]
    after = place([plain(8)], nodes, before)
    assert len(after.models[0].primary) == 2
    assert score(after, nodes, before)["m"].layers_moved == 8, "only b loads; a keeps what it has"


def test_a_leave_moves_only_what_is_uncovered() -> None:
    nodes = [node(name, 3) for name in "abcd"]
    before = place([plain(8)], nodes)
    gone = before.models[0].primary[1]
    rest = [n for n in nodes if n.id != gone.node]
    after = place([plain(8)], rest, before)
    assert not after.models[0].missing
    covered_before = {layer for name, (a, b) in shape(before).items() if name != gone.node for layer in range(a, b)}
    assert score(after, rest, before)["m"].layers_moved <= max(1, 8 - len(covered_before)) + 1


def test_a_leave_with_copies_moves_nothing() -> None:
    nodes = [node(name, 8) for name in "abc"]
    before = place([plain(8)], nodes)
    after = place([plain(8)], nodes[1:], before)
    assert score(after, nodes, before)["m"].layers_moved == 0
    assert {a.node for a in after.models[0].primary} <= {"b", "c"}


def test_a_draining_node_is_replaced_and_until_then_serves() -> None:
    nodes = [node("a", 4), node("b", 4)]
    before = place([plain(8)], nodes)
    leaving = [node("a", 4, draining=True), node("b", 4)]
    assert shape(place([plain(8)], leaving, before)) == shape(before), "nobody else has room"
    replaced = place([plain(8)], [*leaving, node("c", 4)], before)
    assert set(shape(replaced)) == {"b", "c"}
    assert shape(replaced)["b"] == shape(before)["b"]


def test_other_weights_under_the_same_name_keep_no_place() -> None:
    before = place([plain(8)], [node("a", 8)])
    other = msgspec.structs.replace(plain(8), manifest="another")
    nodes = [node("a", 8)]
    assert score(place([other], nodes, before), nodes, before)["m"].layers_moved == 8


@pytest.mark.parametrize("seed", range(16))
def test_a_life_of_joins_and_leaves(seed: int) -> None:
    """Sound, idempotent, never slower than the rule allows, and a move only for a reason, at every step."""
    rng = random.Random(seed)
    models = [model(rng.randint(4, 10), 100, 30, 50, name) for name in ("x", "y")[: rng.choice([1, 2])]]
    pool = [node(f"n{i}", rng.uniform(2, 12), rng.uniform(1, 3)) for i in range(8)]
    present, before = pool[:3], None
    for _ in range(10):
        after = place(models, present, before)
        assert_sound(after, present)
        assert place(models, present, after) == after
        for entry in after.models if len(models) == 1 else []:
            if not entry.missing:
                assert score(after, present)[entry.model.id].slowest_ms <= slowest_possible(entry.model, present) / 0.84
        before = after
        absent = [n for n in pool if n not in present]
        if absent and (len(present) < 3 or rng.random() < 0.5):
            present = [*present, rng.choice(absent)]
        else:
            present = [n for n in present if n is not rng.choice(present)]


def test_a_large_mesh_is_placed_at_once() -> None:
    rng = random.Random(1)
    weights = model(80, 100, 120, 120)
    nodes = [node(f"{i:03}", rng.uniform(2, 36), rng.uniform(1, 20), rtt_ms=rng.uniform(0.1, 5)) for i in range(100)]
    started = time.process_time()
    placement = place([weights], nodes)
    assert time.process_time() - started < 0.6, "0.13 s where this was written"
    assert_sound(placement, nodes)
    assert survivability(placement, [n.id for n in nodes])["m"] > 10


# --- values


def test_stage_time_counts_the_wire_and_the_ends() -> None:
    weights = model(4, layer=100, embed=30, head=50)
    n = NodeCapacity("n", 1000, flops=1e12, bandwidth=1e3, rtt_ms=8.0)
    assert stage_ms(weights, n, 1, 3) == pytest.approx(4 + 200)
    assert stage_ms(weights, n, 2, 4) == pytest.approx(4 + 200 + 50)
    assert stage_ms(weights, n, 0, 1) == pytest.approx(4 + 100 + 16 * 4 * 2)


DIFFS = [
    # wanted, loaded -> to load, to drop
    ((2, 6), [], [(2, 6)], []),
    ((2, 6), [(2, 6)], [], []),
    ((2, 6), [(0, 4)], [(2, 6)], [(0, 2)]),
    ((2, 6), [(0, 8)], [], [(0, 2), (6, 8)]),
    ((2, 6), [(7, 8)], [(2, 6)], [(7, 8)]),
    (None, [(0, 3)], [], [(0, 3)]),
]


@pytest.mark.parametrize(("wanted", "loaded", "to_load", "to_drop"), DIFFS)
def test_diff(
    wanted: tuple[int, int] | None,
    loaded: list[tuple[int, int]],
    to_load: list[tuple[int, int]],
    to_drop: list[tuple[int, int]],
) -> None:
    spans = (Assigned("a", LayerSpan("m", *wanted)),) if wanted else ()
    placement = Placement((ModelPlacement(plain(), (*spans, Assigned("b", LayerSpan("m", 0, 8)))),))
    got = diff(placement, "a", [LayerSpan("m", *span) for span in loaded])
    assert [[(s.start, s.end) for s in side] for side in got] == [to_load, to_drop]
