"""Keys and values of the packed mode: extents of equal slots, one tensor per layer.

An ``Extent`` holds the sequences of one width class over one range of layers.  Its tensors are [slots, width, heads,
head size]: a step's rows are written by one ``index_copy_`` per layer, and neighbouring slots are read as one view.
The system gives memory when it is first written, and has that of a slot back when its sequence ends; whoever enters a
new page of a slot clears what it does not write of it, so that masked columns are never NaN.

In layers with a window a slot holds the last positions only, one after the other from its *base* on, which is at a page
(docs/decisions/0100).  Where the next rows would not fit, what is still needed moves to the front of the slot.  So what
is read is one view there, too, and position p of a sequence is in cell p - base of its slot.
"""

from __future__ import annotations

import torch

from node.engine.memory import Mapping
from node.engine.pages import PAGE, STEP_ROWS, Band, Slots, band_of, padded, width_of

Windows = dict[int, int | None]
"""Layer -> how many keys before itself a query sees, see ``windows.window_of``."""


class Extent:
    """Slots of ``width`` positions for layers [start, end), but in layers with a band of its width."""

    def __init__(self, width: int, bands: dict[int, Band] | None = None) -> None:
        self.width, self.bands = width, dict(bands or {})
        self.slots = Slots()
        self._room = 0
        self._layers: dict[int, tuple[Mapping, Mapping]] = {}
        """Keys and values of each layer."""

    def take(self) -> int:
        """A slot for a new sequence; grows the tensors to hold it."""
        slot = self.slots.take()
        if slot >= self._room:
            self._resize(max(2 * self._room, slot + 1))
        return slot

    def give(self, slot: int) -> None:
        """Free ``slot``; the tensors shrink when three quarters of them are past the highest slot taken."""
        self.slots.give(slot)
        if self.slots.span * 4 <= self._room:
            self._resize(self.slots.span)
            return
        for mapping in self._mappings():
            mapping.release(slot)

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors of layer ``index``, made for heads like those of ``key`` and ``value`` [T, H, D]."""
        if index not in self._layers:
            self._layers[index] = (self._new(index, key), self._new(index, value))
        return self.tensors(index)

    def move(self, slot: int, band: Band, by: int, n: int) -> None:
        """In the layers of ``band``, bring ``n`` positions of ``slot`` to its front, from where they are: ``by``."""
        for index in [index for index, each in self.bands.items() if each == band and index in self._layers]:
            for tensor in self.tensors(index):
                tensor[slot, :n] = tensor[slot, by : by + n].clone()

    def tensors(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of layer ``index``, each [slots, width of the layer, heads, head size]."""
        keys, values = self._layers[index]
        return keys.tensor, values.tensor

    @property
    def bytes(self) -> int:
        return sum(mapping.tensor.nbytes for mapping in self._mappings())

    def _mappings(self) -> list[Mapping]:
        return [mapping for layer in list(self._layers.values()) for mapping in layer]

    def _new(self, index: int, like: torch.Tensor) -> Mapping:
        """For heads like those of ``like`` [T, H, D]."""
        width = self.bands[index].width if index in self.bands else self.width
        return Mapping(self._room, (width, *like.shape[1:]), like)

    def _resize(self, room: int) -> None:
        kept = min(self._room, room)
        for index, layer in list(self._layers.items()):
            new = []
            for old in layer:
                grown = Mapping(room, old.tensor.shape[1:], old.tensor)
                grown.tensor[:kept] = old.tensor[:kept]
                new.append(grown)
            self._layers[index] = (new[0], new[1])
        self._room = room


