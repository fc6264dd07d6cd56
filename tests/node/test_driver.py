"""The driver's contract: order, durability, what a caller hears, and what stops the node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mesh.core import Effect, Emit, Persist, Send
from mesh.errors import CapacityError
from node import driver
from node.driver import Alarm, Driver


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Core:
    """Answers each message with what it names; ticks once at its deadline."""

    def __init__(self) -> None:
        self.deadline: float | None = None
        self.seen: list[Any] = []
        self.ticked = asyncio.Event()

    def receive(self, message: Any, sender: str, now: float) -> list[Effect]:
        self.seen.append((message, sender, now))
        return [Emit(message)]

    def tick(self, now: float) -> list[Effect]:
        self.deadline = None
        self.seen.append(("tick", now))
        self.ticked.set()
        return [Emit("tick")]

    def do(self, now: float, effects: list[Effect]) -> list[Effect]:
        return effects


class World:
    """Writes down what happens, in order; a ``Persist`` waits for ``disk``."""

    def __init__(self) -> None:
        self.core, self.clock = Core(), Clock()
        self.log: list[Any] = []
        self.disk = asyncio.Event()
        self.disk.set()
        self.broken: Exception | None = None
        self.driver = Driver(
            self.core,
            send=lambda to, message: self.log.append((to, message)),
            on_event=self.log.append,
            persist=self._persist,
            clock=self.clock,
        )
        self.task = asyncio.create_task(self.driver.run())

    async def _persist(self, record: Any) -> None:
        self.log.append(("begun", record))
        await self.disk.wait()
        if self.broken:
            raise self.broken
        self.log.append(("durable", record))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    made.task.cancel()
    await asyncio.gather(made.task, return_exceptions=True)


async def test_effects_are_performed_in_order_each_durable_before_the_next(world: World) -> None:
    world.disk.clear()
    effects = [Send("a", 1), Persist("r"), Send("b", 2), Emit("e")]
    call = asyncio.create_task(world.driver.call(lambda core, now: effects))
    await settle()
    assert world.log == [("a", 1), ("begun", "r")]
    assert not call.done()
    world.driver.receive("later", "peer")
    await settle()
    assert world.core.seen == [], "the next input waits until the record is durable"
    world.disk.set()
    await call
    await settle()
    assert world.log == [("a", 1), ("begun", "r"), ("durable", "r"), ("b", 2), "e", "later"]


async def test_messages_and_verbs_come_in_the_order_of_their_arrival(world: World) -> None:
    world.clock.now = 7.0
    world.driver.receive("one", "peer")
    world.driver.cast(lambda core, now: core.receive("two", "me", now))
    world.driver.receive("three", "peer")
    await settle()
    assert world.core.seen == [("one", "peer", 7.0), ("two", "me", 7.0), ("three", "peer", 7.0)]


async def test_a_full_inbox_drops_messages_and_counts_them_but_never_own_verbs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "INBOX", 3)
    for index in range(5):
        world.driver.receive(index, "peer")
    world.driver.cast(lambda core, now: [Emit("own")])
    await settle()
    assert world.log == [0, 1, 2, "own"]
    assert world.driver.dropped == 2
    world.driver.receive(5, "peer")
    await settle()
    assert world.log[-1] == 5


async def test_a_verbs_refusal_goes_to_its_caller_and_the_driver_goes_on(world: World) -> None:
    def refuse(core: Any, now: float) -> list[Effect]:
        raise CapacityError("full")

    with pytest.raises(CapacityError):
        await world.driver.call(refuse)
    await world.driver.call(lambda core, now: [Emit("next")])
    assert world.log == ["next"]


async def test_an_effect_that_fails_is_no_refusal_and_stops_the_node(world: World) -> None:
    world.broken = OSError("disk full")
    call = asyncio.create_task(world.driver.call(lambda core, now: [Persist("r"), Send("a", "vote")]))
    with pytest.raises(OSError, match="disk full"):
        await asyncio.wait_for(world.task, 5.0)
    assert world.log == [("begun", "r")], "what was to follow the record is not sent"
    assert not call.done()
    call.cancel()


@pytest.mark.parametrize("called", [False, True])
async def test_a_failed_assertion_stops_the_node(world: World, called: bool) -> None:
    def broken(core: Any, now: float) -> list[Effect]:
        raise AssertionError("a bug")

    if called:
        call = asyncio.create_task(world.driver.call(broken))
    else:
        world.driver.cast(broken)
    with pytest.raises(AssertionError, match="a bug"):
        await asyncio.wait_for(world.task, 5.0)
    if called:
        call.cancel()


async def test_an_own_verb_without_a_caller_has_nobody_to_refuse_to(world: World) -> None:
    def refuse(core: Any, now: float) -> list[Effect]:
        raise CapacityError("full")

    world.driver.cast(refuse)
    with pytest.raises(CapacityError):
        await asyncio.wait_for(world.task, 5.0)


@pytest.mark.parametrize("refuses", [False, True])
async def test_a_caller_that_gives_up_does_not_disturb_the_driver(world: World, refuses: bool) -> None:
    def verb(core: Any, now: float) -> list[Effect]:
        if refuses:
            raise CapacityError("full")
        return [Emit("done")]

    world.disk.clear()
    world.driver.cast(lambda core, now: [Persist("r")])
    await settle()
    call = asyncio.create_task(world.driver.call(verb))
    await settle()
    call.cancel()
    await settle()
    world.disk.set()
    await world.driver.call(lambda core, now: [Emit("next")])
    assert world.log[-1] == "next"
    assert ("done" in world.log) is not refuses


async def test_a_core_that_persists_nothing_needs_no_disk() -> None:
    bare = Driver(Core(), send=lambda to, message: None, on_event=lambda event: None)
    bare.cast(lambda core, now: [Persist("r")])
    with pytest.raises(AssertionError, match="nothing to persist"):
        await asyncio.wait_for(bare.run(), 5.0)


async def test_a_deadline_that_is_due_fires(world: World) -> None:
    world.clock.now = 5.0
    world.driver.cast(lambda core, now: setattr(core, "deadline", 5.0) or [])
    await settle()
    assert world.core.seen == [("tick", 5.0)]


async def test_what_has_arrived_is_read_before_a_deadline_fires(world: World) -> None:
    world.core.deadline = 1.0
    world.clock.now = 2.0
    world.driver.receive("ack", "peer")
    await settle()
    assert [entry[0] for entry in world.core.seen] == ["ack", "tick"]


async def test_a_deadline_in_the_future_is_waited_for(world: World) -> None:
    """The loop sleeps on a real timer; the clock says whether the deadline has come."""
    world.driver.cast(lambda core, now: setattr(core, "deadline", 0.01) or [])
    await settle()
    assert world.core.seen == []
    world.clock.now = 1.0
    await asyncio.wait_for(world.core.ticked.wait(), 5.0)
    assert world.core.seen == [("tick", 1.0)]


# -- alarms ------------------------------------------------------------------------------------------------------------


class Bell:
    """An alarm over a core whose deadline the test sets; ``rung`` collects the times."""

    def __init__(self) -> None:
        self.core, self.clock = Core(), Clock()
        self.rung = asyncio.Event()
        self.times: list[float] = []
        self.alarm = Alarm(self.core, self._fire, self.clock)

    def _fire(self) -> None:
        self.times.append(self.clock())
        self.core.deadline = None
        self.rung.set()

    def set(self, deadline: float | None) -> None:
        self.core.deadline = deadline
        self.alarm.update()

    @property
    def armed(self) -> bool:
        return self.alarm._handle is not None


async def test_an_alarm_rings_when_its_deadline_is_due() -> None:
    bell = Bell()
    bell.clock.now = 5.0
    bell.set(5.0)
    await asyncio.wait_for(bell.rung.wait(), 5.0)
    assert (bell.times, bell.armed) == ([5.0], False)


async def test_an_alarm_that_rings_early_looks_again() -> None:
    bell = Bell()
    bell.set(0.0)
    bell.core.deadline = 3.0  # moved later, without a new timer
    await settle()
    assert (bell.times, bell.armed) == ([], True)
    bell.clock.now = 3.0
    bell.set(2.9)
    await asyncio.wait_for(bell.rung.wait(), 5.0)
    assert bell.times == [3.0]


async def test_only_an_earlier_deadline_needs_another_timer() -> None:
    bell = Bell()
    bell.set(100.0)
    first = bell.alarm._handle
    bell.set(200.0)
    assert bell.alarm._handle is first
    bell.set(50.0)
    assert bell.alarm._handle is not first
    assert first is not None
    assert first.cancelled()
    bell.alarm.stop()


async def test_without_a_deadline_there_is_no_timer() -> None:
    bell = Bell()
    bell.set(0.0)
    bell.set(None)
    await settle()
    assert (bell.times, bell.armed) == ([], False)
    bell.set(0.0)
    bell.alarm.stop()
    await settle()
    assert bell.times == []
