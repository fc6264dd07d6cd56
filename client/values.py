"""What comes back: pieces of a stream, whole answers, and how far a stream came."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    recoveries: tuple[dict[str, Any], ...] = ()
    """One entry per fault that the mesh outlived for this answer."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One event of a stream.  ``text`` is new text of choice ``index``; the last piece has the usage."""

    text: str = ""
    index: int = 0
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    usage: Usage | None = None
    session: str = ""
    route: str = ""
    event_id: str = ""
    tokens: tuple[int, ...] = ()
    """Those that this event is made of, where the node tells them."""


@dataclass(frozen=True, slots=True)
class Choice:
    text: str
    finish_reason: str | None
    logprobs: dict[str, Any] | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; ``text`` and ``finish_reason`` are those of the first choice."""

    choices: tuple[Choice, ...]
    usage: Usage
    model: str = ""
    session: str = ""
    route: str = ""

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason


@dataclass(slots=True)
class Progress:
    """How far a stream came: all that another node needs to go on from there."""

    path: str
    body: dict[str, Any]
    idempotency_key: str
    session: str = ""
    route: str = ""
    model: str = ""
    event_ids: dict[int, str] = field(default_factory=dict)
    """By choice, the last event's id: what to ask the rest of the stream with."""
    texts: dict[int, str] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    tokens: list[int] = field(default_factory=list)
    """Of the one choice; empty where there are several, or the node tells none."""
    shown: bool = False
    """Something besides text: a piece of a tool call, log-probabilities."""
    moves: int = 0
    """How often the stream broke off and was gone on with."""

    @property
    def begun(self) -> bool:
        """Whether the caller was shown anything that a new attempt could contradict."""
        return self.shown or any(self.texts.values()) or bool(self.finished)

    @property
    def resubmitted(self) -> dict[str, Any]:
        """The request for a mesh that knows nothing of it any more: it goes on after the tokens that came."""
        if not self.tokens:
            return self.body
        return {**self.body, "mesh": {**self.body["mesh"], "resume_tokens": self.tokens}}

    def note(self, piece: Piece) -> None:
        self.tokens += piece.tokens
        self.texts[piece.index] = self.texts.get(piece.index, "") + piece.text
        self.shown = self.shown or bool(piece.tool_calls or piece.logprobs)
        if piece.event_id and piece.usage is None:
            self.event_ids[piece.index] = piece.event_id
        if piece.finish_reason is not None:
            self.finished.add(piece.index)


def pieces_of(chunk: dict[str, Any], event_id: str, progress: Progress) -> list[Piece]:
    """A chunk of either form as pieces, one per choice in it; a usage chunk as one piece."""
    told = chunk.get("mesh") or {}
    tokens = tuple(told.get("tokens") or ())
    made = [_piece(choice, event_id, progress, tokens) for choice in chunk.get("choices") or ()]
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        made.append(Piece(usage=_usage(usage), session=progress.session, route=progress.route, event_id=event_id))
    return made


def _piece(choice: dict[str, Any], event_id: str, progress: Progress, tokens: tuple[int, ...]) -> Piece:
    delta = choice.get("delta") or {}
    return Piece(
        text=delta.get("content") or choice.get("text") or "",
        index=choice.get("index", 0),
        finish_reason=choice.get("finish_reason"),
        logprobs=choice.get("logprobs"),
        tool_calls=tuple(delta.get("tool_calls") or ()),
        session=progress.session,
        route=progress.route,
        event_id=event_id,
        tokens=tokens,
    )


def _usage(usage: dict[str, Any]) -> Usage:
    mesh = usage.get("mesh") or {}
    return Usage(
        usage.get("prompt_tokens", 0),
        usage.get("completion_tokens", 0),
        usage.get("total_tokens", 0),
        tuple(mesh.get("recoveries") or ()),
    )


def answer_of(pieces: Iterable[Piece], progress: Progress) -> Answer:
    """A finished stream as a whole answer."""
    by_choice: dict[int, list[Piece]] = {0: []}
    usage = Usage()
    for piece in pieces:
        if piece.usage is not None:
            usage = piece.usage
        else:
            by_choice.setdefault(piece.index, []).append(piece)
    choices = tuple(_choice(by_choice[index]) for index in sorted(by_choice))
    return Answer(choices, usage, progress.model, progress.session, progress.route)


def _choice(pieces: list[Piece]) -> Choice:
    logprobs: dict[str, Any] = {}
    for piece in pieces:
        for name, values in (piece.logprobs or {}).items():
            if values is None or logprobs.get(name) is None:
                logprobs[name] = logprobs.get(name) if values is None else list(values)
            else:
                logprobs[name].extend(values)
    finish = next((piece.finish_reason for piece in reversed(pieces) if piece.finish_reason), None)
    calls = joined_calls(call for piece in pieces for call in piece.tool_calls)
    return Choice("".join(piece.text for piece in pieces), finish, logprobs or None, calls)


def joined_calls(parts: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Whole calls from a stream's parts: those of one index are one call, whose arguments come piece by piece."""
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        function = part.get("function") or {}
        call = calls.setdefault(part.get("index", len(calls)), {"function": {"arguments": ""}})
        call.update({name: value for name, value in part.items() if name != "function"})
        told = {name: value for name, value in function.items() if name != "arguments"}
        arguments = call["function"]["arguments"] + (function.get("arguments") or "")
        call["function"] = {**call["function"], **told, "arguments": arguments}
    return tuple(calls[index] for index in sorted(calls))
