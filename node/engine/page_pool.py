"""Pages of keys and values on a device that is not the CPU: one pool a model, and the pages that each sequence holds.

A sequence's positions lie in pages of ``PAGE``, in any order.  Page 0 belongs to nobody: rows that only fill up a
forward are sequences of one position there.  The pool grows by doubling, and stays while its model does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from node.engine.pages import GPU_PAGE as PAGE
from node.engine.pages import Slots, paged_width


class PagePool:
    """The pages of one model: a layer's keys and its values are each [pages, PAGE, heads, head size]."""

    def __init__(self, budget: int = 0, windows: dict[int, int | None] | None = None) -> None:
        """``budget``: bytes past which it grows by what is needed only; ``windows``: what the shard knows of them."""
        self.slots = Slots()
        self.slots.take()
        self.moved = 0
        """How often its tensors were made anew: what holds their addresses is void then."""
        self.windows: dict[int, int | None] = {} if windows is None else windows
        """Layer -> how many keys before itself a query sees, see ``windows.window_of``."""
        self._budget = budget
        self._room = 1
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, positions: int) -> tuple[int, ...]:
        pages = tuple(self.slots.take() for _ in range(paged_width(positions) // PAGE))
        if self.slots.span > self._room:
            self._grow()
        return pages

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors of layer ``index``, made for heads like those of ``key`` and ``value`` [T, H, D]."""
        if index not in self._layers:
            self._layers[index] = (self._new(key, key.shape[1:]), self._new(value, value.shape[1:]))
        return self._layers[index]

    def tensors(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layers[index]

    def keep(self, layers: Collection[int]) -> None:
        """Give up the tensors of other layers.  Should these come back, they are made as large as the pool is then."""
        self._layers = {index: layer for index, layer in self._layers.items() if index in layers}

    @property
    def page_bytes(self) -> int:
        """Of a page in all layers."""
        return sum(t[0].nbytes for layer in list(self._layers.values()) for t in layer)

    def _new(self, like: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        # Zeros: what a kernel reads and masks must not be NaN.
        return like.new_zeros(self._room, PAGE, *heads)

    def _grow(self) -> None:
        """Twice as large, if the budget has room for it: the tensors move seldom."""
        most = self._budget // self.page_bytes if self._layers else self.slots.span
        self._room = max(self.slots.span, min(2 * self._room, most))
        for index, layer in list(self._layers.items()):
            new = [self._new(old, old.shape[2:]) for old in layer]
            for old, grown in zip(layer, new, strict=True):
                grown[: old.shape[0]] = old
            self._layers[index] = (new[0], new[1])
        self.moved += 1


class PagedPlace:
    """Where a sequence lives in the pool."""

    __slots__ = ("pages", "pool")

    def __init__(self, pool: PagePool, pages: Sequence[int]) -> None:
        self.pool, self.pages = pool, np.array(pages, np.int32)

    def base(self, layer: int) -> int:
        """The first position that is held in ``layer``: pages are of all layers, with a window or without."""
        return 0

    def cut(self, length: int) -> bool:
        return True

    def begin(self, length: int, held: int) -> bool:
        return held == 0

    def extend(self, start: int, n: int, lacking: dict[int, int]) -> None:
        """``ValueError``: positions are lacking."""
        if any(lacking.values()):
            raise ValueError("positions are lacking in a layer that holds all of them")

    def _index(self, start: int, n: int, device: torch.device) -> torch.Tensor:
        """Where positions [start, start + n) lie among all positions of the pool."""
        positions = np.arange(start, start + n)
        return torch.from_numpy(self.pages[positions // PAGE].astype(np.int64) * PAGE + positions % PAGE).to(device)

    def read(self, layer: int, start: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the keys and values of positions [start, start + n): [n, H, D] each."""
        keys, values = self.pool.tensors(layer)
        index = self._index(start, n, keys.device)
        return keys.flatten(0, 1)[index], values.flatten(0, 1)[index]

    def write(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Set positions from ``start`` on to ``key`` and ``value`` [n, H, D].  ``ValueError``: other heads."""
        index = self._index(start, key.shape[0], key.device)
        for target, rows in zip(self.pool.layer(layer, key, value), (key, value), strict=True):
            if target.shape[2:] != rows.shape[1:]:
                raise ValueError(f"layer {layer} has heads {tuple(target.shape[2:])}, not {tuple(rows.shape[1:])}")
            target.flatten(0, 1).index_copy_(0, index, rows)


class PagedCache:
    """All pages of one model at this engine."""

    def __init__(self, budget: int = 0, windows: dict[int, int | None] | None = None) -> None:
        self.pool = PagePool(budget, windows)

    def open(self, start: int, end: int, positions: int) -> PagedPlace:
        """A place for up to ``positions`` keys; pages are of all layers, whichever the sequence uses."""
        return PagedPlace(self.pool, self.pool.take(positions))

    def close(self, place: PagedPlace) -> None:
        for page in place.pages:
            self.pool.slots.give(int(page))

    @property
    def bytes(self) -> int:
        """Of the pages that sequences hold; the pool stays while the model does."""
        return (len(self.pool.slots.taken) - 1) * self.pool.page_bytes
