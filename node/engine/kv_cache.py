"""Keys and values of the packed mode: extents of equal slots, one tensor per layer.

An ``Extent`` holds the sequences of one width class over one range of layers.  Its tensors are [slots, width, heads,
head size]: a step's rows are written by one ``index_copy_`` per layer, and neighbouring slots are read as one view.
The system gives memory when it is first written, and has that of a slot back when its sequence ends; whoever enters a
new page of a slot clears what it does not write of it, so that masked columns are never NaN.
"""

from __future__ import annotations

import torch

from node.engine.memory import Mapping
from node.engine.pages import Slots, padded, width_of


class Extent:
    """Slots of ``width`` positions for layers [start, end)."""

    def __init__(self, width: int) -> None:
        self.width = width
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
            self._layers[index] = (self._new(key), self._new(value))
        return self.tensors(index)

    def tensors(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of layer ``index``, each [slots, width, heads, head size]."""
        keys, values = self._layers[index]
        return keys.tensor, values.tensor

    @property
    def bytes(self) -> int:
        return sum(mapping.tensor.nbytes for mapping in self._mappings())

    def _mappings(self) -> list[Mapping]:
        return [mapping for layer in list(self._layers.values()) for mapping in layer]

    def _new(self, like: torch.Tensor) -> Mapping:
        """For heads like those of ``like`` [T, H, D]."""
        return Mapping(self._room, (self.width, *like.shape[1:]), like)

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

    __slots__ = ("extent", "slot")

    def __init__(self, extent: Extent, slot: int) -> None:
        self.extent, self.slot = extent, slot

    def read(self, layer: int, start: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions [start, start + n): [n, H, D] each."""
        keys, values = self.extent.tensors(layer)
        return keys[self.slot, start : start + n], values[self.slot, start : start + n]

    def write(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Set positions from ``start`` on to ``key`` and ``value`` [n, H, D].  ``ValueError``: other heads."""
        end = start + key.shape[0]
        for target, rows in zip(self.extent.layer(layer, key, value), (key, value), strict=True):
            if target.shape[2:] != rows.shape[1:]:
                raise ValueError(f"layer {layer} has heads {tuple(target.shape[2:])}, not {tuple(rows.shape[1:])}")
            target[self.slot, start:end] = rows
            target[self.slot, end : padded(end)] = 0  # masked columns are never NaN


class KvCache:
    """All extents of one model at this engine, by layer range and width class."""

    def __init__(self) -> None:
        self._extents: dict[tuple[int, int, int], Extent] = {}

    def open(self, start: int, end: int, positions: int) -> Place:
        """A place for up to ``positions`` keys in layers [start, end)."""
        where = (start, end, width_of(positions))
        extent = self._extents.setdefault(where, Extent(where[2]))
        return Place(extent, extent.take())

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
