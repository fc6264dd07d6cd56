"""Where the rows of one packed forward are written, and which cells they read: planned once for all layers alike.

Rows of single tokens come first, sorted by key length and slot: neighbours in the cache with equal (padded) key
lengths are one batched product.  The other rows are cut into tiles of at most ``PAGE`` queries of one sequence.
Layers are alike where they hold the same positions of every sequence: with the same window, or without.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import torch

from node.engine.kv_cache import Extent, Place
from node.engine.pages import PAGE, Band, padded, runs_of


class Rows(msgspec.Struct, frozen=True):
    """Positions [start, start + n) of the sequence at ``place``."""

    place: Any
    """``Place``, or ``PagedPlace`` off the CPU."""
    start: int
    n: int


class Keys(msgspec.Struct, frozen=True):
    """``count`` keys, of positions from ``first`` on, which lie in a slot from ``cell`` on."""

    cell: int
    first: int
    count: int


class Run(msgspec.Struct, frozen=True):
    """Batch rows [first, last), one a slot, over slots [low, high) of ``extent`` and ``keys`` in each."""

    extent: Extent
    first: int
    last: int
    low: int
    high: int
    keys: Keys
    where: torch.Tensor | None
    """Row -> slot - low; ``None``: every slot of the range has its row."""
    positions: torch.Tensor
    """[high - low]; -1 in slots without a row."""


class Tile(msgspec.Struct, frozen=True):
    """Batch rows [first, last) of one sequence, from position ``start`` on, over ``keys`` of ``slot``."""

    extent: Extent
    slot: int
    first: int
    last: int
    start: int
    keys: Keys


class Write(msgspec.Struct, frozen=True):
    """Batch rows (all, or ``rows``) go to ``index`` of the extent's flattened cells; ``clear``: slot, from, to."""

    extent: Extent
    rows: torch.Tensor | None
    index: torch.Tensor
    clear: tuple[tuple[int, int, int], ...]


def packed_order(rows: Sequence[Rows]) -> list[int]:
    """The order in which ``Cells`` wants its rows: indices into ``rows``."""

    def place_of(i: int) -> tuple[int, int, int, int]:
        r = rows[i]
        return (r.n > 1, id(r.place.extent), padded(r.start + r.n) if r.n == 1 else i, r.place.slot)

    return sorted(range(len(rows)), key=place_of)


class Cells:
    """Of ``rows``, which are in ``packed_order``, in one layer and all that are like it."""

    def __init__(self, rows: Sequence[Rows], layer: int, numbers: Callable[[list[int]], torch.Tensor]) -> None:
        """``numbers``: makes a tensor of some, where the cache is."""
        self._layer, self._numbers = layer, numbers
        self._singles = [r for r in rows if r.n == 1]
        self.pieces: list[Run | Tile] = [*self._make_runs(), *self._make_tiles(rows)]
        self.writes = list(self._make_writes(rows))

    def _band(self, extent: Extent) -> Band | None:
        return extent.bands.get(self._layer)

    def _keys(self, place: Place, end: int) -> Keys:
        """What is read for position ``end`` - 1: a function of it alone, but for the cell."""
        band = self._band(place.extent)
        if band is None:
            return Keys(0, 0, padded(end))
        first = band.first(end - 1)
        cell = first - place.bases[band]
        assert cell >= 0, f"position {end - 1} needs keys from {first} on, held are those from {place.bases[band]} on"
        return Keys(cell, first, padded(end) - first)

    def _make_runs(self) -> Iterator[Run]:
        first = 0
        for keys, members in itertools.groupby(self._singles, self._read_by):
            slots = [r.place.slot for r in members]
            for a, b in runs_of(slots):
                yield self._run(first + a, first + b, keys[1])
            first += len(slots)

    def _read_by(self, r: Rows) -> tuple[int, Keys]:
        return id(r.place.extent), self._keys(r.place, r.start + 1)

    def _run(self, first: int, last: int, keys: Keys) -> Run:
        rows = self._singles[first:last]
        low, high = rows[0].place.slot, rows[-1].place.slot + 1
        positions = [-1] * (high - low)
        for r in rows:
            positions[r.place.slot - low] = r.start
        where = None if high - low == len(rows) else self._numbers([r.place.slot - low for r in rows])
        found = self._numbers(positions)
        return Run(rows[0].place.extent, first, last, low, high, keys, where, found)

    def _make_tiles(self, rows: Sequence[Rows]) -> Iterator[Tile]:
        first = len(self._singles)
        for r in rows[first:]:
            start, end = r.start, r.start + r.n
            while start < end:
                stop = min(end, padded(start + 1))
                keys = self._keys(r.place, stop)
                yield Tile(r.place.extent, r.place.slot, first, first + stop - start, start, keys)
                first, start = first + stop - start, stop

    def _make_writes(self, rows: Sequence[Rows]) -> Iterator[Write]:
        extents: dict[int, list[tuple[int, Rows]]] = {}
        first = count = 0
        for r in rows:
            extents.setdefault(id(r.place.extent), []).append((count, r))
            count += r.n
        for members in extents.values():
            extent = members[0][1].place.extent
            band = self._band(extent)
            width = extent.width if band is None else band.width
            taken = [i for first, r in members for i in range(first, first + r.n)]
            index: list[int] = []
            clear: list[tuple[int, int, int]] = []
            for _, r in members:
                first = r.start - (0 if band is None else r.place.bases[band])
                at, end = r.place.slot * width, first + r.n
                index += range(at + first, at + end)
                if (end - 1) // PAGE * PAGE >= first:  # the rest of a page that is entered now
                    clear.append((r.place.slot, end, padded(end)))
            whole = len(taken) == count
            yield Write(extent, None if whole else self._numbers(taken), self._numbers(index), tuple(clear))
