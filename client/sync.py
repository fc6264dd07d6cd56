"""The synchronous client: the asynchronous one on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

from client.aio import AsyncMeshClient, Message
from client.stream import Stream
from client.values import Answer, Piece, Progress

T = TypeVar("T")


class MeshClient:
    """Like ``AsyncMeshClient`` (which says what the settings mean), for code without an event loop.

    Safe to use from many threads at once.
    """

    def __init__(self, urls: Sequence[str] | str, api_key: str | None = None, **settings: Any) -> None:
        self._client = AsyncMeshClient(urls, api_key, **settings)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> MeshClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @overload
    def chat(
        self, messages: Sequence[Message], *, model: str | None = None, stream: Literal[False] = False, **params: Any
    ) -> Answer: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, model: str | None = None, stream: Literal[True], **params: Any
    ) -> SyncStream: ...
    def chat(
        self, messages: Sequence[Message], *, model: str | None = None, stream: bool = False, **params: Any
    ) -> Answer | SyncStream:
        """An answer to ``messages``, or with ``stream=True`` an iterator of its pieces."""
        if stream:
            return SyncStream(self, self._client.chat(messages, model=model, stream=True, **params))
        answer: Answer = self.run(self._client.chat(messages, model=model, **params))
        return answer

    @overload
    def complete(
        self, prompt: Any, *, model: str | None = None, stream: Literal[False] = False, **params: Any
    ) -> Answer: ...
    @overload
    def complete(
        self, prompt: Any, *, model: str | None = None, stream: Literal[True], **params: Any
    ) -> SyncStream: ...
    def complete(
        self, prompt: Any, *, model: str | None = None, stream: bool = False, **params: Any
    ) -> Answer | SyncStream:
        """A continuation of ``prompt``, or with ``stream=True`` an iterator of its pieces."""
        if stream:
            return SyncStream(self, self._client.complete(prompt, model=model, stream=True, **params))
        answer: Answer = self.run(self._client.complete(prompt, model=model, **params))
        return answer

    def models(self) -> list[str]:
        return self.run(self._client.models())

    def status(self) -> dict[str, Any]:
        return self.run(self._client.status())

    def cancel(self, session: str) -> bool:
        return self.run(self._client.cancel(session))

    def close(self) -> None:
        """Close all connections and end the thread.  Harmless when repeated."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._client.aclose(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """``work`` on the client's loop; a Ctrl-C here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(work, self._running_loop())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="mesh-client", daemon=True)
                self._thread.start()
            return self._loop


class SyncStream:
    """An iterator of ``Piece``.  Leave it early only through ``with`` or ``close``: the mesh then stops at once."""

    def __init__(self, client: MeshClient, stream: Stream) -> None:
        self._client, self._stream = client, stream

    @property
    def progress(self) -> Progress:
        return self._stream.progress

    def __iter__(self) -> SyncStream:
        return self

    def __next__(self) -> Piece:
        piece = self._client.run(self._next())
        if piece is None:
            raise StopIteration
        return piece

    async def _next(self) -> Piece | None:
        return await anext(self._stream, None)

    def __enter__(self) -> SyncStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._client.run(self._stream.aclose())