class Place:
    """Where a sequence lives in the cache."""

    __slots__ = ("bases", "extent", "slot")

    def __init__(self, extent: Extent, slot: int) -> None:
        self.extent, self.slot = extent, slot
        self.bases = dict.fromkeys(extent.bands.values(), 0)
        """Of each band, the position in cell 0: what is computed of the sequence is held from there on."""

    def base(self, layer: int) -> int:
        """The first position that is held in ``layer``."""
        band = self.extent.bands.get(layer)
        return self.bases[band] if band is not None else 0

    # -- what windows hold ---------------------------------------------------------------------------------------------

    def make_room(self, start: int, n: int) -> None:
        """Positions [start, start + n) are written next."""
        for band in self.bases:
            self._make_room(band, start, n)

    @torch.inference_mode()
    def _make_room(self, band: Band, start: int, n: int) -> None:
        base = self.bases[band]
        moved = band.moved(base, start, n)
        if base < moved < start:
            self.extent.move(self.slot, band, moved - base, start - moved)
        self.bases[band] = moved

    def cut(self, length: int) -> bool:
        """Positions from ``length`` on are void.  ``False``: a window before ``length`` is gone, and nothing is held.

        What void positions left behind is past what any row sees until it is written again.
        """
        if all(base <= band.first(length) for band, base in self.bases.items()):
            return True
        self.bases = dict.fromkeys(self.bases, 0)
        return not length

    def begin(self, length: int, held: int) -> bool:
        """Positions [0, length) are written next, of which windows have those from ``held`` on; ``False``: too few."""
        bases = {band: max(band.start(length), padded(held)) for band in self.bases}
        if any(base > band.first(length) for band, base in bases.items()):
            return False
        self.bases = bases
        return True

    def extend(self, start: int, n: int, lacking: dict[int, int]) -> None:
        """Positions [start, start + n) are written next; layers with a window lack the first so many of them.

        ``ValueError``: what they are given does not follow what they hold.
        """
        begins = {band: self._begins(band, start, n, lacking) for band in self.bases}
        if any(count and layer not in self.extent.bands for layer, count in lacking.items()):
            raise ValueError("positions are lacking in a layer that sees all of them")
        for band, begin in begins.items():
            if begin > start:
                self.bases[band] = begin
            if begin < start + n:
                self._make_room(band, begin, start + n - begin)

    def _begins(self, band: Band, start: int, n: int, lacking: dict[int, int]) -> int:
        """The first position that is given; past the last, at a page: none is."""
        counts = {lacking.get(layer, 0) for layer, each in self.extent.bands.items() if each == band}
        count = counts.pop()
        begin = padded(start + n) if 0 < count == n else start + count
        follows = begin % PAGE == 0 if count else self.bases[band] <= start
        if counts or not follows or begin < self.bases[band]:
            raise ValueError(f"windows lack {count} positions from {start} on")
        return begin

    # -- reading and writing -------------------------------------------------------------------------------------------

    def read(self, layer: int, start: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions [start, start + n), which are held: [n, H, D] each."""
        keys, values = self.extent.tensors(layer)
        cell = max(0, start - self.base(layer))
        return keys[self.slot, cell : cell + n], values[self.slot, cell : cell + n]

    def write(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Set positions from ``start`` on, but none before the base, to ``key`` and ``value`` [n, H, D].

        ``ValueError``: other heads.
        """
        base = self.base(layer)
        skipped, end = max(0, base - start), start + key.shape[0] - base
        if end <= 0:
            return
        for target, rows in zip(self.extent.layer(layer, key, value), (key, value), strict=True):
            if target.shape[2:] != rows.shape[1:]:
                raise ValueError(f"layer {layer} has heads {tuple(target.shape[2:])}, not {tuple(rows.shape[1:])}")
            target[self.slot, start + skipped - base : end] = rows[skipped:]
            target[self.slot, end : padded(end)] = 0  # masked columns are never NaN


class KvCache:
    """All extents of one model at this engine, by layer range and width class."""

    def __init__(self, windows: Windows | None = None, step_rows: int = STEP_ROWS) -> None:
        """``windows``: what is known of the model's masks, now or later; ``step_rows``: of one sequence in a step."""
        self._windows, self._step_rows = {} if windows is None else windows, step_rows
        self._extents: dict[tuple[int, int, int], Extent] = {}

    def open(self, start: int, end: int, positions: int) -> Place:
        """A place for up to ``positions`` keys in layers [start, end)."""
        where = (start, end, width_of(positions))
        extent = self._extents.get(where)
        if extent is None:
            extent = self._extents[where] = Extent(where[2], self._bands(*where))
        return Place(extent, extent.take())

    def _bands(self, start: int, end: int, width: int) -> dict[int, Band]:
        before = {layer: self._windows.get(layer) for layer in range(start, end)}
        return {i: band_of(n + 1, width, self._step_rows) for i, n in before.items() if n is not None and n >= 0}

    def close(self, place: Place) -> None:
        """Free a place; an extent without any is dropped."""
        place.extent.give(place.slot)
        if not place.extent.slots.taken:
            self._extents = {where: extent for where, extent in self._extents.items() if extent is not place.extent}

    @property
    def bytes(self) -> int:
        return sum(extent.bytes for extent in list(self._extents.values()))

    @property
    def sequences(self) -> int:
        return sum(len(extent.slots.taken) for extent in self._extents.values())
