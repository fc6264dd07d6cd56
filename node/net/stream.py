"""One lane to one peer: a bounded queue, a socket dialled when there is something to send, credit for tensors.

Two lanes make a link, each with its own socket: a heartbeat or a token must not stand behind megabytes of activations,
neither in our queue nor in the kernel's.  Frames of one lane keep their order; between lanes none is promised.

The lane ends a silence of ``IDLE_S`` by closing its socket.  A socket that breaks is dialled again at once; when that
fails the peer is lost, what waited is dropped (senders resend what matters), and the next frame dials after a backoff.
"""

from __future__ import annotations

import asyncio
import enum
import random
import time
from collections import deque
from collections.abc import Awaitable
from typing import NamedTuple, Protocol

import aiohttp

from mesh.errors import PeerUnreachable
from node.net.frames import BATCH_BYTES, CREDIT, CREDIT_BYTES, Lane

IDLE_S = 60.0
WRITE_S = 5.0
SLOWEST_BYTES_PER_S = 125_000
"""1 Mbit/s: a write that is slower than this, after ``WRITE_S``, is a peer that does not read."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.05, 2.0
CLOSE_S = 0.5

MAX_QUEUED_FRAMES = 4096
MAX_QUEUED_BYTES: dict[Lane, int] = {"control": 16 * 2**20, "tensor": 64 * 2**20}


class Pending(NamedTuple):
    """An encoded frame that waits."""

    data: bytes
    body: int
    """Bytes of it that need credit."""
    droppable: bool


class LaneOwner(Protocol):
    """What a lane tells the link that owns it."""

    async def dial(self, lane: Lane) -> aiohttp.ClientWebSocketResponse:
        """A connected socket.  Raises ``PeerUnreachable``."""
        ...

    def lane_up(self, *, mended: bool) -> None: ...

    def lane_lost(self) -> None: ...

    def lane_unreachable(self, error: PeerUnreachable) -> None: ...


class _End(enum.Enum):
    IDLE = "nothing to send for a while"
    RESET = "the socket broke, or the peer does not read"


class OutLane:
    """``offer`` frames from the event loop; ``run`` in a task moves them until it is cancelled."""

    def __init__(self, lane: Lane, owner: LaneOwner, rng: random.Random) -> None:
        self.lane, self._owner, self._rng = lane, owner, rng
        self._queue: deque[Pending] = deque()
        self._queued_bytes = 0
        self._credit = 0
        self._failures = 0
        self.connected = False
        self._wake = asyncio.Event()
        self.flushed = asyncio.Event()
        """Set while nothing waits and nothing is being written."""
        self.flushed.set()
        self.dropped = 0
        """Frames that were refused, pushed out or lost with their peer."""

    def offer(self, frame: Pending) -> bool:
        """Queue a frame.  False when the queue is full, after the oldest droppable frames made what room they could."""
        while self._full(frame) and self._drop_one():
            pass
        if self._full(frame):
            self.dropped += 1
            return False
        self._queue.append(frame)
        self._queued_bytes += len(frame.data)
        self.flushed.clear()
        self._wake.set()
        return True

    async def run(self) -> None:
        while True:
            await self._frames_wait()
            socket = await self._try_dial(first=True)
            while socket is not None:
                started = time.monotonic()
                if await self._pump(socket) is _End.IDLE:
                    break
                self._failures = 1 if time.monotonic() - started > MAX_BACKOFF_S else self._failures + 1
                socket = await self._try_dial(first=False)

    async def _frames_wait(self) -> None:
        while not self._queue:
            self._wake.clear()
            await self._wake.wait()

    async def _try_dial(self, *, first: bool) -> aiohttp.ClientWebSocketResponse | None:
        """A socket; or ``None`` when there is none, after the owner was told and what waited was dropped."""
        # The dial right after a break is immediate: it decides whether the peer is lost.
        if self._failures > (0 if first else 1):
            await asyncio.sleep(self._backoff())
        try:
            socket = await self._owner.dial(self.lane)
        except PeerUnreachable as error:
            self._failures += 1
            self._forget()
            if first:
                self._owner.lane_unreachable(error)
            else:
                self._owner.lane_lost()
            return None
        if first:
            self._failures = 0
        self._owner.lane_up(mended=not first)
        return socket

    async def _pump(self, socket: aiohttp.ClientWebSocketResponse) -> _End:
        """Send what waits, as credit allows, until the socket breaks or nothing was sent for ``IDLE_S``."""
        self._credit = CREDIT_BYTES
        self.connected = True
        reader = asyncio.create_task(self._read_credit(socket))
        reader.add_done_callback(lambda _: self._wake.set())
        try:
            while not reader.done():
                batch = self._take()
                if batch:
                    await self._write(socket, batch)
                elif not await self._woken():
                    # Frames that waited a minute for credit: the peer's consumer is stuck.
                    return _End.RESET if self._queue else _End.IDLE
            return _End.RESET
        except (aiohttp.ClientError, OSError, TimeoutError):
            return _End.RESET
        finally:
            self.connected = False
            reader.cancel()
            await _close(socket)

    async def _write(self, socket: aiohttp.ClientWebSocketResponse, batch: bytes) -> None:
        async with asyncio.timeout(WRITE_S + len(batch) / SLOWEST_BYTES_PER_S):
            await socket.send_bytes(batch)

    async def _woken(self) -> bool:
        """False after ``IDLE_S`` in which nothing happened."""
        self._wake.clear()
        if not self._queue:
            self.flushed.set()
        try:
            async with asyncio.timeout(IDLE_S):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    async def _read_credit(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Ends when the socket does, or when the peer says anything but a credit that it may give."""
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.BINARY or len(message.data) != CREDIT.size:
                return
            (granted,) = CREDIT.unpack(message.data)
            if granted > CREDIT_BYTES - self._credit:
                return
            self._credit += granted
            self._wake.set()

    def _take(self) -> bytes:
        """Frames that may go now, joined; empty when none waits or the first lacks credit."""
        batch: list[bytes] = []
        size = 0
        while self._queue and self._queue[0].body <= self._credit:
            if batch and size + len(self._queue[0].data) > BATCH_BYTES:
                break
            frame = self._pop(0)
            self._credit -= frame.body
            size += len(frame.data)
            batch.append(frame.data)
        return batch[0] if len(batch) == 1 else b"".join(batch)

    def _full(self, frame: Pending) -> bool:
        limit = MAX_QUEUED_BYTES[self.lane]
        return len(self._queue) >= MAX_QUEUED_FRAMES or self._queued_bytes + len(frame.data) > limit

    def _drop_one(self) -> bool:
        oldest = next((i for i, frame in enumerate(self._queue) if frame.droppable), None)
        if oldest is None:
            return False
        self._pop(oldest)
        self.dropped += 1
        return True

    def _pop(self, index: int) -> Pending:
        frame = self._queue[index]
        del self._queue[index]
        self._queued_bytes -= len(frame.data)
        return frame

    def _forget(self) -> None:
        self.dropped += len(self._queue)
        self._queue.clear()
        self._queued_bytes = 0
        self.flushed.set()

    def _backoff(self) -> float:
        """Seconds: 50 ms x 2^k up to 2 s, half of it by chance so that a mesh does not dial in step."""
        longest = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(self._failures - 1, 16))
        return longest * (0.5 + 0.5 * self._rng.random())


async def bounded(awaitable: Awaitable[object], seconds: float) -> None:
    """Wait for ``awaitable`` at most so long, and do not care how it ends: for closing what is already given up."""
    try:
        async with asyncio.timeout(seconds):
            await awaitable
    except (aiohttp.ClientError, OSError, TimeoutError):
        return


async def _close(socket: aiohttp.ClientWebSocketResponse) -> None:
    await bounded(socket.close(), CLOSE_S)
