"""Server-sent events: the bytes, the headers, the comments that keep a silent stream alive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = b"[DONE]"
_encode = msgspec.json.Encoder().encode


class Silence:
    """Calls ``tick`` when ``put_off`` was not called for ``length_s``.  Putting off costs nothing: one timer in all."""

    def __init__(self, length_s: float, tick: Callable[[], None]) -> None:
        self._loop, self._length_s, self._tick = asyncio.get_running_loop(), length_s, tick
        self.put_off()
        self._timer = self._loop.call_at(self._due_at, self._fire)

    @property
    def due(self) -> bool:
        return self._loop.time() >= self._due_at

    def put_off(self) -> None:
        self._due_at = self._loop.time() + self._length_s

    def stop(self) -> None:
        self._timer.cancel()

    def _fire(self) -> None:
        at = self._due_at
        if self.due:
            self._tick()
            at = self._loop.time() + self._length_s
        self._timer = self._loop.call_at(at, self._fire)


class EventStream:
    """One response.  ``write`` waits while the client's buffers are full."""

    def __init__(self, silence: Silence) -> None:
        self._response = web.StreamResponse(headers=HEADERS)
        self._silence = silence
        self.started = False
        self.last_id = ""

    async def start(self, request: web.Request) -> None:
        await self._response.prepare(request)
        self.started = True
        self._silence.put_off()

    async def send(self, events: list[tuple[str, dict[str, Any]]]) -> None:
        """(id, data) each, in one write; data of a ``type`` is an event of that name."""
        if events:
            self.last_id = events[-1][0]
            await self._write(b"".join(event(id_, _encode(data), data.get("type", "")) for id_, data in events))

    async def finish(self, *, done: bool) -> web.StreamResponse:
        """End the response, after ``[DONE]`` where the form has it."""
        if done:
            await self._write(event(self.last_id, DONE))
        await self._response.write_eof()
        return self._response

    async def comment_if_due(self) -> None:
        if self._silence.due:
            await self._write(b": waiting\n\n")

    async def _write(self, data: bytes) -> None:
        await self._response.write(data)
        self._silence.put_off()


def event(id_: str, data: bytes, name: str = "") -> bytes:
    """One event; JSON has no raw line breaks, so one data line is enough."""
    head = b"id: " + id_.encode() + b"\n" if id_ else b""
    if name:
        head += b"event: " + name.encode() + b"\n"
    return head + b"data: " + data + b"\n\n"
