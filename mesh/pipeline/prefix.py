"""Prefixes that sessions have in common: which pages a hop keeps for whoever begins alike, and what they are called.

A page is a few positions of one span: their keys and values, which the engine holds under a number, and, before the
last hop, the rows that went over the boundary behind it (the checkpoints that a recovery needs).  It is named by a
hash of its tokens, of all tokens before them, and of who may share it.  A hop that has the first pages of a session
begins behind them; what its neighbours have is their affair, for every hop says from where it wants to be sent
(``Gap``): one that has more pages than the hop before waits, one that has fewer is given the checkpointed rows.

Pages live in what nobody else wants: the least recently used go whenever a session or its checkpoints need the room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b

import msgspec

from mesh.core import Effect, Emit
from mesh.pipeline.checkpoints import Checkpoints, Segment
from mesh.pipeline.work import DropPages, KeepPages, TakePages
from mesh.types import LayerSpan

PAGE = 32
"""Positions; the same at all nodes, since the owner of a session names its pages."""

Chain = tuple[bytes, ...]
"""Names of a session's first pages, in order."""


def chain_of(tokens: Sequence[int], size: int, *sharers: str) -> Chain:
    """Names of the whole pages of ``tokens``.  Only sessions with the same ``sharers`` come to the same names."""
    name = blake2b("\0".join(sharers).encode(), digest_size=16).digest()
    chain = []
    for end in range(size, len(tokens) + 1, size):
        page = ",".join(map(str, tokens[end - size : end]))
        name = blake2b(name + page.encode(), digest_size=16).digest()
        chain.append(name)
    return tuple(chain)


class Page(msgspec.Struct, frozen=True):
    """One page of one span."""

    number: int
    """The engine's name for its keys and values ..."""
    bytes: int
    """... and what they take there."""
    rows: memoryview | None
    """What went over the boundary behind the span; ``None`` at the last hop."""


class Pages:
    """All pages of one node, the least recently used first."""

    def __init__(self, size: int = PAGE) -> None:
        self.size = size
        self.row_bytes = 0
        self.looked_up = self.found = 0
        """Positions, over all sessions that began here."""
        self._pages: OrderedDict[tuple[LayerSpan, bytes], Page] = OrderedDict()
        self._serial = 0

    def __len__(self) -> int:
        return len(self._pages)

    def numbers(self) -> set[int]:
        return {page.number for page in self._pages.values()}

    def find(self, span: LayerSpan, chain: Chain, most: int) -> list[Page]:
        """The leading pages of ``chain`` that are held, at most ``most`` of them."""
        found: list[Page] = []
        for name in chain[: max(0, most)]:
            page = self._pages.get((span, name))
            if page is None:
                break
            found.append(page)
        self.touch(span, chain[: len(found)])
        return found

    def has(self, span: LayerSpan, name: bytes) -> bool:
        return (span, name) in self._pages

    def add(self, span: LayerSpan, name: bytes, bytes_: int, rows: memoryview | None) -> int:
        """Returns the page's number."""
        assert not self.has(span, name)
        self._serial += 1
        self._pages[span, name] = Page(self._serial, bytes_, rows)
        self.row_bytes += len(rows) if rows is not None else 0
        return self._serial

    def touch(self, span: LayerSpan, chain: Chain) -> None:
        """``chain`` was used.  Its end is the first to go: without its beginning it could not be found."""
        for name in reversed(chain):
            if (span, name) in self._pages:
                self._pages.move_to_end((span, name))

    def evict(self, bytes_: int = 0, row_bytes: int = 0) -> list[Effect]:
        """Give up pages until so many bytes of keys and values, and so many of rows, are free."""
        gone: list[Page] = []
        while self._pages and (bytes_ > 0 or row_bytes > 0):
            page = self._forget(next(iter(self._pages)))
            bytes_ -= page.bytes
            row_bytes -= len(page.rows) if page.rows is not None else 0
            gone.append(page)
        return _dropped(gone)

    def give_up(self, span: LayerSpan, chain: Chain) -> list[Effect]:
        """Those that are held of ``chain``."""
        return _dropped([self._forget((span, name)) for name in chain if self.has(span, name)])

    def keep_only(self, held: Callable[[LayerSpan], bool]) -> list[Effect]:
        """Give up the pages of spans that are not held any more."""
        return _dropped([self._forget(key) for key in list(self._pages) if not held(key[0])])

    def _forget(self, key: tuple[LayerSpan, bytes]) -> Page:
        page = self._pages.pop(key)
        self.row_bytes -= len(page.rows) if page.rows is not None else 0
        return page


