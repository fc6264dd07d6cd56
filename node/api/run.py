"""One HTTP request's generations: let in, opened, turned into text, merged into one bounded queue.

Each choice of each prompt is a generation of its own.  Its pump holds a slot, drives it and puts a ``Delta`` per
token into the queue; the handler takes them out, and acknowledges after the client got them.  So a slow client
fills the queue, the pump stops, the acknowledgements stop, and the sampler stops at its run-ahead window.
Leaving the ``async with`` cancels whatever still runs: a client that hangs up frees its pages at once.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType

import msgspec

from mesh.errors import MeshError, RequestError, SessionLost
from node.api.calls import CallPiece, CallReader
from node.api.context import Api
from node.api.opening import let_in
from node.api.service import EndEvent, Event, Generation, GenerationRequest, PromptEvent, Recovery, TokenEvent, Top
from node.api.structured import Structure
from node.text.detokenize import ChoiceText
from node.text.tokenizer import Tokenizer

QUEUED_DELTAS = 64
"""Across all choices.  Full: the pumps wait, which in the end stops the samplers."""
PARALLEL = 16
"""Generations of one HTTP request that run at the same time."""


class Choice(msgspec.Struct, frozen=True):
    """One generation to make.  ``prompt_text`` is what echo shows; ``discard``: of an echo with max_tokens 0, whose
    one drawn token is not shown."""

    index: int
    request: GenerationRequest
    prompt_text: str = ""
    discard: bool = False


class Call(msgspec.Struct, frozen=True):
    """A whole request, checked and ready to run."""

    choices: tuple[Choice, ...]
    prompt_tokens: int
    """Of all prompts; n choices of a prompt count it once."""
    tokenizer: Tokenizer
    structure: Structure = Structure()

    @property
    def first(self) -> GenerationRequest:
        return self.choices[0].request


class Opened(msgspec.Struct, frozen=True):
    choice: int
    route: str


class Delta(msgspec.Struct, frozen=True):
    """What one event brought for one choice."""

    choice: int
    text: str
    """Text to show, often empty."""
    tokens: tuple[TokenEvent, ...]
    """Tokens to report log-probabilities of; only where asked for, and with the text that they became."""
    count: int
    offset: int
    """Tokens and characters of this choice so far: the event's id."""
    finish: str | None = None
    calls: tuple[CallPiece, ...] = ()
    ids: tuple[int, ...] = ()
    """The token, where it was one that came."""
    prompt: tuple[tuple[float | None, Top], ...] | None = None
    """Log-probabilities of the prompt from its second token on, ``None`` if lost with an owner; once, first of all."""


class _State:
    """The text side of one choice."""

    def __init__(self, choice: Choice, call: Call) -> None:
        request = choice.request
        self._choice, self._structure = choice, call.structure
        self._text = ChoiceText(
            call.tokenizer,
            request.prompt,
            stops=request.stop,
            stop_ids=request.sampling.stop_token_ids,
            min_tokens=request.sampling.min_tokens,
        )
        self._calls = CallReader(call.structure.mode, call.structure.names, request.session)
        self._called = False
        self._waiting: list[TokenEvent] = []
        self._prompt: list[tuple[float, Top]] = []
        self._prompt_due = request.prompt_logprobs >= 0
        self._offset = 0
        self._ids: tuple[int, ...] = ()
        self.finish: str | None = None
        self.count = 0

    def push(self, event: Event) -> Delta | None:
        """What to show for ``event``."""
        if isinstance(event, PromptEvent):
            tops = event.tops or ((),) * len(event.logprobs)
            self._prompt += zip(event.logprobs, tops, strict=True)
            return None
        if isinstance(event, EndEvent):
            return self._end(event)
        if self._choice.discard:
            return None
        self.count, self._ids = self.count + 1, (event.token,)
        text = self._text.push(event.token)
        if self._choice.request.sampling.logprobs >= 0:
            self._waiting.append(event)
        if self._text.finish is not None:
            return self._last(text, self._text.finish)
        shown, calls = self._calls.push(text)
        return self._delta(shown, calls, flush=bool(shown))

    def _end(self, event: EndEvent) -> Delta:
        if event.reason == "cancelled":
            raise _cancelled(self.count)
        self._ids = ()
        return self._last(self._text.end(), event.reason)

    def _last(self, text: str, reason: str) -> Delta:
        shown, calls = self._calls.push(text)
        rest, more = self._calls.end()
        # A call of a function that was named ends with "stop", one that the model chose with "tool_calls".
        chosen = (self._called or calls or more) and self._structure.mode != "named" and reason == "stop"
        self.finish = "tool_calls" if chosen else reason
        return self._delta(shown + rest, [*calls, *more], flush=True, finish=self.finish)

    def _delta(self, text: str, calls: list[CallPiece], *, flush: bool, finish: str | None = None) -> Delta:
        self._offset += len(text)
        self._called = self._called or bool(calls)
        tokens: tuple[TokenEvent, ...] = ()
        prompt = None
        if self._prompt_due:
            lost = max(0, len(self._choice.request.prompt) - 1 - len(self._prompt))
            prompt, self._prompt_due = (*self._prompt, *[(None, ())] * lost), False
        if flush:
            tokens, self._waiting = tuple(self._waiting), []
        return Delta(
            self._choice.index, text, tokens, self.count, self._offset, finish, tuple(calls), self._ids, prompt
        )


