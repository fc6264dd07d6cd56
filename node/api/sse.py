"""Server-sent events: the bytes, the headers, the comments that keep a silent stream alive."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = b"[DONE]"
_encode = msgspec.json.Encoder().encode


class EventStream:
    """One response.  ``write`` waits while the client's buffers are full."""

    def __init__(self, keepalive_s: float) -> None:
        self._response = web.StreamResponse(headers=HEADERS)
        self._keepalive_s = keepalive_s
        self._comment_at = 0.0
        self.started = False
        self.last_id = ""

    async def start(self, request: web.Request) -> None:
        await self._response.prepare(request)
        self.started = True
        self._put_off()

    async def send(self, events: list[tuple[str, dict[str, Any]]]) -> None:
        """(id, data) each, in one write."""
        if events:
            self.last_id = events[-1][0]
            await self._write(b"".join(event(id_, _encode(data)) for id_, data in events))

    async def finish(self) -> web.StreamResponse:
        await self._write(event(self.last_id, DONE))
        await self._response.write_eof()
        return self._response

    @property
    def silence_s(self) -> float:
        """How long until a comment is due."""
        return max(0.0, self._comment_at - asyncio.get_running_loop().time())

    async def comment_if_due(self) -> None:
        if not self.silence_s:
            await self._write(b": waiting\n\n")

    async def _write(self, data: bytes) -> None:
        await self._response.write(data)
        self._put_off()

    def _put_off(self) -> None:
        self._comment_at = asyncio.get_running_loop().time() + self._keepalive_s


def event(id_: str, data: bytes) -> bytes:
    """One event; JSON has no raw line breaks, so one data line is enough."""
    head = b"id: " + id_.encode() + b"\n" if id_ else b""
    return head + b"data: " + data + b"\n\n"
