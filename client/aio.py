"""The asynchronous client; the synchronous one runs it on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import ssl
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import aiohttp

from client.errors import ApiError, ClientError, NoNodeReachable, api_error
from client.nodes import Nodes
from client.stream import TRANSPORT, Stream
from client.values import Answer, Progress, answer_of

Message = Mapping[str, Any]
PASSING = frozenset({429, 502, 503, 504})
"""Statuses that another node, or the same a little later, may not answer with."""
BACKOFF_S = 0.05
BACKOFF_MAX_S = 2.0
LEARN_EVERY_S = 15.0
ABANDON_S = 2.0


class Rounds:
    """One request's attempts: every node once, then again after a growing pause, until patience ends."""

    def __init__(self, patience_s: float, rng: random.Random) -> None:
        self._deadline, self._rng = time.monotonic() + patience_s, rng
        self._round, self._wait_s = 0, 0.0
        self.tried: set[str] = set()
        self.failures: dict[str, str] = {}
        self.refusal: ApiError | None = None

    def note(self, url: str, why: str, refusal: ApiError | None = None) -> None:
        """``url`` did not take it."""
        self.tried.add(url)
        self.failures[url] = why
        if refusal is not None:
            self.refusal = refusal
            self._wait_s = max(self._wait_s, refusal.retry_after_s or 0.0)

    async def next_round(self) -> None:
        """Pause, then all nodes may be tried again.  Raises what happened once patience is at its end."""
        pause = min(BACKOFF_MAX_S, BACKOFF_S * 2.0**self._round) * self._rng.uniform(0.5, 1.0)
        pause = max(pause, self._wait_s)
        if time.monotonic() + pause > self._deadline:
            raise self.refusal or NoNodeReachable(self.failures)
        await asyncio.sleep(pause)
        self._round, self._wait_s = self._round + 1, 0.0
        self.tried.clear()


