"""Who may start now, who waits, and who is told to come back later.

At most ``max_sessions`` generations run at once; the next ones wait, higher classes first and in order of arrival
within a class; at most ``max_queue`` wait, of each class at most its own limit.  A newcomer to a full queue takes the
place of the youngest waiter of a lower class, who gets the 429 that the newcomer would have got.

Where the mesh has less room than there are places here (nodes were lost, other entries are busy), places are taken
back: a class that was refused room runs no more than it does, and one more for each generation that ends well.  While
sessions of a class wait for room in the mesh (they are paused), none of that class or a lower one starts.  No clock in
here: the caller bounds its wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from mesh.errors import CapacityError
from mesh.types import PRIORITIES, Priority

MEAN_WEIGHT = 0.2
"""Of the newest sample in the running mean of how long a slot is held."""


class _Waiter:
    """``sibling``: its request is in already, so it neither counts against the queue nor can be displaced."""

    def __init__(self, sibling: bool) -> None:
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sibling = sibling


class Slot:
    """A place that is held."""

    def __init__(self) -> None:
        self.in_vain = False
        """Nothing came of it: its end says nothing of how much room there is."""


class AdmissionGate:
    """Slots for generations.  ``slot`` is the whole interface for callers."""

    def __init__(self, max_sessions: int, max_queue: int, class_queues: Mapping[Priority, int] | None = None) -> None:
        """``class_queues``: how many of a class may wait, where that is less than ``max_queue``."""
        assert max_sessions >= 1
        assert max_queue >= 0
        self.max_sessions, self.max_queue = max_sessions, max_queue
        self.running = 0
        self._class_queues = dict(class_queues or {})
        self._waiters: dict[Priority, deque[_Waiter]] = {p: deque() for p in PRIORITIES}
        self._lost: dict[Priority, int] = dict.fromkeys(PRIORITIES, 0)
        """Places that the mesh has no room for, as a class finds it."""
        self._held: Priority | None = None
        self._mean_s = 1.0

    @property
    def waiting(self) -> int:
        return sum(len(queue) for queue in self._waiters.values())

    def waiting_by_class(self) -> dict[Priority, int]:
        return {priority: len(queue) for priority, queue in self._waiters.items()}

    def limits(self) -> dict[Priority, int]:
        """At how many running generations each class stops starting."""
        return {priority: max(1, self.max_sessions - lost) for priority, lost in self._lost.items()}

    @asynccontextmanager
    async def slot(self, priority: Priority, *, sibling: bool = False) -> AsyncIterator[Slot]:
        """Hold a slot.  CapacityError when the queue is full too.

        ``sibling``: a further choice of a request that was let in already; it waits without counting against the
        queue, since refusing it would waste what its siblings did.
        """
        await self._enter(priority, sibling)
        started, slot = asyncio.get_running_loop().time(), Slot()
        try:
            yield slot
        finally:
            if not slot.in_vain:
                held = asyncio.get_running_loop().time() - started
                self._mean_s += MEAN_WEIGHT * (held - self._mean_s)
                self._lost = {each: max(0, lost - 1) for each, lost in self._lost.items()}
            self._leave()

    def no_room(self, priority: Priority) -> None:
        """The mesh refused a generation that holds a slot: classes up to ``priority`` run no more than do besides."""
        for lower in PRIORITIES[PRIORITIES.index(priority) :]:
            self._lost[lower] = max(self._lost[lower], self.max_sessions - max(1, self.running - 1))

    def hold(self, priority: Priority | None) -> None:
        """Nobody of this class or a lower one starts until ``hold`` says otherwise; ``None``: everybody may."""
        self._held = priority
        self._fill()

    def retry_after_s(self) -> float:
        """When a refused caller may find room: the queue's length in mean slot times, 1 to 30 seconds."""
        return min(30.0, max(1.0, self._mean_s * (self.waiting + 1) / self.max_sessions))

    def _may_start(self, priority: Priority) -> bool:
        rank = PRIORITIES.index(priority)
        if self._held is not None and rank >= PRIORITIES.index(self._held):
            return False
        return self.running < max(1, self.max_sessions - self._lost[priority])

    async def _enter(self, priority: Priority, sibling: bool) -> None:
        ahead = any(self._waiters[each] for each in PRIORITIES[: PRIORITIES.index(priority) + 1])
        if self._may_start(priority) and not ahead:
            self.running += 1
            return
        if not sibling:
            self._find_place(priority)
        waiter = _Waiter(sibling)
        self._waiters[priority].append(waiter)
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter in self._waiters[priority]:
                self._waiters[priority].remove(waiter)
            elif not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._leave()  # the slot was handed over in the moment of the cancellation: pass it on
            raise

    def _find_place(self, priority: Priority) -> None:
        """A place in the queue, at the expense of a lower class where it is full, or a refusal."""
        limit = self._class_queues.get(priority, self.max_queue)
        if sum(not waiter.sibling for waiter in self._waiters[priority]) >= limit:
            raise self._full(f"{limit} waiting places of class {priority}")
        if sum(not waiter.sibling for queue in self._waiters.values() for waiter in queue) >= self.max_queue:
            self._displace(priority)

    def _displace(self, priority: Priority) -> None:
        for lower in reversed(PRIORITIES[PRIORITIES.index(priority) + 1 :]):
            for waiter in reversed(self._waiters[lower]):
                if not waiter.sibling:
                    self._waiters[lower].remove(waiter)
                    waiter.turn.set_exception(self._full(f"{self.max_queue} waiting places"))
                    return
        raise self._full(f"{self.max_queue} waiting places")

    def _full(self, places: str) -> CapacityError:
        return CapacityError(
            f"all {self.max_sessions} places and {places} of this node are taken", self.retry_after_s()
        )

    def _leave(self) -> None:
        self.running -= 1
        self._fill()

    def _fill(self) -> None:
        """Free slots go to the first waiters of the highest class that may start."""
        for priority, queue in self._waiters.items():
            while queue and self._may_start(priority):
                waiter = queue.popleft()
                if not waiter.turn.done():
                    self.running += 1
                    waiter.turn.set_result(None)
