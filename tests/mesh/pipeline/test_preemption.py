"""Who is parked for whom: lower classes only, the lowest and youngest first, and nobody in vain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mesh.pipeline.preemption import victims
from mesh.types import Priority


def holders(*sessions: tuple[str, Priority, int]) -> dict[str, Any]:
    return {
        name: SimpleNamespace(open=SimpleNamespace(priority=priority), room=room) for name, priority, room in sessions
    }


MIXED = holders(("n", "normal", 4), ("b1", "batch", 4), ("i", "interactive", 4), ("b2", "batch", 4), ("p", "batch", 0))


@pytest.mark.parametrize(
    ("priority", "lacking", "chosen"),
    [
        ("interactive", 1, ["b2"]),
        ("interactive", 4, ["b2"]),
        ("interactive", 5, ["b2", "b1"]),
        ("interactive", 12, ["b2", "b1", "n"]),
        ("interactive", 13, []),
        ("normal", 8, ["b2", "b1"]),
        ("normal", 9, []),
        ("batch", 1, []),
    ],
)
def test_the_lowest_class_gives_way_and_in_it_the_youngest(priority: Priority, lacking: int, chosen: list[str]) -> None:
    assert victims(MIXED, priority, lacking) == chosen
