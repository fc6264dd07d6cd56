"""Host memory that goes back to the system when it is given up.

What malloc is given back it mostly keeps for whoever asks next: a node that was busy once would stay as large for good.
Keys and values, which come and go all the time, lie in mappings of their own.  Weights, which come and go with their
layers, are torch's, and ``trim`` is called behind them.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Callable, Sequence

import torch


def trim(device: torch.device | None = None) -> None:
    """Give the system what malloc keeps of memory that nobody holds any more (a no-op without glibc), and ``device``,
    if it is a GPU, what torch keeps there."""
    if (call := _malloc_trim()) is not None:
        call(0)
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (OSError, AttributeError, TypeError):
        return None


class Mapping:
    """A tensor [n, ...] in memory of its own: resident where it was written, unmapped with the last view of it."""

    def __init__(self, n: int, shape: Sequence[int], like: torch.Tensor) -> None:
        """``n`` items of ``shape``, as ``like`` in dtype and device; off the CPU it is an ordinary tensor."""
        self._item = math.prod(shape) * like.dtype.itemsize
        self._map: mmap.mmap | None = None
        if like.device.type == "cpu" and n * self._item:
            # Private: shared pages that are released keep what they hold, and their memory.
            self._map = mmap.mmap(-1, n * self._item, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.tensor = torch.frombuffer(self._map, dtype=like.dtype).view(n, *shape)
        else:
            self.tensor = like.new_empty(n, *shape)

    def release(self, index: int) -> None:
        """Nobody needs item ``index`` any more: it reads as zeros, and takes no memory until it is written again."""
        start, end = index * self._item, (index + 1) * self._item
        start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and start < end:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
