"""Log-probabilities in the chat form and in the completion form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from node.api.service import TokenEvent, Top
from node.text.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for minus infinity, which JSON has no word for (OpenAI's and vLLM's choice)."""


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is no whole character as ``bytes:\\xe2\\x82``, so that different ones differ."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenEvent], top: int) -> dict[str, Any]:
    return {"content": [_chat_entry(tokenizer, event, top) for event in tokens], "refusal": None}


def _chat_entry(tokenizer: Tokenizer, event: TokenEvent, top: int) -> dict[str, Any]:
    entry = _chat_token(tokenizer, event.token, event.logprob)
    entry["top_logprobs"] = [_chat_token(tokenizer, token, value) for token, value in event.top[:top]]
    return entry


def _chat_token(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    """A value that was lost with a node is ``null``: 0 would say that the token was certain."""
    raw = tokenizer.token_bytes(token)
    return {"token": spelled(tokenizer, token), "logprob": _bounded(logprob), "bytes": list(raw)}


def _bounded(logprob: float | None) -> float | None:
    return None if logprob is None else max(LEAST, logprob)


class CompletionLogprobs:
    """One choice's entries; text offsets run on from piece to piece (and from the echoed prompt on)."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer, self._top, self._offset = tokenizer, top, 0

    def prompt(self, ids: Sequence[int], scored: Sequence[tuple[float | None, Top]]) -> dict[str, Any]:
        """Entries of an echoed prompt: as many as it has tokens, the first without a value."""
        assert len(scored) == max(0, len(ids) - 1), "each prompt token but the first has a log-probability"
        rows: list[tuple[int, float | None, Top]] = [(ids[0], None, ())] if ids else []
        rows += [(token, value, top) for token, (value, top) in zip(ids[1:], scored, strict=True)]
        return self._entries(rows)

    def tokens(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        return self._entries([(event.token, event.logprob, event.top) for event in events])

    def _entries(self, rows: Sequence[tuple[int, float | None, Top]]) -> dict[str, Any]:
        entries: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, value, top in rows:
            text = spelled(self._tokenizer, token)
            entries["tokens"].append(text)
            entries["token_logprobs"].append(_bounded(value))
            entries["top_logprobs"].append(self._alternatives(token, value, top))
            entries["text_offset"].append(self._offset)
            self._offset += 0 if text.startswith("bytes:") else len(text)
        return entries

    def _alternatives(self, token: int, value: float | None, top: Top) -> dict[str, float] | None:
        """The most likely tokens and, beside them, the one that was drawn."""
        if value is None or not self._top:
            return None
        found = {spelled(self._tokenizer, other): max(LEAST, each) for other, each in top[: self._top]}
        found.setdefault(spelled(self._tokenizer, token), max(LEAST, value))
        return found


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Entries of a choice's pieces as one."""
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {key: [value for part in parts for value in part[key]] for key in keys}
