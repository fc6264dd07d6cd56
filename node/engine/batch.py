"""The attention of one packed forward: it writes keys and values, and reads them by few large products (``cells.py``).

**Same bits, whatever the company.**  A row's result may depend on its position alone, never on the batch or the chunk
that it came in.  Matrix products take other paths for fewer than 4 rows and block their sums by the key length.  So
queries go in fours (a single token's heads that share a key head are padded to 4 rows), tiles end at absolute
multiples of ``PAGE``, and keys are read from the page where the window of a position's page begins (0 without one) to
the position rounded up to a page, the rest masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from node.engine.attention import MaskRule
from node.engine.cells import Cells, Keys, Rows, Run, Tile
from node.engine.pages import Band
from node.engine.windows import additive, visible

Mask = torch.Tensor


class Packed:
    """What a forward asks of its batch, whichever way keys and values are held."""

    def __init__(self, count: int, padded_count: int, positions: torch.Tensor) -> None:
        self.count, self.padded_count = count, padded_count
        """Rows, and rows of the forward: what is more only fills it up."""
        self.positions = positions
        """[padded_count], on the device."""
        self.seen: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        """Layer -> shapes of its keys and values, to learn a position's bytes."""
        self._turning: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def turning(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, T, D] each, the same for all layers -> [T, 1, D] each, to turn pairs of halves by.

        x * cos + rotate_half(x) * sin = x * cos + roll(x, D / 2) * signed(sin).
        """
        if self._turning is None or self._turning[0] is not cos:
            self._turning = (cos, cos[0, :, None], signed(sin[0])[:, None])
        return self._turning[1:]


def signed(sin: torch.Tensor) -> torch.Tensor:
    """A copy of [T, D] with the first half of each row negated."""
    found = sin.clone()
    found[:, : sin.shape[-1] // 2].neg_()
    return found


class Batch(Packed):
    """The attention of one packed forward over ``rows``, which are in ``packed_order``."""

    def __init__(self, rows: Sequence[Rows], device: torch.device, padded: int = 0) -> None:
        """``padded``: rows of the forward, if more; the last one is repeated."""
        count = sum(r.n for r in rows)
        positions = [p for r in rows for p in range(r.start, r.start + r.n)]
        positions += positions[-1:] * (padded - count)
        self._device = device
        super().__init__(count, len(positions), self._numbers(positions))
        self.reach = max(positions) + 1
        """All positions are below."""
        self.rules: dict[int, MaskRule | None] = {}
        """Layer -> its mask's rule, whose id is not given away while it is here."""
        self._masks: dict[tuple[int, int, int], Mask] = {}
        self._buffers: dict[tuple[int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows = rows
        banded = [r for r in rows if r.place.bases]
        for r in banded:
            r.place.make_room(r.start, r.n)
        self._banded = list({id(r.place.extent): r.place.extent for r in banded}.values())
        """Extents with layers that are not all alike."""
        self._cells: dict[tuple[Band | None, ...], tuple[int, Cells]] = {}
        """With the number of the first piece."""

    def _numbers(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values).to(self._device)

    def _cells_of(self, layer: int) -> tuple[int, Cells]:
        like = tuple([extent.bands.get(layer) for extent in self._banded]) if self._banded else ()
        found = self._cells.get(like)
        if found is None:
            number = sum(len(cells.pieces) for _, cells in self._cells.values())
            found = self._cells[like] = number, Cells(self._rows, layer, self._numbers)
        return found

    # -- attention -----------------------------------------------------------------------------------------------------

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
        self.rules[layer] = rule
        first, cells = self._cells_of(layer)
        self._write(cells, layer, key, value)
        product = plain if softcap is None and sinks is None else special
        options = (scale, softcap, sinks)
        # Rows that only fill up the batch stay zero: NaN would confuse a router.
        make = query.new_empty if query.shape[0] == self.count else query.new_zeros
        out = make((*query.shape[:2], value.shape[-1]))
        for number, piece in enumerate(cells.pieces, first):
            if piece.last - piece.first == query.shape[0]:
                self._attend_piece(number, piece, layer, query, out, rule, product, options)
            else:
                rows, found = query[piece.first : piece.last], out[piece.first : piece.last]
                self._attend_piece(number, piece, layer, rows, found, rule, product, options)
        return out

    def _write(self, cells: Cells, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.seen[layer] = (tuple(key.shape[1:]), tuple(value.shape[1:]))
        for write in cells.writes:
            for target, source in zip(write.extent.layer(layer, key, value), (key, value), strict=True):
                for slot, low, high in write.clear:
                    target[slot, low:high] = 0
                rows = source
                if write.rows is not None:
                    rows = rows[write.rows]
                elif rows.shape[0] != self.count:
                    rows = rows.narrow(0, 0, self.count)
                target.flatten(0, 1).index_copy_(0, write.index, rows)

    def _attend_piece(
        self,
        number: int,
        piece: Run | Tile,
        layer: int,
        rows: torch.Tensor,
        out: torch.Tensor,
        rule: MaskRule | None,
        product: Callable[..., torch.Tensor],
        options: tuple[Any, ...],
    ) -> None:
        """``rows`` [last - first, Hq, D] -> ``out`` [last - first, Hq, Dv]."""
        low, high = (piece.low, piece.high) if isinstance(piece, Run) else (piece.slot, piece.slot + 1)
        keys, values = (_view(t, low, high, piece.keys) for t in piece.extent.tensors(layer))
        if isinstance(piece, Tile):
            query, n = rows.transpose(0, 1)[None], rows.shape[0]
            if n % 4:
                query = F.pad(query, (0, 0, 0, -n % 4))
            mask = self._tile_mask(rule, number, piece, query)
            out.copy_(product(query, keys, values, mask, *options)[0, :, :n].transpose(0, 1))
            return
        key_heads = keys.shape[1]
        query = rows.reshape(rows.shape[0], key_heads, -1, rows.shape[2])
        group = query.shape[2]
        if piece.where is not None or group % 4:
            query = self._widened(number, piece, query)
        mask = self._run_mask(rule, number, piece, query)
        found = product(query, keys, values, mask, *options)
        found = found if group % 4 == 0 else found.narrow(2, 0, group)
        out.view(-1, key_heads, group, out.shape[2]).copy_(found if piece.where is None else found[piece.where])

    def _widened(self, number: int, run: Run, query: torch.Tensor) -> torch.Tensor:
        """Queries of a run in whole fours, a row a slot; what no query is written to stays zero through all layers."""
        shape = (run.high - run.low, query.shape[1], -(-query.shape[2] // 4) * 4, query.shape[3])
        found = self._buffers.get((number, shape))
        if found is None:
            wide = query.new_zeros(shape)
            found = self._buffers[number, shape] = (wide, wide.narrow(2, 0, query.shape[2]))
        wide, inner = found
        if run.where is None:
            inner.copy_(query)
        else:
            inner[run.where] = query
        return wide

    # -- masks: additive, made once for each rule and piece ------------------------------------------------------------

    def _run_mask(self, rule: MaskRule | None, piece: int, run: Run, query: torch.Tensor) -> Mask:
        """[slots, 1, heads of a group, keys]: the same for all heads of a slot."""
        count = query.shape[2]
        found = self._masks.get((id(rule), piece, count))
        if found is None:
            one = self._make_mask(rule, run.positions, run.keys, query)[:, None, None]
            found = self._masks[id(rule), piece, count] = one.expand(-1, -1, count, -1)
        return found

    def _tile_mask(self, rule: MaskRule | None, piece: int, tile: Tile, query: torch.Tensor) -> Mask:
        """[1, 1, queries in whole fours, keys]."""
        n = query.shape[2]
        found = self._masks.get((id(rule), piece, n))
        if found is None:
            positions = torch.arange(tile.start, tile.start + n, device=self._device)
            found = self._make_mask(rule, positions, tile.keys, query)[None, None]
            self._masks[id(rule), piece, n] = found
        return found

    def _make_mask(self, rule: MaskRule | None, positions: torch.Tensor, keys: Keys, query: torch.Tensor) -> Mask:
        """0 where a query at ``positions`` [n] sees a key, -inf elsewhere: [n, keys]."""
        return additive(visible(rule, positions, keys.first, keys.count), query.dtype)


def _view(tensor: torch.Tensor, low: int, high: int, keys: Keys) -> torch.Tensor:
    """``keys`` of slots [low, high) of a contiguous [slots, width, H, D] as [slots, H, keys, D]."""
    _, width, heads, size = tensor.shape
    row = heads * size
    shape, strides = (high - low, heads, keys.count, size), (width * row, size, row, 1)
    return tensor.as_strided(shape, strides, (low * width + keys.cell) * row)


def plain(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Mask, scale: float, *_: Any
) -> torch.Tensor:
    """``query`` [B, Hq, N, D], ``keys`` [B, Hk, K, D], ``values`` [B, Hk, K, Dv], additive mask -> [B, Hq, N, Dv]."""
    shared = query.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=shared)


def special(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """With soft-capped scores or attention sinks, which no fused kernel here takes."""
    slots, key_heads, length, size = keys.shape
    count = query.shape[1] * query.shape[2] // key_heads
    scores = torch.matmul(query.reshape(slots, key_heads, count, size), keys.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(slots, *query.shape[1:3], length) + mask
    weights = _softmax(scores, sinks, key_heads)
    found = torch.matmul(weights.to(values.dtype).view(slots, key_heads, count, length), values)
    return found.view(slots, *query.shape[1:3], -1)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None, key_heads: int) -> torch.Tensor:
    """Over the keys; ``sinks`` [Hq] take a share of every row of their head and give nothing.

    Rows of a run are [slots, key heads, heads of the group, keys], rows of a tile [1, heads, queries, keys].
    """
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.float().view(1, -1, 1, 1)
    if scores.shape[1] != sinks.shape[0]:
        sink = F.pad(sinks.float().view(1, key_heads, -1), (0, scores.shape[2] - sinks.shape[0] // key_heads))[
            ..., None
        ]
    peak = torch.maximum(scores.amax(-1, keepdim=True), sink)
    weights = (scores - peak).exp()
    return weights / (weights.sum(-1, keepdim=True) + (sink - peak).exp())
