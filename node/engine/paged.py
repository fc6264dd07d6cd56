"""One packed forward over pages, read by torch's paged attention: what ``batch`` is on the CPU.

A forward writes its rows by one ``index_copy_`` a layer and reads by one kernel for all sequences, which tables tell in
which pages each of them lies.  What that kernel does not do (soft-capped scores, sinks, masks that are no
window, float32) is computed sequence by sequence from gathered pages, by the products of ``batch``.

All numbers of a forward lie in one tensor: one copy brings them to the device, and a captured forward reads them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from node.engine.attention import MaskRule
from node.engine.batch import Packed, plain, special
from node.engine.cells import Rows
from node.engine.page_pool import PAGE, PagePool
from node.engine.transfer import host_empty
from node.engine.windows import additive, visible, window_of

HALVES = (torch.bfloat16, torch.float16)
HEAD_MOST = 256
"""The widest head that FlashAttention 2 takes; it must be a multiple of 8, the same for keys and values."""


class Layout(msgspec.Struct, frozen=True):
    """How a forward's numbers lie in one int32 tensor: ``total`` rows of ``count`` sequences, tables ``pages`` wide."""

    total: int
    count: int
    pages: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Positions, places in the pool, starts of the sequences, the same of their keys, keys used, tables."""
        return self.total, self.total, self.count + 1, self.count + 1, self.count, self.count * self.pages

    def fill(self, rows: Sequence[Rows], out: np.ndarray) -> None:
        """Write the numbers of ``rows`` to ``out`` [sum(sizes)]; the rest are sequences of one position in page 0."""
        out[:] = 0
        positions, places, starts, key_starts, used, tables = np.split(out, np.cumsum(self.sizes)[:-1])
        tables = tables.reshape(self.count, self.pages)
        firsts, lengths = np.array([(r.start, r.n) for r in rows], np.int32).T
        filled, used[:], starts[1:] = len(rows), 1, 1
        used[:filled] = firsts + lengths
        starts[1 : filled + 1] = lengths
        np.cumsum(starts, out=starts)
        np.cumsum(used, out=key_starts[1:])
        for i, r in enumerate(rows):
            pages = -(-(r.start + r.n) // PAGE)
            tables[i, :pages] = r.place.pages[:pages]
        owner = np.repeat(np.arange(filled), lengths)
        at = np.arange(len(owner)) - starts[owner] + firsts[owner]
        positions[: len(at)] = at
        places[: len(at)] = tables[owner, at // PAGE] * PAGE + at % PAGE


def layout_of(rows: Sequence[Rows], total: int) -> Layout:
    """The smallest that holds ``rows``, filled up to ``total`` rows."""
    given = sum(r.n for r in rows)
    return Layout(total, len(rows) + total - given, max(-(-(r.start + r.n) // PAGE) for r in rows))


def numbers_of(layout: Layout, rows: Sequence[Rows], device: torch.device, ids: Sequence[int] = ()) -> torch.Tensor:
    """The numbers of ``rows``, and ``ids`` behind them, in memory of the CPU that ``device`` may read by itself."""
    size = sum(layout.sizes)
    host = host_empty((size + len(ids),), torch.int32, device)
    array = host.numpy()
    layout.fill(rows, array[:size])
    array[size:] = ids
    return host


class PagedBatch(Packed):
    """The attention of one packed forward over pages; stands where ``Batch`` stands on the CPU."""

    def __init__(self, pool: PagePool, layout: Layout, numbers: torch.Tensor, count: int, longest: int) -> None:
        """``numbers``: as ``layout`` says, on the device; ``count`` of its rows are no filling, and no sequence has
        more than ``longest`` of them."""
        positions, places, *rest = numbers[: sum(layout.sizes)].split(layout.sizes)
        super().__init__(count, layout.total, positions.long())
        self._pool, self._layout, self._longest = pool, layout, longest
        self._places = places.long()
        self._starts, self._key_starts, self._used, tables = rest
        self._tables = tables.view(layout.count, layout.pages)
        self.one_kernel = True
        """Every layer so far was one kernel: nothing was read back from the device."""
        self._learned: dict[int, tuple[MaskRule | None, int | None]] = {}
        self._spans: tuple[list[int], list[int]] | None = None
        self._masks: dict[tuple[int, int], tuple[MaskRule | None, torch.Tensor]] = {}
        """By a rule's id, which is not given away while the rule is here."""

    @staticmethod
    def of(pool: PagePool, rows: Sequence[Rows], device: torch.device, total: int) -> PagedBatch:
        """Over ``rows`` in their order, filled up to ``total`` rows."""
        layout = layout_of(rows, total)
        numbers = numbers_of(layout, rows, device).to(device, non_blocking=True)
        return PagedBatch(pool, layout, numbers, sum(r.n for r in rows), max(r.n for r in rows))

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: MaskRule | None,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the rows' keys and values, read what they may see.  [T, H, D] each -> [T, Hq, Dv]."""
        self.seen[layer] = (tuple(key.shape[1:]), tuple(value.shape[1:]))
        keys, values = self._pool.layer(layer, key, value)
        keys.flatten(0, 1).index_copy_(0, self._places, key)
        values.flatten(0, 1).index_copy_(0, self._places, value)
        window = self._window(layer, rule)
        if window is None or softcap is not None or sinks is not None or not fits_kernel(query, value):
            self.one_kernel = False
            return self._one_by_one(query, keys, values, rule, (scale, softcap, sinks))
        return varlen_attn(
            query,
            keys,
            values,
            self._starts,
            self._key_starts,  # unused beside a table, and yet asked for
            self._longest,
            self._layout.pages * PAGE,
            scale=scale,
            window_size=(window, 0),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=self._used,
            block_table=self._tables,
            num_splits=1,  # what torch 2.13 chooses by itself gives NaN with tables (pytorch issue 194167)
        )

    def _window(self, layer: int, rule: MaskRule | None) -> int | None:
        known = self._pool.windows
        if layer not in known:
            if id(rule) not in self._learned:
                self._learned[id(rule)] = rule, window_of(rule, self.positions.device)
            known[layer] = self._learned[id(rule)][1]
        return known[layer]

    def _one_by_one(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: MaskRule | None,
        options: tuple[float, float | None, torch.Tensor | None],
    ) -> torch.Tensor:
        product = plain if options[1] is None and options[2] is None else special
        out = query.new_empty((*query.shape[:2], values.shape[-1]))
        if self._spans is None:
            self._spans = self._starts.tolist(), self._used.tolist()
        starts, used = self._spans
        for i, length in enumerate(used):
            a, b = starts[i], starts[i + 1]
            pages = self._tables[i, : -(-length // PAGE)].long()
            held = [t[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for t in (keys, values)]
            if (id(rule), i) not in self._masks:
                seen = visible(rule, self.positions[a:b], 0, length)
                self._masks[id(rule), i] = rule, additive(seen, query.dtype)[None, None]
            found = product(query[a:b].transpose(0, 1)[None], *held, self._masks[id(rule), i][1], *options)
            out[a:b] = found[0].transpose(0, 1)
        return out


def varlen_attn(*args: Any, **options: Any) -> torch.Tensor:
    """torch's own, imported at first use: that takes seconds, and a node on the CPU has no need of it."""
    from torch.nn.attention import varlen

    return varlen.varlen_attn(*args, **options)


def fits_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's paged attention takes such heads."""
    size = query.shape[-1]
    halves = query.device.type == "cuda" and query.dtype in HALVES
    return halves and size == value.shape[-1] and size % 8 == 0 and size <= HEAD_MOST
