"""One running request: connect, go on at another node when one is lost, yield pieces, know how far it came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import aiohttp

from client.errors import ApiError, NoNodeReachable, NotFound, StreamFailed, StreamInterrupted
from client.sse import SseParser
from client.values import Piece, Progress, pieces_of

if TYPE_CHECKING:
    from client.aio import AsyncMeshClient, Rounds

TRANSPORT = (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError, ValueError)
"""The connection's or the server's fault; ValueError: what came was no event stream."""
WORTH_ANOTHER_TRY = frozenset({"rate_limit_exceeded", "no_route", "overloaded", "stale_placement"})
"""Error codes of a stream that had not begun: another node, or the same a little later, may take it."""
GOES_ON_ELSEWHERE = "leaving"
"""The code of a stream that its node ends because it leaves: any other node has the rest."""
ASK_AGAIN = frozenset({"session_gone", "peer_unreachable"})
"""All that knew the session were lost while a node passed it on, and it is run again, like one that no node knows; or
not all nodes have said whether they have it."""


class Stream:
    """An async iterator of ``Piece``; ``await`` it to connect first, ``async with`` it to be sure that it is closed."""

    def __init__(self, client: AsyncMeshClient, progress: Progress) -> None:
        self._client, self.progress = client, progress
        self._pieces = self._run()
        self._connected: Piece | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._url = ""
        self._closed = self._complete = False
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
        """Hang up, and tell the mesh to free the session, which would wait for its reader to come back."""
        self._closed = True
        if self._response is not None and not self._complete:
            self._client.abandon(self.progress)
        self._hang_up()
        if not self._reading:  # else the reader, in another task, has just lost its connection and ends by that
            await self._pieces.aclose()

    async def _run(self) -> AsyncGenerator[Piece, None]:
        """Every piece once, over as many connections and nodes as it takes."""
        rounds = self._client.rounds()
        while True:
            try:
                fresh = False
                self._response, self._url = await self._connect_anywhere(rounds)
                async for piece in self._read(self._response):
                    self.progress.note(piece)
                    fresh = self.progress.begun
                    yield piece
                self._complete = True
                return
            except TRANSPORT as error:
                if self._closed:
                    return
                self._client.nodes_failed(self._url)
                if fresh:  # it went on since the last time: patience begins anew
                    rounds = self._client.rounds()
                    self.progress.moves += 1
                rounds.note(self._url, f"{type(error).__name__} {error}".strip())
            except StreamFailed as error:
                if error.code == GOES_ON_ELSEWHERE:
                    self._client.nodes_failed(self._url)
                    self.progress.moves += fresh
                    rounds = self._client.rounds() if fresh else rounds
                elif error.code not in ASK_AGAIN and (self.progress.begun or error.code not in WORTH_ANOTHER_TRY):
                    raise
                rounds.note(self._url, str(error), ApiError(str(error), status=503, code=error.code, url=self._url))
            finally:
                self._hang_up()

    async def _connect_anywhere(self, rounds: Rounds) -> tuple[aiohttp.ClientResponse, str]:
        """A stream from the start (under the same idempotency key), or the rest of one that has begun."""
        if not self.progress.begun:
            return await self._client.open(self.progress, rounds)
        try:
            try:
                return await self._client.resume(self.progress, rounds)
            except NotFound:  # all that knew it are gone: go on after what came, or draw the same tokens again
                return await self._client.open(self.progress, rounds)
        except (ApiError, NoNodeReachable) as error:
            raise StreamInterrupted(
                f"the answer broke off after {sum(map(len, self.progress.texts.values()))} characters, "
                f"and no node goes on with it: {error}",
                progress=self.progress,
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