class AsyncMeshClient:
    """Asks a mesh through any of its nodes.

    ``urls``: one live node is enough, the others are learned from it.  ``patience_s``: how long to go on trying
    nodes before the first token.  ``silence_s``: without a byte for this long a node counts as gone (a live stream
    sends at least a comment every 10 s).  ``ca``: a PEM file to trust instead of the system's authorities.
    """

    def __init__(
        self,
        urls: Sequence[str] | str,
        api_key: str | None = None,
        *,
        patience_s: float = 30.0,
        connect_s: float = 3.0,
        silence_s: float = 30.0,
        ca: str | Path | None = None,
        learn: bool = True,
        rng: random.Random | None = None,
    ) -> None:
        self._rng = rng or random.Random()
        self.nodes = Nodes([urls] if isinstance(urls, str) else urls, self._rng)
        self._key, self._patience_s, self._learns = api_key, patience_s, learn
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=silence_s)
        self._tls = _trusting(ca) if ca is not None else None
        self._session: aiohttp.ClientSession | None = None
        self._learner: asyncio.Task[None] | None = None
        self._learned_at = float("-inf")
        self._ending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> AsyncMeshClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        if self._learner is not None:
            self._learner.cancel()
            await asyncio.gather(self._learner, return_exceptions=True)
        await asyncio.gather(*self._ending)
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- what one can ask --------------------------------------------------------------------------------------
    @overload
    def chat(
        self, messages: Sequence[Message], *, model: str | None = None, stream: Literal[False] = False, **params: Any
    ) -> Coroutine[Any, Any, Answer]: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, model: str | None = None, stream: Literal[True], **params: Any
    ) -> Stream: ...
    def chat(
        self, messages: Sequence[Message], *, model: str | None = None, stream: bool = False, **params: Any
    ) -> Coroutine[Any, Any, Answer] | Stream:
        """An answer to ``messages``: awaitable, or with ``stream=True`` an async iterator of pieces.

        ``params`` go into the request as they are: temperature, max_tokens, seed, stop, tools, mesh ...
        """
        return self._ask("/v1/chat/completions", {"messages": list(messages), **params}, model, stream)

    @overload
    def complete(
        self, prompt: Any, *, model: str | None = None, stream: Literal[False] = False, **params: Any
    ) -> Coroutine[Any, Any, Answer]: ...
    @overload
    def complete(self, prompt: Any, *, model: str | None = None, stream: Literal[True], **params: Any) -> Stream: ...
    def complete(
        self, prompt: Any, *, model: str | None = None, stream: bool = False, **params: Any
    ) -> Coroutine[Any, Any, Answer] | Stream:
        """A continuation of ``prompt`` (text, token ids, or a list of either)."""
        return self._ask("/v1/completions", {"prompt": prompt, **params}, model, stream)

    async def models(self) -> list[str]:
        """Names of the models that the mesh serves."""
        found = await self.get("/v1/models")
        return [str(model["id"]) for model in found["data"]]

    async def status(self) -> dict[str, Any]:
        """The ``/mesh/status`` document of one node."""
        return await self.get("/mesh/status")

    async def cancel(self, session: str) -> bool:
        """End a running session; False: there is none of that id."""
        try:
            await self._request("DELETE", f"/v1/sessions/{session}")
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    def _ask(
        self, path: str, body: dict[str, Any], model: str | None, stream: bool
    ) -> Coroutine[Any, Any, Answer] | Stream:
        """Whole answers are collected from a stream too: it shows that the node lives, and can be gone on with."""
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if model is not None:
            body["model"] = model
        _make_resumable(body)
        running = Stream(self, Progress(path, body, secrets.token_hex(16)))
        return running if stream else _collect(running)

    # -- connections -------------------------------------------------------------------------------------------
    async def get(self, path: str) -> dict[str, Any]:
        """A JSON object from any node."""
        return await self._request("GET", path)

    async def _request(self, method: str, path: str) -> dict[str, Any]:
        rounds = self.rounds()
        while True:
            response, url = await self._attempt(method, path, None, {}, rounds)
            try:
                value = await response.json(content_type=None)
            except TRANSPORT as error:
                self.nodes_failed(url)
                rounds.note(url, f"{type(error).__name__} {error}".strip())
                continue
            finally:
                response.close()
                self.closed(url)
            if not isinstance(value, dict):
                raise ClientError(f"{url}{path}: not a JSON object")
            return value

    def rounds(self) -> Rounds:
        return Rounds(self._patience_s, self._rng)

    async def open(self, progress: Progress, rounds: Rounds) -> tuple[aiohttp.ClientResponse, str]:
        """A node that takes the request, and its response with the stream.  ``closed`` must follow."""
        headers = {"Idempotency-Key": progress.idempotency_key, "X-Mesh-Follows": "1", **_last_event(progress)}
        response, url = await self._attempt("POST", progress.path, progress.resubmitted, headers, rounds)
        progress.session = response.headers.get("x-mesh-session", "")
        progress.route = response.headers.get("x-mesh-route", "")
        self._learn_soon(url)
        return response, url

    async def _attempt(
        self,
        method: str,
        path: str,
        body: object,
        headers: dict[str, str],
        rounds: Rounds,
    ) -> tuple[aiohttp.ClientResponse, str]:
        while True:
            url = self.nodes.pick(time.monotonic(), rounds.tried)
            if url is None:
                await rounds.next_round()
                continue
            response = await self._try(method, url, path, body, headers, rounds)
            if response is not None:
                return response, url

    async def _try(
        self,
        method: str,
        url: str,
        path: str,
        body: object,
        headers: dict[str, str],
        rounds: Rounds,
    ) -> aiohttp.ClientResponse | None:
        """One node, once.  None: try another; ApiError: no other would say otherwise."""
        self.nodes.began(url)
        taken = False
        try:
            response = await self._http().request(
                method, url + path, json=body, headers={**self._headers(), **headers}, allow_redirects=False
            )
            if response.status < 300:
                self.nodes.worked(url)
                taken = True
                return response
            error = await _refusal(response, url)
            if error.status not in PASSING:
                raise error
            rounds.note(url, str(error), error)
        except TRANSPORT as error:
            self.nodes_failed(url)
            rounds.note(url, f"{type(error).__name__} {error}".strip())
        finally:
            if not taken:
                self.nodes.ended(url)
        return None

    async def resume(self, progress: Progress, rounds: Rounds) -> tuple[aiohttp.ClientResponse, str]:
        """The rest of a stream that broke off, from whichever node has it.  ``closed`` must follow."""
        path = f"/v1/sessions/{progress.session}/events"
        response, url = await self._attempt("GET", path, None, _last_event(progress), rounds)
        self._learn_soon(url)
        return response, url

    def abandon(self, progress: Progress) -> None:
        """The caller wants no more of it: end the session, which would wait for its next reader."""
        if self._session is not None:
            task = asyncio.create_task(self._end(progress.session))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _end(self, session: str) -> None:
        with contextlib.suppress(ClientError, TimeoutError, *TRANSPORT):  # without this it ends by itself, later
            async with asyncio.timeout(ABANDON_S):
                await self.cancel(session)

    def closed(self, url: str) -> None:
        """A response that ``open`` gave is done with."""
        self.nodes.ended(url)

    def nodes_failed(self, url: str) -> None:
        self.nodes.failed(url, time.monotonic())
        self._learned_at = float("-inf")

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No limit on connections: each stream needs its own, and a queue in here would hide a full mesh.
            connector = aiohttp.TCPConnector(limit=0, ssl=self._tls if self._tls is not None else True)
            self._session = aiohttp.ClientSession(timeout=self._timeout, connector=connector)
        return self._session

    # -- the other nodes ---------------------------------------------------------------------------------------
    def _learn_soon(self, url: str) -> None:
        now = time.monotonic()
        if self._learns and now - self._learned_at > LEARN_EVERY_S and (self._learner is None or self._learner.done()):
            self._learned_at = now
            self._learner = asyncio.create_task(self._learn(url))

    async def _learn(self, url: str) -> None:
        """Ask one node who else there is.  Failing is no harm: what is known stays known."""
        try:
            async with self._http().get(f"{url}/mesh/status", headers=self._headers()) as response:
                status = await response.json(content_type=None) if response.status == 200 else None
        except TRANSPORT:
            return
        members = status.get("members") if isinstance(status, dict) else None
        if isinstance(members, list):
            alive = [m for m in members if isinstance(m, dict) and m.get("state") == "alive"]
            self.nodes.learn([str(m["api"]) for m in alive if m.get("api")], url)


