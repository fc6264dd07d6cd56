"""Room for keys and values: how much is promised, and which slot of which extent holds a sequence.  No torch here.

A sequence takes one slot, wide enough for every position that it may come to hold, in the extent of its width class:
its keys and values stay where they are while it runs, and sequences in neighbouring slots are read in one batched
product.  Memory that was reserved and not written yet is not resident, so a generous ``max_positions`` costs promises,
not RAM.  Layers with a window have slots of a ``Band``, which begin at a later position every few hundred.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence

import msgspec

from mesh.errors import CapacityError

PAGE = 128
"""Positions; key lengths are rounded up to it, since bits depend on how a kernel blocks its keys."""

GPU_PAGE = 256
"""Positions; FlashAttention 2, which torch brings, reads pages of a multiple of this."""

STEP_ROWS = 512
"""Rows of one step at most, where nothing else is said."""

FAR = 1 << 40
"""Positions past every context."""

SLACK = 64
"""Positions that a sequence with windows can always be cut back by: owners let the first hop run 32 past them."""


def width_of(positions: int) -> int:
    """The width class that holds ``positions``: whole pages, growing by at most a half (1, 2, 3, 4, 6, 8, 12 ...)."""
    return rounded(max(1, -(-positions // PAGE))) * PAGE


def paged_width(positions: int) -> int:
    """The positions of the pages that hold ``positions`` on a GPU."""
    return max(1, -(-positions // GPU_PAGE)) * GPU_PAGE


def rounded(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... from ``n`` on."""
    power = 1 << (n.bit_length() - 1)
    if n == power:
        return n
    return power * 3 // 2 if power > 1 and n <= power * 3 // 2 else power * 2


def padded(positions: int) -> int:
    """The key length under which ``positions`` keys are read."""
    return -(-positions // PAGE) * PAGE


class Band(msgspec.Struct, frozen=True):
    """How a layer holds the last positions of a sequence: ``width`` of them, from a page on that moves up.

    What is read for a position depends on it alone, and not on where its slot begins now: the same bits everywhere.
    """

    window: int
    """Keys that a query sees, its own included."""
    width: int
    ahead: int
    """Positions that one step writes at most."""

    def first(self, position: int) -> int:
        """The first key read for ``position``, the same for all of its page: at a page, and not past its window."""
        return max(0, position // PAGE * PAGE - self.window + 1) // PAGE * PAGE

    def start(self, length: int) -> int:
        """Where a slot begins that has just moved, before position ``length`` is written.

        What the last step wrote is there still: whoever copies it as a shared page comes a step later.
        """
        return min(self.first(max(0, length - SLACK)), max(0, length - self.ahead) // PAGE * PAGE)

    def moved(self, base: int, start: int, n: int) -> int:
        """Where a slot that begins at ``base`` is to begin, so that [start, start + n) can be written."""
        if start + n <= base + self.width:
            return base
        return max(self.start(start), padded(start + n) - self.width)


def band_of(window: int, width: int, step_rows: int) -> Band:
    """Of a layer with ``window``, in slots of ``width`` positions elsewhere."""
    before = max(SLACK + padded(window - 1), step_rows) + PAGE - 1
    return Band(window, min(width, padded(before + step_rows)), step_rows)


class LayerRoom(msgspec.Struct, frozen=True):
    """What a layer takes of a sequence."""

    bytes: int
    """Keys and values of one position."""
    window: int = 0
    """Only so many positions are ever seen; 0: all."""


class KvBudget:
    """Promises of room in bytes, kept by the event loop: what ``open`` granted is there until ``close``.

    Shared pages take what is left: they are never in the way of a promise, but then have to go (``excess``).
    """

    def __init__(self, total: int, width: Callable[[int], int] = width_of, step_rows: int = STEP_ROWS) -> None:
        """``width``: the positions that are taken for a sequence of so many, where a layer has no window."""
        self.total, self._width, self._step_rows = total, width, step_rows
        self.used = 0
        self._held: dict[str, tuple[int, int]] = {}
        """Sequence -> bytes promised, and bytes of one position."""
        self._pages: dict[int, int] = {}
        self.shared = 0

    def reserve(self, key: str, positions: int, layers: Sequence[LayerRoom]) -> int:
        """The bytes promised.  Raises ``CapacityError``, with when to ask again and what is lacking, if they do not
        fit."""
        assert key not in self._held, f"{key} is open already"
        width = self._width(positions)
        need = sum(layer.bytes * self._most(layer, width) for layer in layers)
        if self.used + need > self.total:
            # Room comes back when a sequence ends; the fuller with small ones, the sooner.
            wait = min(5.0, 0.25 + 4.0 * need / max(1, self.total))
            lacking = self.used + need - self.total if need <= self.total else 0
            free = self.total - self.used
            raise CapacityError(f"{positions} positions need {need} bytes of {free} free", wait, lacking)
        self.used += need
        self._held[key] = need, sum(layer.bytes for layer in layers)
        return need

    def _most(self, layer: LayerRoom, width: int) -> int:
        """The positions that it holds in slots of ``width``."""
        return band_of(layer.window, width, self._step_rows).width if layer.window else width

    def positions(self, layers: Sequence[LayerRoom]) -> int:
        """How long a sequence over ``layers`` could still be; where none of them grows any more, as if one did."""
        free, at = max(0, self.total - self.used), 0
        rooms = [(self._most(layer, FAR) if layer.window else FAR, layer.bytes) for layer in layers]
        for end in sorted({most for most, _ in rooms}):
            each = sum(size for most, size in rooms if most >= end)
            if end == FAR or free < each * (end - at):
                return at + free // max(1, each)
            free, at = free - each * (end - at), end
        return at + free // max(1, min((size for _, size in rooms), default=free + 1))

    def release(self, key: str) -> None:
        self.used -= self._held.pop(key, (0, 0))[0]

    def position_bytes(self, key: str) -> int:
        """Of one position of ``key``."""
        return self._held[key][1]

    def keep(self, key: str, size: int, pages: Iterable[int]) -> None:
        """Pages of ``size`` positions each of ``key``: in all layers, though windows may be past some of them."""
        for number in pages:
            self._pages[number] = size * self.position_bytes(key)
            self.shared += self._pages[number]

    def drop(self, pages: Iterable[int]) -> None:
        for number in pages:
            self.shared -= self._pages.pop(number, 0)

    @property
    def pages(self) -> int:
        """How many are held."""
        return len(self._pages)

    @property
    def excess(self) -> int:
        """Bytes of shared pages for which there is no room any more."""
        return max(0, min(self.shared, self.used + self.shared - self.total))

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)


class Slots:
    """Which slots of one extent are taken.  The lowest is given first, so that the taken ones lie side by side."""

    def __init__(self) -> None:
        self.taken: set[int] = set()
        self._free: list[int] = []
        self._fresh = 0

    def take(self) -> int:
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot, self._fresh = self._fresh, self._fresh + 1
        self.taken.add(slot)
        return slot

    def give(self, slot: int) -> None:
        self.taken.remove(slot)
        heapq.heappush(self._free, slot)

    @property
    def span(self) -> int:
        """One more than the highest slot taken."""
        return max(self.taken, default=-1) + 1


def runs_of(slots: list[int], gap: int = 2) -> list[tuple[int, int]]:
    """Cut sorted ``slots`` into index ranges whose neighbours lie at most ``gap`` apart: each is read as one view."""
    cuts = [0, *(i for i in range(1, len(slots)) if slots[i] - slots[i - 1] > gap), len(slots)]
    return list(itertools.pairwise(cuts))
