"""One packed forward: where its rows are written, and which keys each row reads.  Built once, used by all layers.

Rows of single tokens come first, sorted by key length and slot: neighbours in the cache with equal (padded) key
lengths are one batched product.  The other rows are cut into tiles of at most ``PAGE`` queries of one sequence.

**Same bits, whatever the company.**  A row's result may depend on its position alone, never on the batch or the chunk
that it came in.  Matrix products take other paths for fewer than 4 rows and block their sums by the key length.  So
queries go in fours (a single token's heads that share a key head are padded to 4 rows), tiles end at absolute
multiples of ``PAGE``, and the key length is the position rounded up to a page, the rest masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
import torch.nn.functional as F

from node.engine.attention import MaskRule
from node.engine.kv_cache import Extent
from node.engine.pages import PAGE, padded, runs_of

Mask = torch.Tensor


class Rows(msgspec.Struct, frozen=True):
    """Positions [start, start + n) of the sequence at ``place``."""

    place: Any
    """``Place``, or ``PagedPlace`` off the CPU."""
    start: int
    n: int


class Run(msgspec.Struct, frozen=True):
    """Batch rows [first, last), one a slot, over slots [low, high) of ``extent`` and ``keys`` keys."""

    extent: Extent
    first: int
    last: int
    low: int
    high: int
    keys: int
    where: torch.Tensor | None
    """Row -> slot - low; ``None``: every slot of the range has its row."""
    positions: torch.Tensor
    """[high - low]; -1 in slots without a row."""


class Tile(msgspec.Struct, frozen=True):
    """Batch rows [first, last) of one sequence, from position ``start`` on, over ``keys`` keys of ``slot``."""

    extent: Extent
    slot: int
    first: int
    last: int
    start: int
    keys: int


class Write(msgspec.Struct, frozen=True):
    """Batch rows (all, or ``rows``) go to ``index`` of the extent's flattened positions; ``clear``: slot, from, to."""

    extent: Extent
    rows: torch.Tensor | None
    index: torch.Tensor
    clear: tuple[tuple[int, int, int], ...]


