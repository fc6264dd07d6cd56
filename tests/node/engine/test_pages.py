"""Room for keys and values: width classes, promises, slots."""

from __future__ import annotations

import pytest

from mesh.errors import CapacityError
from node.engine.pages import PAGE, KvBudget, LayerRoom, Slots, padded, runs_of, width_of


@pytest.mark.parametrize(
    ("positions", "pages"),
    [(1, 1), (128, 1), (129, 2), (256, 2), (257, 3), (385, 4), (513, 6), (769, 8), (1025, 12), (1537, 16), (8192, 64)],
)
def test_width_classes(positions: int, pages: int) -> None:
    assert width_of(positions) == pages * PAGE


def test_a_width_holds_its_positions_and_wastes_at_most_half_and_a_page() -> None:
    for positions in range(1, 5000):
        assert positions <= width_of(positions) <= positions * 1.5 + PAGE
        assert padded(positions) <= width_of(positions)


def test_the_budget_refuses_what_does_not_fit_and_says_when_to_come_back() -> None:
    budget, layers = KvBudget(10 * PAGE * 100), [LayerRoom(60), LayerRoom(40)]
    budget.reserve("a", 8 * PAGE, layers)
    with pytest.raises(CapacityError) as refused:
        budget.reserve("b", 3 * PAGE, layers)
    assert 0 < refused.value.retry_after_s <= 5
    budget.reserve("c", 2 * PAGE, layers)
    budget.release("a")
    budget.release("a")
    budget.reserve("b", 3 * PAGE, layers)
    budget.release("b")
    budget.release("c")
    assert budget.used == 0
    assert len(budget) == 0


def test_slots_are_given_lowest_first() -> None:
    slots = Slots()
    assert [slots.take() for _ in range(4)] == [0, 1, 2, 3]
    slots.give(2)
    slots.give(1)
    assert [slots.take(), slots.take(), slots.take()] == [1, 2, 4]
    slots.give(4)
    slots.give(3)
    assert slots.span == 3


@pytest.mark.parametrize(
    ("slots", "runs"),
    [([0], [(0, 1)]), ([0, 1, 2], [(0, 3)]), ([0, 2, 3], [(0, 3)]), ([0, 3, 4, 9], [(0, 1), (1, 3), (3, 4)])],
)
def test_runs_bridge_small_gaps_only(slots: list[int], runs: list[tuple[int, int]]) -> None:
    assert runs_of(slots) == runs
