"""Grammar masks, made beside the device thread: a step waits for none, it leaves the sequence out until it is there.

A mask follows from the tokens drawn so far and nothing else.  So a sampler that takes a session over, and one that was
cut back, make the same masks as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import torch

from mesh.errors import RequestError
from node.text.grammar import Allowed, DeadEnd, Vocabularies

THREADS = 2
"""So that a grammar that is slow to compile does not hold up the masks of the others."""


class NoMask(msgspec.Struct, frozen=True):
    """Why there is none.  ``final``: there is none at any other node either."""

    why: str
    final: bool


class Masks:
    """Makes the masks of all sequences of one engine."""

    def __init__(self, vocabularies: Vocabularies) -> None:
        self._vocabularies = vocabularies
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")

    def guide(self, folder: Path, grammar: str) -> Guide:
        """For a sequence of the model in ``folder``."""
        return Guide(self._pool, lambda: self._vocabularies.get(folder).start(grammar))

    def stop(self) -> None:
        """Once nothing asks any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Guide:
    """One sequence's grammar.  The device thread calls all of it but what is marked; one job at a time is in the pool,
    so what was begun for tokens that were cut since ends first, and is not looked at."""

    def __init__(self, pool: ThreadPoolExecutor, start: Callable[[], Allowed]) -> None:
        self._pool, self._start = pool, start
        self._allowed: Allowed | None = None
        self._wanted: list[int] | None = None
        self._busy = False
        self.size = 0
        """Of the model's vocabulary; set before the first ``ask``."""
        self.post: Callable[[torch.Tensor | NoMask], None] = lambda found: None
        """Called in the pool: has the device thread call ``take``."""
        self.position = -1
        """The token number that was asked for last."""
        self.mask: torch.Tensor | None = None
        """bool [size], True for the tokens that may have number ``position``; ``None``: not made yet."""
        self.error: NoMask | None = None

    def ask(self, position: int, drawn: Sequence[int]) -> None:
        """Have the mask made for token number ``position``, which follows ``drawn``."""
        self.position, self._wanted = position, list(drawn)
        self.mask = self.error = None
        self._begin()

    def take(self, found: torch.Tensor | NoMask) -> None:
        """What ``post`` brought."""
        self._busy = False
        if self._wanted is not None:
            self._begin()
        elif isinstance(found, NoMask):
            self.error = found
        else:
            self.mask = found

    def _begin(self) -> None:
        if self._wanted is not None and not self._busy:
            drawn, self._wanted, self._busy = self._wanted, None, True
            self._pool.submit(self._run, drawn)

    # -- in the pool ---------------------------------------------------------------------------------------------------

    def _run(self, drawn: list[int]) -> None:
        try:
            found: torch.Tensor | NoMask = self._make(drawn)
        except (DeadEnd, RequestError) as error:
            found = NoMask(f"the grammar allows no token here: {error}", final=True)
        except (
            BaseException
        ) as error:  # a panic of the library is no Exception; unsaid, the sequence would wait for ever
            found = NoMask(f"the grammar's mask failed: {type(error).__name__}: {error}", final=False)
        self.post(found)

    def _make(self, drawn: list[int]) -> torch.Tensor:
        if self._allowed is None:
            self._allowed = self._start()
        bits = np.unpackbits(np.frombuffer(self._allowed.after(drawn), np.uint8), bitorder="little")[: self.size]
        if not bits.any():
            raise DeadEnd("the text would have to end, and the model has no token for it")
        # The model's vocabulary may be padded past the tokenizer's.
        return torch.from_numpy(np.pad(bits, (0, self.size - len(bits))).view(bool))
