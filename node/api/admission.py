"""Who may start now, who waits, and who is told to come back later.

At most ``max_sessions`` generations run at once; the next ones wait, higher classes first and in order of arrival
within a class; at most ``max_queue`` wait.  A newcomer to a full queue takes the place of the youngest waiter of a
lower class, who gets the 429 that the newcomer would have got.  No clock in here: the caller bounds its wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
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


class AdmissionGate:
    """Slots for generations.  ``slot`` is the whole interface for callers."""

    def __init__(self, max_sessions: int, max_queue: int) -> None:
        assert max_sessions >= 1
        assert max_queue >= 0
        self.max_sessions, self.max_queue = max_sessions, max_queue
        self.running = 0
        self._waiters: dict[Priority, deque[_Waiter]] = {p: deque() for p in PRIORITIES}
        self._mean_s = 1.0

    @property
    def waiting(self) -> int:
        return sum(len(queue) for queue in self._waiters.values())

    def waiting_by_class(self) -> dict[Priority, int]:
        return {priority: len(queue) for priority, queue in self._waiters.items()}

    @asynccontextmanager
    async def slot(self, priority: Priority, *, sibling: bool = False) -> AsyncIterator[None]:
        """Hold a slot.  CapacityError when the queue is full too.

        ``sibling``: a further choice of a request that was let in already; it waits without counting against the
        queue, since refusing it would waste what its siblings did.
        """
        await self._enter(priority, sibling)
        started = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            held = asyncio.get_running_loop().time() - started
            self._mean_s += MEAN_WEIGHT * (held - self._mean_s)
            self._leave()

    def retry_after_s(self) -> float:
        """When a refused caller may find room: the queue's length in mean slot times, 1 to 30 seconds."""
        return min(30.0, max(1.0, self._mean_s * (self.waiting + 1) / self.max_sessions))

    async def _enter(self, priority: Priority, sibling: bool) -> None:
        if self.running < self.max_sessions and not self.waiting:
            self.running += 1
            return
        if not sibling and sum(not w.sibling for q in self._waiters.values() for w in q) >= self.max_queue:
            self._displace(priority)
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

    def _displace(self, priority: Priority) -> None:
        """Make room in the full queue at the expense of a lower class, or refuse."""
        for lower in reversed(PRIORITIES[PRIORITIES.index(priority) + 1 :]):
            for waiter in reversed(self._waiters[lower]):
                if not waiter.sibling:
                    self._waiters[lower].remove(waiter)
                    waiter.turn.set_exception(self._full())
                    return
        raise self._full()

    def _full(self) -> CapacityError:
        return CapacityError(
            f"all {self.max_sessions} places and {self.max_queue} waiting places of this node are taken",
            self.retry_after_s(),
        )

    def _leave(self) -> None:
        """Hand the slot to the first waiter of the highest class."""
        for queue in self._waiters.values():
            while queue:
                waiter = queue.popleft()
                if not waiter.turn.done():
                    waiter.turn.set_result(None)
                    return
        self.running -= 1