def _make_resumable(body: dict[str, Any]) -> None:
    """Ask for all that it takes to go on after the loss of a whole mesh: the tokens, and a seed that is known here.

    Not for several choices, nor for class ``batch``, which the mesh itself has on disk.
    """
    mesh, prompt = body.get("mesh") or {}, body.get("prompt")
    several = isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt)
    if several or body.get("n") not in (None, 1) or not isinstance(mesh, Mapping) or mesh.get("class") == "batch":
        return
    body["mesh"] = {"return_tokens": True, **mesh}
    if body.get("seed") is None:
        body["seed"] = secrets.randbits(63)


def _last_event(progress: Progress) -> dict[str, str]:
    return {"Last-Event-ID": ",".join(progress.event_ids.values())} if progress.begun else {}


def _trusting(ca: str | Path) -> ssl.SSLContext:
    """TLS that trusts the authorities in ``ca``.  OSError, ValueError: names the file."""
    try:
        return ssl.create_default_context(cafile=str(ca))
    except ssl.SSLError as error:
        raise ValueError(f"{ca}: no certificates in PEM form: {error.reason or error}") from error
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(ca)) from error


async def _collect(stream: Stream) -> Answer:
    async with stream:
        pieces = [piece async for piece in stream]
    return answer_of(pieces, stream.progress)


async def _refusal(response: aiohttp.ClientResponse, url: str) -> ApiError:
    async with response:
        text = await response.text(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    return api_error(response.status, body, response.headers, url)
