"""Covering layers k times with contiguous spans."""

from __future__ import annotations

import pytest

from mesh.capacity import NodeCapacity, Worker
from mesh.cover import cover, deepest, fill, holders
from tests.mesh.exhaustive import model


def workers(n_layers: int, *layers: int) -> list[Worker]:
    weights = model(n_layers, embed=0, head=0, hidden=0)
    return [Worker(weights, NodeCapacity(f"n{i}", 100 * n), 100 * n) for i, n in enumerate(layers)]


def test_holders_counts_spans_at_each_layer() -> None:
    assert holders({"a": (0, 3), "b": (2, 4)}, 5) == [1, 1, 2, 1, 0]


@pytest.mark.parametrize(
    ("n_layers", "layers", "anchors", "k"),
    [
        (4, (4, 4), {}, 2),
        (6, (4, 4, 4), {}, 1),  # 12 layers of room are 2 x 6, but no split into two groups reaches 6 twice
        (6, (2, 4, 3, 3), {}, 2),
        (8, (4, 4, 4, 4), {"n0": (0, 2), "n1": (2, 4), "n2": (4, 6), "n3": (6, 8)}, 2),
        (8, (4, 4, 4, 4), {"n0": (0, 2), "n1": (2, 6), "n2": (4, 6), "n3": (6, 8)}, 1),
        (5, (5, 1, 1, 1, 1, 1), {}, 2),
    ],
)
def test_deepest(n_layers: int, layers: tuple[int, ...], anchors: dict[str, tuple[int, int]], k: int) -> None:
    found, spans = deepest(workers(n_layers, *layers), n_layers, anchors, 10)
    assert found == k
    assert min(holders(spans, n_layers)) >= k
    assert all(spans[node][0] <= a and b <= spans[node][1] for node, (a, b) in anchors.items())


def test_spans_are_no_longer_than_needed() -> None:
    spans = cover(workers(4, 4, 4, 4), 4, 1, {"n0": (0, 2)})
    assert spans is not None
    assert holders(spans, 4) == [1, 1, 1, 1]


def test_more_than_there_is_cannot_be_covered() -> None:
    assert cover(workers(4, 3), 4, 1, {}) is None


def test_fill_grows_where_holders_are_fewest() -> None:
    (worker,) = workers(5, 3)
    assert fill(worker, 5, None, [1, 1, 0, 1, 1], 9) == (2, 3)
    assert fill(worker, 5, (2, 3), [1, 2, 1, 1, 1], 9) == (2, 4)
    assert fill(worker, 5, (1, 4), [1, 1, 1, 1, 1], 9) is None, "full"
    assert fill(worker, 5, (2, 3), [1, 1, 1, 1, 1], 1) is None, "enough copies"
