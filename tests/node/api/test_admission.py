"""The gate: places, the bounded queue, classes."""

from __future__ import annotations

import asyncio

import pytest

from mesh.errors import CapacityError
from mesh.types import Priority
from node.api.admission import AdmissionGate


class Visitor:
    """Holds a slot until told to go."""

    def __init__(self, gate: AdmissionGate, priority: Priority = "normal", *, sibling: bool = False) -> None:
        self.inside, self.go = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._visit(gate, priority, sibling))

    async def _visit(self, gate: AdmissionGate, priority: Priority, sibling: bool) -> None:
        async with gate.slot(priority, sibling=sibling):
            self.inside.set()
            await self.go.wait()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def visit(gate: AdmissionGate, *priorities: Priority) -> list[Visitor]:
    made = []
    for priority in priorities:
        made.append(Visitor(gate, priority))
        await settle()
    return made


async def leave(*visitors: Visitor) -> None:
    for visitor in visitors:
        visitor.go.set()
    await asyncio.gather(*(v.task for v in visitors), return_exceptions=True)


async def test_places_then_queue_then_refusal() -> None:
    gate = AdmissionGate(2, 1)
    a, b, c = await visit(gate, "normal", "normal", "normal")
    assert (gate.running, gate.waiting) == (2, 1)
    with pytest.raises(CapacityError) as refused:
        async with gate.slot("normal"):
            pass
    assert refused.value.retry_after_s is not None
    assert 1 <= refused.value.retry_after_s <= 30
    await leave(a)
    await settle()
    assert c.inside.is_set()
    assert (gate.running, gate.waiting) == (2, 0)
    await leave(b, c)
    assert gate.running == 0


async def test_higher_classes_go_first_and_each_in_order() -> None:
    gate = AdmissionGate(1, 10)
    order: list[str] = []

    async def enter(name: str, priority: Priority) -> None:
        async with gate.slot(priority):
            order.append(name)

    (holder,) = await visit(gate, "batch")
    names: list[tuple[str, Priority]] = [
        ("b1", "batch"), ("n1", "normal"), ("i1", "interactive"), ("b2", "batch"), ("n2", "normal"),
        ("i2", "interactive"),
    ]  # fmt: skip
    tasks = []
    for name, priority in names:
        tasks.append(asyncio.create_task(enter(name, priority)))
        await settle()
    assert gate.waiting_by_class() == {"interactive": 2, "normal": 2, "batch": 2}
    await leave(holder)
    await asyncio.gather(*tasks)
    assert order == ["i1", "i2", "n1", "n2", "b1", "b2"]
    assert gate.running == 0


async def test_a_higher_class_takes_the_place_of_the_youngest_lower_one() -> None:
    gate = AdmissionGate(1, 2)
    holder, first, second = await visit(gate, "normal", "batch", "batch")
    (urgent,) = await visit(gate, "interactive")
    assert isinstance(second.task.exception(), CapacityError)
    assert gate.waiting_by_class() == {"interactive": 1, "normal": 0, "batch": 1}
    with pytest.raises(CapacityError):
        async with gate.slot("batch"):
            pass
    await leave(holder, urgent, first)
    assert gate.running == 0


async def test_siblings_neither_fill_the_queue_nor_can_be_displaced() -> None:
    gate = AdmissionGate(1, 1)
    (holder,) = await visit(gate, "batch")
    siblings = [Visitor(gate, "batch", sibling=True) for _ in range(3)]
    await settle()
    (waiter,) = await visit(gate, "normal")
    (urgent,) = await visit(gate, "interactive")
    assert isinstance(waiter.task.exception(), CapacityError)
    assert gate.waiting == 4
    await leave(holder, urgent, *siblings)
    assert gate.running == 0


async def test_a_waiter_that_gives_up_leaves_no_trace() -> None:
    gate = AdmissionGate(1, 5)
    holder, quitter, last = await visit(gate, "normal", "normal", "normal")
    quitter.task.cancel()
    await settle()
    assert gate.waiting == 1
    await leave(holder)
    await settle()
    assert last.inside.is_set()
    await leave(last)
    assert gate.running == 0


async def test_a_waiter_cancelled_in_the_moment_of_its_turn_passes_it_on() -> None:
    gate = AdmissionGate(1, 5)
    holder, quitter, last = await visit(gate, "normal", "normal", "normal")
    holder.go.set()
    while gate.waiting == 2:  # noqa: ASYNC110 - the very next turn of the loop matters here
        await asyncio.sleep(0)
    quitter.task.cancel()
    await settle()
    assert not quitter.inside.is_set()
    assert last.inside.is_set()
    await leave(last)
    assert gate.running == 0


async def test_a_class_has_its_own_limit_in_the_queue() -> None:
    gate = AdmissionGate(1, 10, {"batch": 1})
    holder, first = await visit(gate, "normal", "batch")
    with pytest.raises(CapacityError, match="1 waiting places of class batch"):
        async with gate.slot("batch"):
            pass
    (other,) = await visit(gate, "normal")
    assert gate.waiting_by_class() == {"interactive": 0, "normal": 1, "batch": 1}
    await leave(holder, other, first)


async def test_a_class_without_room_in_the_mesh_runs_no_more_than_it_does() -> None:
    gate = AdmissionGate(8, 10)
    one, two = await visit(gate, "interactive", "normal")
    async with gate.slot("normal") as refused:
        gate.no_room("normal")
        refused.in_vain = True
    assert gate.limits() == {"interactive": 8, "normal": 2, "batch": 2}
    (waiter,) = await visit(gate, "batch")
    (urgent,) = await visit(gate, "interactive")
    assert (waiter.inside.is_set(), urgent.inside.is_set()) == (False, True)
    await leave(one, two)
    await settle()
    assert waiter.inside.is_set(), "each end gives a place back"
    await leave(urgent, waiter)
    assert gate.running == 0


async def test_what_was_refused_room_gives_no_place_back() -> None:
    gate = AdmissionGate(8, 10)
    (one,) = await visit(gate, "normal")
    async with gate.slot("normal") as slot:
        gate.no_room("normal")
        slot.in_vain = True
    assert gate.limits()["normal"] == 1
    await leave(one)
    assert gate.limits()["normal"] == 2


async def test_nobody_starts_before_those_of_its_class_that_are_paused() -> None:
    gate = AdmissionGate(8, 10)
    gate.hold("normal")
    batch, normal, urgent = await visit(gate, "batch", "normal", "interactive")
    assert [each.inside.is_set() for each in (batch, normal, urgent)] == [False, False, True]
    gate.hold("batch")
    await settle()
    assert (batch.inside.is_set(), normal.inside.is_set()) == (False, True)
    gate.hold(None)
    await settle()
    assert batch.inside.is_set()
    await leave(batch, normal, urgent)
    assert gate.running == 0
