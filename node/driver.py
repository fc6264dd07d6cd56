"""Runs one protocol core on the real clock and performs its effects, in order, each durable before the next.

The only place where ``mesh.core``'s contract meets sockets, disk and time; proved by eye, the rest by simulation.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from mesh.core import Effect, Emit, Persist, Send
from mesh.types import NodeId

Verb = Callable[[Any, float], list[Effect]]

INBOX = 4096
"""Messages that wait for a core; more are dropped, as the network may drop them."""


class Driver:
    """One core, one task.  ``send`` never blocks; ``persist`` returns when the record is durable."""

    def __init__(
        self,
        core: Any,
        *,
        send: Callable[[NodeId, Any], None],
        on_event: Callable[[Any], None],
        persist: Callable[[Any], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.core = core
        self.dropped = 0
        self._send, self._persist, self._on_event, self._clock = send, persist, on_event, clock
        self._inbox: deque[tuple[Verb, asyncio.Future[None] | None]] = deque()
        self._wake = asyncio.Event()

    def receive(self, message: Any, sender: NodeId) -> None:
        """Queue a message of an authenticated peer."""
        if len(self._inbox) >= INBOX:
            self.dropped += 1
            return
        self._put(lambda core, now: core.receive(message, sender, now), None)

    def cast(self, verb: Verb) -> None:
        """Queue ``verb(core, now)``; own verbs are never dropped."""
        self._put(verb, None)

    async def call(self, verb: Verb) -> None:
        """Run ``verb(core, now)`` and wait until its effects are performed; what the verb raises is raised here."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put(verb, done)
        await done

    def _put(self, verb: Verb, done: asyncio.Future[None] | None) -> None:
        self._inbox.append((verb, done))
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled.  What has arrived is read before any deadline fires (the wake guard)."""
        while True:
            while self._inbox:
                await self._one(*self._inbox.popleft())
            deadline = self.core.deadline
            if deadline is not None and deadline <= self._clock():
                await self._perform(self.core.tick(self._clock()))
            else:
                await self._sleep(deadline)

    async def _sleep(self, deadline: float | None) -> None:
        self._wake.clear()
        if self._inbox:
            return
        timeout = None if deadline is None else max(0.0, deadline - self._clock())
        try:
            async with asyncio.timeout(timeout):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _one(self, verb: Verb, done: asyncio.Future[None] | None) -> None:
        try:
            effects = verb(self.core, self._clock())
        except Exception as error:
            if done is None or isinstance(error, AssertionError):
                raise
            if not done.cancelled():
                done.set_exception(error)
            return
        # An effect that fails is no refusal: the core believes it done, so this node must stop (contract, 2).
        await self._perform(effects)
        if done is not None and not done.cancelled():
            done.set_result(None)

    async def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._send(effect.to, effect.message)
            elif isinstance(effect, Persist):
                assert self._persist is not None, "this core has nothing to persist"
                await self._persist(effect.record)
            else:
                assert isinstance(effect, Emit), effect
                self._on_event(effect.event)


class Alarm:
    """Calls ``fire`` when a core's deadline is due; for cores whose effects need no waiting."""

    def __init__(self, core: Any, fire: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._core, self._fire, self._clock = core, fire, clock
        self._handle: asyncio.TimerHandle | None = None
        self._due = 0.0

    def update(self) -> None:
        """Look at the core's deadline again: after every step of the core."""
        due = self._core.deadline
        if due is None:
            self.stop()
        elif self._handle is None or due < self._due:
            self.stop()
            self._due = due
            self._handle = asyncio.get_running_loop().call_later(max(0.0, due - self._clock()), self._ring)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _ring(self) -> None:
        """Deadlines move later with almost every message: an alarm that rings early just looks again."""
        self._handle = None
        due = self._core.deadline
        if due is not None and due <= self._clock():
            self._fire()
        self.update()
