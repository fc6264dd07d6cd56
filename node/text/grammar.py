"""Grammars over a tokenizer: which tokens may come next, as a pure function of those drawn so far.

The work is llguidance's (an Earley parser over a lexer of derivatives, walking a trie of the vocabulary).  What is here
keeps its edges away: a matcher in an error state answers with a mask of EOS, which would pass for a proper end; a text
that the vocabulary cannot spell is answered with token 0; and everything it may spend is bounded.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mesh.errors import RequestError
from node.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

COMPILED = 64
"""Grammars kept ready: the choices of one request, and its retries, share one."""
VOCABULARIES = 8
"""Of models served here lately; each takes some tens of megabytes."""
LIMITS = {
    "initial_lexer_fuel": 500_000,
    "max_grammar_size": 100_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 16_000,
}
"""About 10 ms of a schema's first look, 4 ms of a step and 32 MB of lexer states (llguidance's figures)."""
REASON_CHARS = 300


class DeadEnd(Exception):
    """No token may follow: neither is the text complete nor can the vocabulary go on with it."""


class Vocabulary:
    """One tokenizer as the grammar library sees it.  Building takes 0.03 to 1 s; any thread may call the methods."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """RequestError: a tokenizer whose tokens' bytes the library cannot tell."""
        from llguidance import LLParserLimits, LLTokenizer

        size = max(tokenizer.size, *(eos + 1 for eos in tokenizer.eos_ids), 1)
        try:
            self._ll = LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=list(tokenizer.eos_ids), slices=None)
        except ValueError as error:
            raise RequestError(
                f"constrained output needs a BPE-type tokenizer; this model's is another: {_short(error)}",
                code="unsupported_parameter",
            ) from error
        self._limits = LLParserLimits(**LIMITS, verbose_errors=False)
        self._eos_ids = frozenset(tokenizer.eos_ids)
        self._never = [token for token in sorted(tokenizer.special_ids) if token not in self._eos_ids]
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, grammar: str) -> Allowed:
        """A fresh text under ``grammar``, llguidance's serialised form.

        RequestError: it cannot be compiled, is too complex, or allows no text at all.
        """
        return Allowed(self._matcher(grammar), self._eos_ids, self._never)

    def check(self, grammar: str, drawn: Sequence[int] = ()) -> None:
        """RequestError: as of ``start``, or ``drawn`` begins no text under ``grammar``."""
        allowed = self.start(grammar)
        if not drawn:
            return
        try:
            mask = allowed.after(drawn[:-1])
        except DeadEnd as error:
            raise _not_so(str(error)) from error
        last = drawn[-1]
        if last >> 3 >= len(mask) or not mask[last >> 3] >> (last & 7) & 1:
            raise _not_so(f"token {last} may not follow the {len(drawn) - 1} before it")

    def _matcher(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
        matcher = LLMatcher(self._ll, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _unusable(matcher.get_error())
        try:
            Allowed(matcher, self._eos_ids, self._never).after(())
        except DeadEnd as error:
            raise _unusable(f"it allows no text at all ({error})") from error
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > COMPILED:
                self._compiled.popitem(last=False)
        return matcher


class Allowed:
    """The tokens that may follow in one text.  Its state is a cache: ``after`` depends on its argument alone."""

    def __init__(self, compiled: LLMatcher, eos_ids: frozenset[int], never: Sequence[int]) -> None:
        self._compiled, self._eos_ids, self._never = compiled, eos_ids, never
        self._matcher = compiled.deep_copy()
        self._read: list[int] = []

    def after(self, drawn: Sequence[int]) -> bytearray:
        """A bit for each token of the vocabulary, lowest first.  ``DeadEnd`` where no token may follow ``drawn``."""
        if drawn and drawn[-1] in self._eos_ids:
            raise DeadEnd("the text is complete")
        self._move_to(list(drawn))
        mask = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            raise DeadEnd(_short(self._matcher.get_error()))
        if self._matcher.is_stopped() and not self._matcher.is_accepting():
            raise DeadEnd("the grammar cannot be completed")
        for token in self._never:
            mask[token >> 3] &= ~(1 << (token & 7))
        only = _only(mask)
        if only == -1 or (only is not None and only not in self._eos_ids and not self._matcher.validate_tokens([only])):
            raise DeadEnd("no token of the vocabulary continues the text")
        return mask

    def _move_to(self, drawn: list[int]) -> None:
        """Read what is new; a text that was cut is read again from its start."""
        if drawn[: len(self._read)] != self._read:
            self._matcher, self._read = self._compiled.deep_copy(), []
        new, self._read = drawn[len(self._read) :], drawn
        if new and (self._matcher.is_stopped() or not self._matcher.consume_tokens(new)):
            self._read = [-1]  # of no use any more
            raise DeadEnd(_short(self._matcher.get_error()) or "the text goes on after its end")


class Vocabularies:
    """The vocabularies of one node, by model folder: the entry checks grammars with them, the sampler makes masks."""

    def __init__(self, load: Callable[[Path], Tokenizer] = load_tokenizer) -> None:
        self._load = load
        self._found: OrderedDict[Path, Vocabulary] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, folder: Path, tokenizer: Tokenizer | None = None) -> Vocabulary:
        """Blocks for up to seconds the first time: not for the event loop.  ConfigError, RequestError: none usable."""
        with self._lock:
            found = self._found.get(folder)
            if found is None:
                found = self._found[folder] = Vocabulary(tokenizer or self._load(folder))
            self._found.move_to_end(folder)
            while len(self._found) > VOCABULARIES:
                self._found.popitem(last=False)
            return found


def _only(mask: bytearray) -> int | None:
    """The one token that ``mask`` allows; -1: none; ``None``: several."""
    bits = int.from_bytes(mask, "little")
    if bits & (bits - 1):
        return None
    return bits.bit_length() - 1


def _unusable(why: str) -> RequestError:
    return RequestError(f"the grammar cannot be enforced: {_short(why)}", code="invalid_schema")


def _not_so(why: str) -> RequestError:
    return RequestError(
        f"mesh.resume_tokens cannot have been drawn under this structured output: {why}",
        param="mesh.resume_tokens",
        code="invalid_token",
    )


def _short(error: object) -> str:
    """One line, without the library's dump of its state or of the grammar, which is none that the caller wrote."""
    text = re.split(r"<state>|<non-verbose/>|\n\s*1 \| ", str(error))[0]
    text = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: ", "", " ".join(text.split()))
    return text if len(text) <= REASON_CHARS else text[: REASON_CHARS - 3] + "..."
