"""Pages that sequences share: copies of a few positions of all layers of a range, by number.

What to keep, and under which numbers, is decided elsewhere (mesh/pipeline/prefix.py); here is only where it lies.  A
sequence that begins with pages gets a copy of them: reading neighbouring slots as one block is worth far more than the
copy costs (docs/decisions/0067).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from node.engine.kv_cache import Extent, Place
from node.engine.page_pool import PagedPlace

CHUNK = 64
"""Pages in one extent: it is never copied, and is given back when the last of them is dropped."""

Where = tuple[int, int, int]
"""First layer, end, positions of a page."""


class PageStore:
    """All pages of one model at this engine.  Only the device thread calls it."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[Where, Place]] = {}
        self._extents: dict[Where, list[Extent]] = {}

    def __len__(self) -> int:
        return len(self._places)

    @torch.inference_mode()
    def keep(
        self, source: Place | PagedPlace, start: int, end: int, size: int, pages: Sequence[tuple[int, int]]
    ) -> None:
        """Copy ``size`` positions of ``source``, layers [start, end), for each (first position, number)."""
        where = (start, end, size)
        for position, number in pages:
            place = self._open(where)
            self._places[number] = where, place
            for layer in range(start, end):
                place.write(layer, 0, *source.read(layer, position, size))

    @torch.inference_mode()
    def take(self, target: Place | PagedPlace, start: int, end: int, size: int, pages: Sequence[int]) -> bool:
        """Begin ``target`` with ``pages``; ``False``: not all of them are here."""
        places = [self._places.get(number) for number in pages]
        if any(place is None or place[0] != (start, end, size) for place in places):
            return False
        for index, found in enumerate(places):
            assert found is not None
            for layer in range(start, end):
                target.write(layer, index * size, *found[1].read(layer, 0, size))
        return True

    def drop(self, pages: Sequence[int]) -> None:
        """Numbers that are not here do no harm."""
        for number in pages:
            where, place = self._places.pop(number, (None, None))
            if where is not None and place is not None:
                place.extent.give(place.slot)
                if not place.extent.slots.taken:
                    self._extents[where] = [extent for extent in self._extents[where] if extent is not place.extent]

    @property
    def bytes(self) -> int:
        return sum(extent.bytes for extents in list(self._extents.values()) for extent in list(extents))

    def _open(self, where: Where) -> Place:
        extents = self._extents.setdefault(where, [])
        extent = next((extent for extent in extents if len(extent.slots.taken) < CHUNK), None)
        if extent is None:
            extent = Extent(where[2])
            extents.append(extent)
        return Place(extent, extent.take())