class Run:
    """The generations of one ``Call``, as an async context manager and iterator of batches of ``Opened | Delta``."""

    def __init__(self, api: Api, call: Call, started: float, attached: dict[int, Generation] | None = None) -> None:
        """``attached``: choices that run already, as their readers."""
        self._api, self._call, self._started = api, call, started
        self._attached = attached or {}
        self._queue: asyncio.Queue[Opened | Delta | BaseException | None] = asyncio.Queue(QUEUED_DELTAS)
        self._parallel = asyncio.Semaphore(PARALLEL)
        self._tasks: list[asyncio.Task[None]] = []
        self._open: dict[int, Generation] = {}
        self._left = len(call.choices)
        self._failed: BaseException | None = None
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.recoveries: list[Recovery] = []

    async def __aenter__(self) -> Run:
        self._tasks = [asyncio.create_task(self._pump(choice)) for choice in self._call.choices]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._api.telemetry.e2e_latency.observe(time.monotonic() - self._started)

    @property
    def finished(self) -> bool:
        return self._left == 0 and self._failed is None and self._queue.empty()

    async def take(self) -> list[Opened | Delta]:
        """What has come since the last call; nothing after a ``wake``.

        The first failure of any choice is raised, after what came before it: the whole request fails.
        """
        if self._failed is not None:
            raise self._failed
        items: list[Opened | Delta] = []
        item = await self._queue.get()
        while True:
            if isinstance(item, BaseException):
                if not items:
                    raise item
                self._failed = item
                break
            if item is not None:
                items.append(item)
                self._left -= isinstance(item, Delta) and item.finish is not None
            if self._queue.empty():
                break
            item = self._queue.get_nowait()
        return items

    def wake(self) -> None:
        """Let ``take`` return, with whatever there is."""
        if self._queue.empty():
            self._queue.put_nowait(None)

    def acknowledge(self, delta: Delta) -> None:
        """The client has ``delta`` and everything before it."""
        generation = self._open.get(delta.choice)
        if generation is not None and delta.count:
            generation.acknowledge(len(self._call.choices[delta.choice].request.prompt) + delta.count - 1)

    async def _pump(self, choice: Choice) -> None:
        request = choice.request
        try:
            if choice.index in self._attached:
                return await self._drive(choice, self._attached[choice.index])
            async with self._parallel:
                async with asyncio.timeout(request.timeout_s) as waiting:
                    async with let_in(self._api, request, sibling=choice.index > 0) as generation:
                        waiting.reschedule(None)
                        self._api.telemetry.queue_time.observe(time.monotonic() - self._started)
                        await self._drive(choice, generation)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this task: the session was cancelled under it, while it was opened say.
            await self._queue.put(_cancelled(0))
        except MeshError as error:
            await self._queue.put(error)
        except TimeoutError:
            await self._queue.put(TimeoutError())
        except Exception as error:  # a bug here must end the request with an error, not leave it waiting for ever
            await self._queue.put(error)

    async def _drive(self, choice: Choice, generation: Generation) -> None:
        self._open[choice.index] = generation
        state, reason = _State(choice, self._call), "disconnected"
        clock = _TokenClock(self._api, self._started)
        try:
            await self._queue.put(Opened(choice.index, generation.route))
            async for event in generation:
                if isinstance(event, TokenEvent):
                    clock.token()
                delta = state.push(event)
                if state.finish is not None:
                    reason = "stop"
                    self._account(choice, generation, state)
                if delta is not None:
                    await self._queue.put(delta)
                if state.finish is not None:
                    return
            raise SessionLost(f"the session ended after {state.count} tokens, and why is not known")
        finally:
            del self._open[choice.index]
            await generation.cancel("stop" if reason == "stop" else "disconnected")

    def _account(self, choice: Choice, generation: Generation, state: _State) -> None:
        assert state.finish is not None
        self.completion_tokens += state.count
        self.recoveries += generation.recoveries
        self.cached_tokens += generation.cached_tokens
        telemetry = self._api.telemetry
        telemetry.prompt_tokens.inc(len(choice.request.prompt))
        telemetry.generation_tokens.inc(max(0, state.count - len(choice.request.resume)))
        telemetry.success.labels(state.finish).inc()


def _cancelled(tokens: int) -> RequestError:
    return RequestError(f"cancelled after {tokens} tokens", code="cancelled", status=409)


class _TokenClock:
    """Time to first token and between tokens."""

    def __init__(self, api: Api, started: float) -> None:
        self._telemetry, self._last, self._first = api.telemetry, started, True

    def token(self) -> None:
        now = time.monotonic()
        metric = self._telemetry.time_to_first_token if self._first else self._telemetry.inter_token_latency
        metric.observe(now - self._last)
        self._last, self._first = now, False