def packed_order(rows: Sequence[Rows]) -> list[int]:
    """The order in which ``Batch`` wants its rows: indices into ``rows``."""

    def place_of(i: int) -> tuple[int, int, int, int]:
        r = rows[i]
        return (r.n > 1, id(r.place.extent), padded(r.start + r.n) if r.n == 1 else i, r.place.slot)

    return sorted(range(len(rows)), key=place_of)


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

    def __init__(self, rows: Sequence[Rows], device: torch.device, multiple: int = 1) -> None:
        """The last row is repeated to a multiple of ``multiple``."""
        count = sum(r.n for r in rows)
        positions = [p for r in rows for p in range(r.start, r.start + r.n)]
        positions += positions[-1:] * (-count % multiple)
        self._device = device
        super().__init__(count, len(positions), self._numbers(positions))
        self.reach = max(positions) + 1
        """All positions are below."""
        self._masks: dict[tuple[int, int, int], Mask] = {}
        self._rules: list[MaskRule | None] = []
        self._buffers: dict[tuple[int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}
        self._columns: dict[int, torch.Tensor] = {}
        self._singles = [r for r in rows if r.n == 1]
        self._runs = list(self._make_runs())
        self._tiles = list(self._make_tiles(rows))
        self._writes = list(self._make_writes(rows))

    # -- the plan ------------------------------------------------------------------------------------------------------

    def _make_runs(self) -> Any:
        groups: dict[tuple[int, int], list[int]] = {}
        for i, r in enumerate(self._singles):
            groups.setdefault((id(r.place.extent), padded(r.start + 1)), []).append(i)
        for (_, keys), members in groups.items():
            slots = [self._singles[i].place.slot for i in members]
            for a, b in runs_of(slots):
                yield self._run(members[a], members[b - 1] + 1, keys)

    def _run(self, first: int, last: int, keys: int) -> Run:
        rows = self._singles[first:last]
        low, high = rows[0].place.slot, rows[-1].place.slot + 1
        positions = [-1] * (high - low)
        for r in rows:
            positions[r.place.slot - low] = r.start
        where = None if high - low == len(rows) else self._numbers([r.place.slot - low for r in rows])
        found = self._numbers(positions)
        return Run(rows[0].place.extent, first, last, low, high, keys, where, found)

    def _make_tiles(self, rows: Sequence[Rows]) -> Any:
        first = len(self._singles)
        for r in rows[first:]:
            start, end = r.start, r.start + r.n
            while start < end:
                stop = min(end, padded(start + 1))
                yield Tile(r.place.extent, r.place.slot, first, first + stop - start, start, padded(stop))
                first, start = first + stop - start, stop

    def _make_writes(self, rows: Sequence[Rows]) -> Any:
        extents: dict[int, list[tuple[int, Rows]]] = {}
        first = 0
        for r in rows:
            extents.setdefault(id(r.place.extent), []).append((first, r))
            first += r.n
        for members in extents.values():
            extent = members[0][1].place.extent
            index = [r.place.slot * extent.width + p for _, r in members for p in range(r.start, r.start + r.n)]
            taken = [i for first, r in members for i in range(first, first + r.n)]
            whole = len(taken) == self.count
            yield Write(
                extent,
                None if whole else self._numbers(taken),
                self._numbers(index),
                tuple(self._fresh_tail(r) for _, r in members if (r.start + r.n - 1) // PAGE * PAGE >= r.start),
            )

    def _numbers(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values).to(self._device)

    @staticmethod
    def _fresh_tail(r: Rows) -> tuple[int, int, int]:
        """The part of a page entered now that these rows do not write."""
        return r.place.slot, r.start + r.n, padded(r.start + r.n)

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
        self._write(layer, key, value)
        product = plain if softcap is None and sinks is None else special
        options = (scale, softcap, sinks)
        pieces = [*self._runs, *self._tiles]
        # Rows that only fill up the batch stay zero: NaN would confuse a router.
        make = query.new_empty if query.shape[0] == self.count else query.new_zeros
        out = make((*query.shape[:2], value.shape[-1]))
        for number, piece in enumerate(pieces):
            if piece.last - piece.first == query.shape[0]:
                self._attend_piece(number, piece, layer, query, out, rule, product, options)
            else:
                rows, found = query[piece.first : piece.last], out[piece.first : piece.last]
                self._attend_piece(number, piece, layer, rows, found, rule, product, options)
        return out

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.seen[layer] = (tuple(key.shape[1:]), tuple(value.shape[1:]))
        for write in self._writes:
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
            query = self._widened(piece, query)
        mask = self._run_mask(rule, number, piece, query)
        found = product(query, keys, values, mask, *options)
        found = found if group % 4 == 0 else found.narrow(2, 0, group)
        out.view(-1, key_heads, group, out.shape[2]).copy_(found if piece.where is None else found[piece.where])

    def _widened(self, run: Run, query: torch.Tensor) -> torch.Tensor:
        """Queries of a run in whole fours, a row a slot; what no query is written to stays zero through all layers."""
        shape = (run.high - run.low, query.shape[1], -(-query.shape[2] // 4) * 4, query.shape[3])
        found = self._buffers.get((run.first, shape))
        if found is None:
            wide = query.new_zeros(shape)
            found = self._buffers[run.first, shape] = (wide, wide.narrow(2, 0, query.shape[2]))
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
            one = self._make_mask(rule, run.positions[:, None], run.keys, query)[:, None, None]
            found = self._masks[id(rule), piece, count] = one.expand(-1, -1, count, -1)
        return found

    def _tile_mask(self, rule: MaskRule | None, piece: int, tile: Tile, query: torch.Tensor) -> Mask:
        """[1, 1, queries in whole fours, keys]."""
        n = query.shape[2]
        found = self._masks.get((id(rule), piece, n))
        if found is None:
            positions = torch.arange(tile.start, tile.start + n, device=self._device)
            found = self._make_mask(rule, positions[:, None], tile.keys, query)[None, None]
            self._masks[id(rule), piece, n] = found
        return found

    def _make_mask(self, rule: MaskRule | None, positions: torch.Tensor, keys: int, query: torch.Tensor) -> Mask:
        """0 where a query at ``positions`` [n, 1] sees a key, -inf elsewhere: [n, keys]."""
        columns = self._columns.get(keys)
        if columns is None:
            columns = self._columns[keys] = torch.arange(keys, device=self._device)
        visible = columns <= positions if rule is None else rule.visible(0, 0, positions, columns)
        self._rules.append(rule)  # keeps its id from being given away
        hidden = ~torch.as_tensor(visible).broadcast_to(positions.shape[0], keys)
        return torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, float("-inf"))


def _view(tensor: torch.Tensor, low: int, high: int, length: int) -> torch.Tensor:
    """Positions [0, length) of slots [low, high) of a contiguous [slots, width, H, D] as [slots, H, length, D]."""
    _, width, heads, size = tensor.shape
    row = heads * size
    return tensor.as_strided((high - low, heads, length, size), (width * row, size, row, 1), low * width * row)


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
