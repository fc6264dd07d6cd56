"""One running request: connect, fail over before the first token, yield pieces, know how far it came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import aiohttp

from client.errors import ApiError, StreamFailed, StreamInterrupted
from client.sse import SseParser
from client.values import Piece, Progress, pieces_of

if TYPE_CHECKING:
    from client.aio import AsyncMeshClient

TRANSPORT = (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError, ValueError)
"""The connection's or the server's fault; ValueError: what came was no event stream."""
WORTH_ANOTHER_TRY = frozenset({"rate_limit_exceeded", "no_route", "overloaded", "stale_placement"})
"""Error codes of a stream that had not begun: another node, or the same a little later, may take it."""


class Stream:
    """An async iterator of ``Piece``; ``await`` it to connect first, ``async with`` it to be sure that it is closed."""

    def __init__(self, client: AsyncMeshClient, progress: Progress) -> None:
        self._client, self.progress = client, progress
        self._pieces = self._run()
        self._connected: Piece | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._url = ""
        self._closed = False
        self._reading = False

    def __await__(self) -> Generator[Any, None, Stream]:
        return self._connect().__await__()

    async def _connect(self) -> Stream:
        if self._connected is None:
            self._connected = await self._next()
        return self

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Piece:
        if self._connected is not None:
            piece, self._connected = self._connected, None
            return piece
        found = await self._next()
        if found is None:
            raise StopAsyncIteration
        return found

    async def _next(self) -> Piece | None:
        self._reading = True
        try:
            return await anext(self._pieces, None)
        finally:
            self._reading = False

    async def __aenter__(self) -> Stream:
        return await self._connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hang up: the mesh frees the session at once."""
        self._closed = True
        self._hang_up()
        if not self._reading:  # else the reader, in another task, has just lost its connection and ends by that
            await self._pieces.aclose()

    async def _run(self) -> AsyncGenerator[Piece, None]:
        """Every piece once, over as many connections as it takes until the first text."""
        rounds = self._client.rounds()
        while True:
            try:
                self._response, self._url = await self._client.open(self.progress, rounds)
                async for piece in self._read(self._response):
                    self.progress.note(piece)
                    yield piece
                return
            except TRANSPORT as error:
                if self._closed:
                    return
                self._client.nodes_failed(self._url)
                if self.progress.begun:
                    self._go_on_elsewhere(error)
                rounds.note(self._url, f"{type(error).__name__} {error}".strip())
            except StreamFailed as error:
                if self.progress.begun or error.code not in WORTH_ANOTHER_TRY:
                    raise
                rounds.note(self._url, str(error), ApiError(str(error), status=503, code=error.code, url=self._url))
            finally:
                self._hang_up()

    def _go_on_elsewhere(self, error: Exception) -> None:
        """The seam for resuming at another node by session and event ids, which ``progress`` has."""
        raise StreamInterrupted(
            f"{self._url} broke off in the middle of the answer ({type(error).__name__})", progress=self.progress
        ) from error

    async def _read(self, response: aiohttp.ClientResponse) -> AsyncIterator[Piece]:
        parser = SseParser()
        async for data in response.content.iter_any():
            for event in parser.feed(data):
                if event.data == "[DONE]":
                    return
                chunk = json.loads(event.data)
                if not isinstance(chunk, dict):
                    raise ValueError("an event of the stream is no object")
                self._check(chunk)
                for piece in pieces_of(chunk, event.id, self.progress):
                    yield piece
        raise aiohttp.ServerDisconnectedError("the stream ended without [DONE]")

    def _check(self, chunk: dict[str, Any]) -> None:
        error = chunk.get("error")
        if isinstance(error, dict):
            raise StreamFailed(str(error.get("message")), code=error.get("code"), progress=self.progress)
        self.progress.model = chunk.get("model") or self.progress.model

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.release()
            self._client.closed(self._url)
            self._response = None