def _dropped(pages: list[Page]) -> list[Effect]:
    return [Emit(DropPages(tuple(page.number for page in pages)))] if pages else []


class Prefix:
    """One session's first pages at a hop."""

    def __init__(
        self, pages: Pages, span: LayerSpan, key: str, page_bytes: int, checkpoints: Checkpoints | None
    ) -> None:
        """``key``: the engine's name of the session; ``page_bytes``: what a page takes there, 0 if it keeps none;
        ``checkpoints``: of the boundary behind the hop, where there is one."""
        self.chain: Chain = ()
        self.length = 0
        """Positions that were taken from pages."""
        self._pages, self._span, self._key = pages, span, key
        self._page_bytes, self._checkpoints = page_bytes, checkpoints
        self._seen = 0
        """Pages of ``chain`` that are held, or were looked at when they were computed."""

    def take(self, most: int) -> list[Effect]:
        """Begin behind the pages that are held, at position ``most`` at the latest."""
        pages = self._pages
        if not self._page_bytes:
            return []
        found = pages.find(self._span, self.chain, most // pages.size)
        self._seen, self.length = len(found), len(found) * pages.size
        pages.looked_up += len(self.chain) * pages.size
        pages.found += self.length
        if not found:
            return []
        if self._checkpoints is not None:
            for index, page in enumerate(found):
                assert page.rows is not None
                rows = Segment(index * pages.size, pages.size, page.rows)
                if rows.end > self._checkpoints.end:  # a session that was parked kept its own
                    self._checkpoints.append(rows.slice(max(rows.start, self._checkpoints.end), rows.end))
        return [Emit(TakePages(self._key, pages.size, tuple(page.number for page in found)))]

    def keep(self, done: int) -> list[Effect]:
        """Positions [0, done) are computed: keep the pages among them that are new."""
        pages, first = self._pages, self._seen
        self._seen = max(first, min(done // pages.size, len(self.chain)))
        if self._seen == first or not self._page_bytes:
            return []
        new = [i for i in range(first, self._seen) if self._keeps(i) and not pages.has(self._span, self.chain[i])]
        kept = [
            (i * pages.size, pages.add(self._span, self.chain[i], self._page_bytes, self._rows(i * pages.size)))
            for i in new
        ]
        pages.touch(self._span, self.chain[: self._seen])
        return [Emit(KeepPages(self._key, pages.size, tuple(kept)))] if kept else []

    def refused(self, done: int) -> list[Effect]:
        """The engine begins anew, where positions [0, done) were computed.  If that was all that pages gave, it cannot
        begin behind them: they go, so that those computed now are kept in their place."""
        if not self.length or done != self.length:
            return []
        taken, self.length, self._seen = self.length // self._pages.size, 0, 0
        return self._pages.give_up(self._span, self.chain[:taken])

    def cut(self, length: int) -> None:
        """Positions from ``length`` on are void."""
        self._seen = min(self._seen, length // self._pages.size)
        self.length = min(self.length, length)

    def _keeps(self, index: int) -> bool:
        """Not without its rows (in memory): whoever began behind it could not help the hop behind."""
        return self._checkpoints is None or index * self._pages.size >= self._checkpoints.warm

    def _rows(self, start: int) -> memoryview | None:
        if self._checkpoints is None:
            return None
        return self._checkpoints.copy(start, start + self._pages.size)
