"""Splitting layers into stages."""

from __future__ import annotations

import random

import pytest

from mesh.capacity import NodeCapacity, Worker
from mesh.partition import arrange, fastest, kept_layers, rearrange, split
from tests.mesh.exhaustive import NEVER, model, slowest_possible


def workers(n_layers: int, *speeds: float) -> list[Worker]:
    weights = model(n_layers, embed=0, head=0, hidden=0)
    nodes = [NodeCapacity(f"n{i}", 100 * n_layers, flops=1e9, bandwidth=1e3 * s) for i, s in enumerate(speeds)]
    return [Worker(weights, node, node.weight_bytes) for node in nodes]


@pytest.mark.parametrize("seed", range(60))
def test_fastest_is_exact(seed: int) -> None:
    rng = random.Random(seed)
    weights = model(rng.randint(1, 9), 100, rng.choice([0, 120]), rng.choice([0, 260]))
    nodes = [
        NodeCapacity(f"n{i}", rng.randint(0, 900), 1e9, rng.uniform(1e2, 1e4), rng.uniform(0, 200))
        for i in range(rng.randint(1, 5))
    ]
    found = fastest([Worker(weights, n, n.weight_bytes) for n in nodes], weights.n_layers)
    expected = slowest_possible(weights, nodes)
    assert (NEVER if found is None else found.ms) == pytest.approx(expected, rel=1e-6)


def test_split_uses_the_ablest_in_the_middle() -> None:
    parts = split(workers(6, 1, 1, 3, 1), 6, 200.0)
    assert parts is not None
    assert [(p.node, p.start, p.end) for p in parts] == [("n0", 0, 2), ("n2", 2, 4), ("n3", 4, 6)]
    assert split(workers(6, 1, 1), 6, 200.0) is None


def test_arrange_keeps_what_is_held() -> None:
    held = {"n0": (0, 3), "n2": (3, 6)}
    parts = arrange(workers(6, 1, 1, 1), 6, 300.0, held)
    assert parts is not None
    assert kept_layers(parts, held) == 6


def test_rearrange_gives_a_gap_to_a_newcomer() -> None:
    team = workers(9, 1, 1, 1)
    best = fastest(team, 9)
    assert best is not None
    held = {"n0": (0, 3), "n1": (6, 9)}
    parts = rearrange(team, 9, best, 1.0, held)
    assert [(p.node, p.start, p.end) for p in parts] == [("n0", 0, 3), ("n2", 3, 6), ("n1", 6, 9)]
