"""Tool calls out of generated text, as it grows: names at once, arguments piece by piece, as OpenAI streams them.

A call is ``{"name": ..., "arguments": {...}}``: the whole text where a call is forced, a ``<tool_call>`` block (the
form of Hermes and Qwen templates) where the model may choose.  A block that begins otherwise is held back to its end
and then read as a whole, or shown as the text that it is.  All of it is a function of the text, so a node that takes a
stream over comes to the same pieces.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from typing import Any, Literal

import msgspec

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')

ToolMode = Literal["none", "auto", "required", "named"]


class CallPiece(msgspec.Struct, frozen=True):
    """More of call number ``index``; the first piece of a call has its name, and no arguments yet."""

    index: int
    id: str
    name: str = ""
    arguments: str = ""
    """JSON text, as it was generated."""

    def as_delta(self) -> dict[str, Any]:
        if not self.name:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        return {"index": self.index, **self.as_call()}

    def as_call(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def joined_calls(pieces: Iterable[CallPiece]) -> list[CallPiece]:
    """One whole piece for each call."""
    whole: dict[int, CallPiece] = {}
    for piece in pieces:
        before = whole.setdefault(piece.index, piece)
        if before is not piece:
            arguments = before.arguments + piece.arguments
            whole[piece.index] = msgspec.structs.replace(before, arguments=arguments)
    return list(whole.values())


class CallReader:
    """One choice's text: what of it is shown, and which calls it holds."""

    def __init__(self, mode: ToolMode, names: Collection[str], session: str) -> None:
        self._mode, self._names, self._session = mode, names, session
        self._held = ""
        """Text that may be, or is, the beginning of a call."""
        self._inside = mode in ("required", "named")
        self._scan: _Arguments | None = None
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[CallPiece]]:
        """Text to show now, and pieces of calls."""
        if self._mode == "none":
            return text, []
        self._held += text
        return self._read(final=False)

    def end(self) -> tuple[str, list[CallPiece]]:
        """The rest: a call that was cut short keeps what it has; text that was no call is shown after all."""
        return self._read(final=True)

    def _read(self, final: bool) -> tuple[str, list[CallPiece]]:
        shown, pieces = "", list[CallPiece]()
        while True:
            before = len(self._held)
            if self._scan is not None:
                self._read_arguments(pieces)
            elif self._inside:
                shown += self._read_head(pieces, final)
            else:
                shown += self._read_text(final)
            if len(self._held) == before:
                return shown, pieces

    def _read_text(self, final: bool) -> str:
        """Text up to the next block; what may become its mark is held back."""
        at = self._held.find(OPEN)
        if at >= 0:
            self._inside = True
            shown, self._held = self._held[:at], self._held[at + len(OPEN) :]
            return shown
        keep = 0 if final else next(n for n in range(len(OPEN) - 1, -1, -1) if self._held.endswith(OPEN[:n]))
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def _read_head(self, pieces: list[CallPiece], final: bool) -> str:
        """A call's name, once its arguments begin; else the whole block, once it has ended."""
        head = _HEAD.match(self._held)
        if head is not None and (name := _text_of(head.group(1))) in self._names:
            self._held = self._held[head.end() :]
            self._scan = _Arguments()
            pieces.append(self._begin(name))
            return ""
        forced = self._mode != "auto"
        at = -1 if forced else self._held.find(CLOSE)
        if at < 0 and not final:
            return ""
        block, rest = (self._held, "") if at < 0 else (self._held[:at], self._held[at + len(CLOSE) :])
        self._held, self._inside = rest, forced
        call = _read_call(block)
        if call is None or (not forced and at < 0):
            return block if forced else OPEN + block + (CLOSE if at >= 0 else "")
        pieces.append(self._begin(call[0]))
        pieces.append(msgspec.structs.replace(pieces[-1], name="", arguments=call[1]))
        self.calls += 1
        return ""

    def _begin(self, name: str) -> CallPiece:
        return CallPiece(self.calls, call_id(self._session, self.calls), name)

    def _read_arguments(self, pieces: list[CallPiece]) -> None:
        """Arguments up to their closing bracket; then the wrapper's bracket and the mark are skipped."""
        assert self._scan is not None
        if not self._scan.ended:
            taken = self._scan.take(self._held)
            if taken:
                pieces.append(CallPiece(self.calls, call_id(self._session, self.calls), "", self._held[:taken]))
                self._held = self._held[taken:]
            return
        if self._mode != "auto":
            self._held = ""
            return
        at = self._held.find(CLOSE)
        if at >= 0:
            self._held, self._scan, self._inside = self._held[at + len(CLOSE) :], None, False
            self.calls += 1


class _Arguments:
    """Finds the end of a JSON object in a text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.ended = False

    def take(self, text: str) -> int:
        """How many characters of ``text`` belong to the object."""
        for at, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return at + 1
        return len(text)


def call_id(session: str, index: int) -> str:
    """The same at every node that streams the session."""
    return "call_" + hashlib.sha256(f"{session} {index}".encode()).hexdigest()[:24]


def _text_of(literal: str) -> str:
    try:
        return str(msgspec.json.decode(literal))
    except msgspec.DecodeError:
        return ""


def _read_call(text: str) -> tuple[str, str] | None:
    """(name, arguments) of a call in any order of its keys."""
    try:
        value = msgspec.json.decode(text.strip())
    except (msgspec.DecodeError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    return value["name"], msgspec.json.encode(value.get("arguments") or {}).decode()
