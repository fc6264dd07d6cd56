"""Responses as OpenAI shapes them, streamed and whole, of a chat and of a completion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from node.api import logprobs
from node.api.calls import joined_calls
from node.api.run import Call, Delta, Run
from node.api.service import Recovery


class Render(Protocol):
    """One request's shapes.  Deltas of a choice must come in order: completions count text offsets."""

    done: bool
    """Whether the stream ends with ``[DONE]``."""

    def opening(self, choice: int) -> list[dict[str, Any]]:
        """Chunks before the first text of a choice."""
        ...

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Chunks for ``delta``, the one with its finish_reason last."""
        ...

    def closing(self, run: Run) -> list[dict[str, Any]]:
        """Chunks after all others: the usage, where it was asked for."""
        ...

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that broke; ``error`` is OpenAI's error object."""
        ...

    def whole(self, deltas: Iterable[Delta], run: Run) -> dict[str, Any]: ...


class _Base:
    done = True

    def __init__(self, call: Call, object_: str) -> None:
        first = call.first
        self._call, self._top = call, first.sampling.logprobs
        self._head = {"id": first.response_id, "object": object_, "created": first.created, "model": first.model}
        self._null_usage = {"usage": None} if first.include_usage else {}
        self._ids: dict[int, list[int]] | None = {} if first.return_tokens else None
        """By choice, the tokens since its last chunk."""

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices, **self._null_usage}

    def _with_tokens(self, delta: Delta, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The chunks ``made`` of ``delta``, the first with what another mesh would need to go on after it."""
        if self._ids is None:
            return made
        self._ids.setdefault(delta.choice, []).extend(delta.ids)
        if made and self._ids[delta.choice]:
            seed = self._call.choices[delta.choice].request.sampling.seed
            made[0]["mesh"] = {"tokens": self._ids.pop(delta.choice), "seed": seed}
        return made

    def closing(self, run: Run) -> list[dict[str, Any]]:
        if not self._call.first.include_usage:
            return []
        return [{**self._head, "choices": [], "usage": usage_of(self._call, run)}]

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        return {"error": error}


class ChatRender(_Base):
    def __init__(self, call: Call) -> None:
        streamed = call.first.stream
        super().__init__(call, "chat.completion.chunk" if streamed else "chat.completion")

    def opening(self, choice: int) -> list[dict[str, Any]]:
        content = None if self._call.structure.forced else ""
        return [self._choice(choice, {"role": "assistant", "content": content})]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        made = []
        if delta.text or delta.tokens:
            made.append(self._choice(delta.choice, {"content": delta.text}, **self._logprobs(delta)))
        made += [self._choice(delta.choice, {"tool_calls": [piece.as_delta()]}) for piece in delta.calls]
        if delta.finish is not None:
            made.append(self._choice(delta.choice, {}, finish=delta.finish))
        return self._with_tokens(delta, made)

    def _choice(
        self, choice: int, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        return self._chunk([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        if not delta.tokens:
            return {}
        return {"logprobs": logprobs.chat_logprobs(self._call.tokenizer, delta.tokens, self._top)}

    def whole(self, deltas: Iterable[Delta], run: Run) -> dict[str, Any]:
        by_choice = grouped(deltas, len(self._call.choices))
        choices = [self._whole_choice(index, found) for index, found in enumerate(by_choice)]
        return {**self._head, "choices": choices, "usage": usage_of(self._call, run)}

    def _whole_choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        text, last = "".join(delta.text for delta in deltas), deltas[-1]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        calls = joined_calls(piece for delta in deltas for piece in delta.calls)
        if calls:
            message["content"] = text.strip() or None
            message["tool_calls"] = [call.as_call() for call in calls]
        entries = None
        if self._top >= 0:
            tokens = [token for delta in deltas for token in delta.tokens]
            entries = logprobs.chat_logprobs(self._call.tokenizer, tokens, self._top)
        return {"index": index, "message": message, "logprobs": entries, "finish_reason": last.finish}


class CompletionRender(_Base):
    def __init__(self, call: Call) -> None:
        super().__init__(call, "text_completion")
        self._logprobs = [logprobs.CompletionLogprobs(call.tokenizer, self._top) for _ in call.choices]
        self._echoed = [False] * len(call.choices)

    def opening(self, choice: int) -> list[dict[str, Any]]:
        return []

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        text, entries = self._piece(delta)
        made = []
        if text or entries:
            made.append(self._chunk([self._choice(delta.choice, text, entries, None)]))
        if delta.finish is not None:
            made.append(self._chunk([self._choice(delta.choice, "", None, delta.finish)]))
        return self._with_tokens(delta, made)

    def whole(self, deltas: Iterable[Delta], run: Run) -> dict[str, Any]:
        by_choice = grouped(deltas, len(self._call.choices))
        choices = [self._whole_choice(index, found) for index, found in enumerate(by_choice)]
        return {**self._head, "choices": choices, "usage": usage_of(self._call, run)}

    def _whole_choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        pieces = [self._piece(delta) for delta in deltas]
        entries = logprobs.joined([part for _, part in pieces if part]) if self._top >= 0 else None
        return self._choice(index, "".join(text for text, _ in pieces), entries, deltas[-1].finish)

    def _piece(self, delta: Delta) -> tuple[str, dict[str, Any] | None]:
        """Text and entries of ``delta``, the echoed prompt before the first."""
        text, parts, counter = delta.text, [], self._logprobs[delta.choice]
        choice = self._call.choices[delta.choice]
        if choice.request.echo and not self._echoed[delta.choice]:
            self._echoed[delta.choice] = True
            text = choice.prompt_text + text
            if delta.prompt is not None:
                parts.append(counter.prompt(choice.request.prompt, delta.prompt))
        if delta.tokens:
            parts.append(counter.tokens(delta.tokens))
        return text, logprobs.joined(parts) if parts else None

    @staticmethod
    def _choice(index: int, text: str, entries: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": entries, "finish_reason": finish}


def grouped(deltas: Iterable[Delta], n: int) -> list[list[Delta]]:
    found: list[list[Delta]] = [[] for _ in range(n)]
    for delta in deltas:
        found[delta.choice].append(delta)
    return found


def usage_of(call: Call, run: Run) -> dict[str, Any]:
    """OpenAI's usage object; what the request outlived is under ``mesh.recoveries``."""
    usage: dict[str, Any] = {
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": run.completion_tokens,
        "total_tokens": call.prompt_tokens + run.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": min(run.cached_tokens, call.prompt_tokens)},
    }
    if run.recoveries:
        usage["mesh"] = {"recoveries": [_trace(recovery) for recovery in run.recoveries]}
    return usage


def _trace(recovery: Recovery) -> Any:
    return msgspec.to_builtins(recovery)
