"""Pages that sequences share: copies of a few positions of all layers of a range, by number.

What to keep, and under which numbers, is decided elsewhere (mesh/pipeline/prefix.py); here is only where it lies.  A
sequence that begins with pages gets a copy of them: reading neighbouring slots as one block is worth far more than the
copy costs (docs/decisions/0067).

A page whose positions have left the windows of its sequence is kept without them.  Who begins behind it can, if it is
told of pages that follow and fill the windows before their end.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from node.engine.kv_cache import Extent, Place
from node.engine.page_pool import PagedPlace

CHUNK = 64
"""Pages in one extent: it is never copied, and is given back when the last of them is dropped."""

Where = tuple[int, int, int]
"""First layer, end, positions of a page."""


class Kept(msgspec.Struct, frozen=True):
    """A page."""

    where: Where
    place: Place
    whole: bool
    """Layers with a window are in it, too."""


class PageStore:
    """All pages of one model at this engine.  Only the device thread calls it."""

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}
        self._extents: dict[Where, list[Extent]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @torch.inference_mode()
    def keep(
        self, source: Place | PagedPlace, start: int, end: int, size: int, pages: Sequence[tuple[int, int]]
    ) -> None:
        """Copy ``size`` positions of ``source``, layers [start, end), for each (first position, number)."""
        where = (start, end, size)
        for position, number in pages:
            held = [layer for layer in range(start, end) if source.base(layer) <= position]
            page = self._kept[number] = Kept(where, self._open(where), len(held) == end - start)
            for layer in held:
                page.place.write(layer, 0, *source.read(layer, position, size))

    @torch.inference_mode()
    def take(self, target: Place | PagedPlace, start: int, end: int, size: int, pages: Sequence[int]) -> bool:
        """Begin ``target`` with ``pages``; ``False``: not all of them are here, or not what windows need of them."""
        found = [self._kept[number] for number in pages if number in self._kept]
        if len(found) < len(pages) or any(page.where != (start, end, size) for page in found):
            return False
        whole = 1 + max((index for index, page in enumerate(found) if not page.whole), default=-1)
        if not target.begin(size * len(found), size * whole):
            return False
        for layer in range(start, end):
            first = target.base(layer) // size
            if parts := [page.place.read(layer, 0, size) for page in found[first:]]:
                target.write(layer, first * size, *(torch.cat(part) for part in zip(*parts, strict=True)))
        return True

    def drop(self, pages: Sequence[int]) -> None:
        """Numbers that are not here do no harm."""
        for number in pages:
            page = self._kept.pop(number, None)
            if page is not None:
                extent = page.place.extent
                extent.give(page.place.slot)
                if not extent.slots.taken:
                    self._extents[page.where] = [each for each in self._extents[page.where] if each is not extent]

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
