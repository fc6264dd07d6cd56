"""Text from a growing list of tokens.  Everything here is a pure function of the tokens pushed so far, so a node
that adopts a session rebuilds the state from the journal and goes on at the same character.

Detokenizing by difference: the text of a token depends on its neighbours (a byte-level token may hold a third of
a character; sentencepiece drops the leading space of the first token), so a short window of tokens is decoded and
what it grew by is the new text.  While that text ends with U+FFFD it may end within a character: nothing is shown.
It must be the whole text that waits, not only those U+FFFD: sentencepiece's byte fallback decodes a run of byte
tokens all or not at all, so an unfinished character spoils the finished ones before it until it is finished too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from node.text.tokenizer import Tokenizer

CONTEXT_TOKENS = range(5, 13)
"""Of the prompt, so that the first new token gets its leading space right."""
WINDOW_TOKENS = 12
LONGEST_WINDOW = 64
UNFINISHED = 8
"""Tokens after which a text that still ends with U+FFFD is broken for good: a character has at most four bytes."""


class Detokenizer:
    """New text per token; about one decode of a dozen tokens each."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = _context(tokenizer, prompt)
        text = tokenizer.decode(self._window)
        self._cut = len(self._window) if certain(text) == len(text) else 0
        """Where the window may be cut next: a place where its text was complete."""
        self._shown = certain(text)
        """Characters of the window's text that need not be shown again."""
        self._pending = 0

    def push(self, token: int) -> str:
        """The text that ``token`` settled; often a word, empty within a character."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        self._pending += 1
        if text.endswith("\ufffd") and self._pending < UNFINISHED:
            return ""
        end = max(certain(text), self._shown)
        piece, self._shown = text[self._shown : end], end
        if end == len(text):
            self._pending = 0
        if end == len(text) or len(self._window) > LONGEST_WINDOW:
            self._slide()
        return piece

    def _slide(self) -> None:
        """Forget old tokens where the text was complete, keeping enough for context.

        Past the longest window (a model that emits broken bytes without end) any place will do.
        """
        size = len(self._window)
        if size < WINDOW_TOKENS:
            if size <= WINDOW_TOKENS // 2 or not self._cut:
                self._cut = size
            return
        rest = self._window[self._cut :] if size <= LONGEST_WINDOW else self._window[-WINDOW_TOKENS // 2 :]
        text = self._tokenizer.decode(rest)
        if text and (size > LONGEST_WINDOW or "\ufffd" not in text):
            # Special tokens alone give no context; a cut within a character would spoil what follows.
            self._window, self._shown, self._cut = rest, certain(text), len(rest)


def certain(text: str) -> int:
    """How much of ``text`` is there for good: all but up to three U+FFFD at its end, which may be one character."""
    end = len(text)
    while end and len(text) - end < 3 and text[end - 1] == "\ufffd":
        end -= 1
    return end


def _context(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The prompt's last tokens, cut between characters where that can be had."""
    ends = [list(prompt[-n:]) for n in CONTEXT_TOKENS if n <= max(len(prompt), CONTEXT_TOKENS.start)]
    texts = [tokenizer.decode(end) for end in ends]
    for good in (lambda text: "\ufffd" not in text, lambda text: not text.startswith("\ufffd")):
        for end, text in zip(ends, texts, strict=True):
            if good(text):
                return end
    return ends[0]


class StopStrings:
    """Finds the first completed stop string in a growing text and holds back what may become one.

    The match is the one that completes first; of several completed by the same character, the longest.  That
    does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Text that can be shown now.  After ``matched`` is set: nothing more."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        found = min(((at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.matched, self._held = found[2], ""
            return text[: found[1]]
        keep = self._may_begin(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back for a stop string that never came."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """Where the longest end of ``text`` that begins a stop string begins."""
        longest = max(len(stop) for stop in self._stops) - 1
        for at in range(max(0, len(text) - longest), len(text)):
            tail = text[at:]
            if any(stop.startswith(tail) for stop in self._stops):
                return at
        return len(text)


class ChoiceText:
    """One choice's shown text: detokenized, without the token or string that ended it.

    ``finish`` is ``stop`` once a stop token or stop string was seen; the mesh knows the first as well, the second
    only the text shows.  ``tokens`` and ``offset`` (in characters) are what an event's id says.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        stops: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(stops)
        self._stop_ids = frozenset(stop_ids)
        self._min_tokens = min_tokens
        self.tokens = 0
        self.offset = 0
        self.finish: str | None = None

    def push(self, token: int) -> str:
        """The text to show after ``token``."""
        assert self.finish is None, "tokens after the end"
        self.tokens += 1
        if token in self._stop_ids and self.tokens >= self._min_tokens:
            self.finish = "stop"
            return self._show(self._stops.flush())
        piece = self._detokenizer.push(token)
        if self.tokens < self._min_tokens:
            return self._show(piece)
        shown = self._stops.push(piece)
        if self._stops.matched is not None:
            self.finish = "stop"
        return self._show(shown)

    def end(self) -> str:
        """The text still held when the tokens ended without a stop string."""
        return self._show(self._stops.flush())

    def _show(self, text: str) -> str:
        self.offset += len(text)
        return text
