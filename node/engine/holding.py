"""One model as the device thread holds it: its shard, its cache, and one group of a step."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any, cast

import msgspec
import torch

from node.engine.cells import Rows
from node.engine.compat import CompatState
from node.engine.graphs import Graphs, capture_on
from node.engine.kv_cache import Place
from node.engine.memory import trim
from node.engine.page_pool import PagedCache, PagedPlace
from node.engine.pages import STEP_ROWS
from node.engine.sampler import Row, draw, score
from node.engine.scheduler import Slice
from node.engine.selfcheck import Mode
from node.engine.sequence import Result, Sampled, Sequence, TokenScore
from node.engine.shard import Shard
from node.engine.shared import PageStore
from node.engine.shipping import piece_positions, read_pages, write_pages
from node.engine.span import Part
from node.engine.transfer import host_empty, to_host

PLACES = (Place, PagedPlace)
"""Where the packed mode keeps a sequence."""


class Piece(msgspec.Struct, frozen=True):
    """A sequence's share of one group."""

    sequence: Sequence
    start: int
    n: int
    last: bool

    @property
    def scored(self) -> bool:
        return self.sequence.queue[0].prompt_logprobs

    @property
    def sampled(self) -> bool:
        return self.last and self.sequence.queue[0].sample


class Heads(msgspec.Struct, frozen=True):
    """Which rows of a group want logits: per piece the logits rows to score, and the one to sample from."""

    rows: list[int]
    score: dict[int, tuple[int, int]]
    sample: dict[int, int]


class Holding:
    """A loaded model.  Only the device thread calls it."""

    def __init__(self, shard: Shard, mode: Mode, kv_bytes: int = 0, step_rows: int = STEP_ROWS) -> None:
        self.shard, self.mode = shard, mode
        self.cache: Any = shard.cache(kv_bytes, step_rows)
        self.pages = PageStore()
        capture = capture_on(shard.device) if mode == "packed" and shard.paged else None
        self.graphs = Graphs(shard, self.cache.pool, capture) if capture is not None else None
        self.wanted = shard.part
        """What placement wants here; layers beyond it stay while sessions use them."""

    # -- sequences -----------------------------------------------------------------------------------------------------

    def open(self, sequence: Sequence) -> None:
        spec = sequence.spec
        if self.mode == "packed":
            sequence.state = self.cache.open(spec.start, spec.end, spec.max_positions)
        else:
            sequence.state = CompatState(self.shard, spec.start, spec.end)

    def close(self, sequence: Sequence) -> None:
        if isinstance(sequence.state, PLACES):
            self.cache.close(sequence.state)
        sequence.state = None

    def cut(self, sequence: Sequence, length: int) -> bool:
        """Positions from ``length`` on are void.  ``False``: its state cannot go back there, and is empty now."""
        state: Any = sequence.state
        if not state.cut(min(length, sequence.length)):
            state.cut(0)
            return False
        sequence.cut(length)
        return True

    def keep_pages(self, sequence: Sequence, size: int, pages: Many[tuple[int, int]]) -> None:
        """Copy positions that are computed, each page of ``size`` of them."""
        spec = sequence.spec
        self.pages.keep(cast(Any, sequence.state), spec.start, spec.end, size, pages)

    def take_pages(self, sequence: Sequence, size: int, pages: Many[int]) -> bool:
        """Begin behind ``pages``; ``False``: not all that is needed of them is here."""
        spec = sequence.spec
        taken = self.pages.take(cast(Any, sequence.state), spec.start, spec.end, size, pages)
        sequence.length = size * len(pages) if taken else 0
        return taken

    def read_pages(self, sequence: Sequence, layers: tuple[int, int], start: int, end: int) -> tuple[int, bytes]:
        """Of positions [start, end) the first ``n``, and their keys and values; 0: they cannot be read."""
        place, end = sequence.state, min(end, sequence.length)
        if not isinstance(place, PLACES) or start >= end:
            return 0, b""
        n = min(end - start, piece_positions(place, range(*layers)))
        return n, read_pages(place, range(*layers), start, n)

    def write_pages(self, sequence: Sequence, start: int, n: int, piece: memoryview) -> bool:
        """``False``: the piece is not the next one of this sequence."""
        spec, place = sequence.spec, sequence.state
        if not isinstance(place, PLACES) or start != sequence.length or start + n > spec.max_positions:
            return False
        try:
            write_pages(place, range(spec.start, spec.end), start, n, self.shard.dtype, self.shard.device, piece)
        except ValueError:
            return False
        sequence.length += n
        return True

    def keep(self, in_use: Many[Sequence]) -> None:
        """Give up layers that neither placement wants nor a sequence uses."""
        used = [Part.of_span(s.spec.start, s.spec.end, self.shard.layout.n_layers) for s in in_use]
        layers = {i for part in (self.wanted, *used) for i in part.layers}
        embed, head = any(p.embed for p in (self.wanted, *used)), any(p.head for p in (self.wanted, *used))
        before = self.shard.part
        self.shard.keep(Part(tuple(sorted(layers)), embed, head))
        if self.shard.part != before:
            if self.graphs is not None:
                self.graphs.clear()
            if isinstance(self.cache, PagedCache):  # an extent goes with its last sequence
                self.cache.pool.keep(self.shard.part.layers)
            trim(self.shard.device)

    # -- one group of a step -------------------------------------------------------------------------------------------

    def compute(self, start: int, end: int, pieces: list[Piece]) -> list[Result]:
        """Run layers [start, end) for ``pieces``; answers in their order of computation."""
        if self.mode == "compat":
            return [result for piece in pieces for result in self._compute_one(start, end, piece)]
        rows = [Rows(p.sequence.state, p.start, p.n) for p in pieces]
        order = self.shard.order(rows)
        pieces = [pieces[i] for i in order]
        given = self._given(start, pieces)
        if start > 0 and not given.isfinite().all():
            return self._without_broken(start, end, pieces, given)
        rows, heads = [rows[i] for i in order], self._heads(end, pieces)
        found = self.graphs.run(start, end, rows, given) if self.graphs is not None else None
        if found is None:
            wanted = torch.tensor(heads.rows) if heads.rows else None
            found = self.shard.packed(start, end, given, self.shard.batch(rows), wanted)
        elif len(heads.rows) < len(rows) and found[1] is not None:
            found = (found[0], found[1][heads.rows] if heads.rows else None)
        return self._results(end, pieces, *found, heads)

    def _compute_one(self, start: int, end: int, piece: Piece) -> list[Result]:
        given = self._given(start, [piece])
        if start > 0 and not given.isfinite().all():
            return self._without_broken(start, end, [piece], given)
        heads = self._heads(end, [piece])
        state = cast(CompatState, piece.sequence.state)
        hidden, logits = state.forward(given, torch.tensor(heads.rows) if heads.rows else None)
        return self._results(end, [piece], hidden, logits, heads)

    def _given(self, start: int, pieces: list[Piece]) -> torch.Tensor:
        """The rows' token ids [T], or their hidden states [T, H] copied out of the frames."""
        if start == 0:
            ids = [t for p in pieces for t in p.sequence.queue[0].tokens[self._offset(p) : self._offset(p) + p.n]]
            return torch.tensor(ids)
        shape = (sum(p.n for p in pieces), self.shard.hidden_size)
        given = host_empty(shape, self.shard.dtype, self.shard.device)
        target = memoryview(given.view(torch.uint8).numpy()).cast("B")
        size, at = self.shard.hidden_size * self.shard.dtype.itemsize, 0
        for p in pieces:
            frame = memoryview(p.sequence.queue[0].hidden or b"").cast("B")
            target[at : at + p.n * size] = frame[self._offset(p) * size : (self._offset(p) + p.n) * size]
            at += p.n * size
        return given

    @staticmethod
    def _offset(piece: Piece) -> int:
        return piece.start - piece.sequence.queue[0].start

    def _without_broken(self, start: int, end: int, pieces: list[Piece], given: torch.Tensor) -> list[Result]:
        """Refuse the pieces with NaN or infinity in them; the others are computed."""
        whole = given.isfinite().all(-1).split([p.n for p in pieces])
        results, rest = [], []
        for piece, finite in zip(pieces, whole, strict=True):
            if finite.all():
                rest.append(piece)
            else:
                results.append(failure(piece, "the hidden states received are not finite"))
        return results + (self.compute(start, end, rest) if rest else [])

    def _heads(self, end: int, pieces: list[Piece]) -> Heads:
        heads = Heads([], {}, {})
        if end < self.shard.layout.n_layers:
            return heads
        first = 0
        for i, p in enumerate(pieces):
            known = min(p.n, len(p.sequence.tokens) - p.start - 1) if p.scored else 0
            if known > 0:
                heads.score[i] = (len(heads.rows), known)
                heads.rows.extend(range(first, first + known))
            if p.sampled:
                heads.sample[i] = len(heads.rows)
                heads.rows.append(first + p.n - 1)
            first += p.n
        return heads

    def _results(
        self, end: int, pieces: list[Piece], hidden: torch.Tensor, logits: torch.Tensor | None, heads: Heads
    ) -> list[Result]:
        broken = self._broken(logits, heads)
        scores, drawn = self._scores(pieces, logits, heads), self._drawn(pieces, logits, heads, broken)
        passes_on = end < self.shard.layout.n_layers
        raw = memoryview(to_host(hidden.contiguous()).view(torch.uint8).numpy()).cast("B") if passes_on else None
        size = self.shard.hidden_size * self.shard.dtype.itemsize
        results, at = [], 0
        for i, p in enumerate(pieces):
            if i in broken:
                results.append(failure(p, "the logits are NaN or infinite: weights or hidden states are broken"))
                continue
            view = raw[at * size : (at + p.n) * size] if raw is not None else None
            tag = p.sequence.queue[0].tag
            results.append(Result(p.sequence.spec.key, tag, p.start, p.n, view, drawn.get(i), scores.get(i, ())))
            at += p.n
        return results

    @staticmethod
    def _scores(pieces: list[Piece], logits: torch.Tensor | None, heads: Heads) -> dict[int, tuple[TokenScore, ...]]:
        scores = {}
        for i, (first, known) in heads.score.items():
            p = pieces[i]
            assert logits is not None
            assert p.sequence.spec.sampling is not None
            following = p.sequence.tokens[p.start + 1 : p.start + 1 + known]
            top = max(0, p.sequence.spec.sampling.logprobs)
            scores[i] = tuple(score(logits[first : first + known], following, [top] * known))
        return scores

    @staticmethod
    def _broken(logits: torch.Tensor | None, heads: Heads) -> set[int]:
        """Pieces of whose logits nothing can be drawn or scored."""
        if logits is None:
            return set()
        whole = logits.amax(-1).isfinite().tolist()
        scored = {i for i, (first, n) in heads.score.items() if not all(whole[first : first + n])}
        return scored | {i for i, row in heads.sample.items() if not whole[row]}

    @staticmethod
    def _drawn(pieces: list[Piece], logits: torch.Tensor | None, heads: Heads, broken: set[int]) -> dict[int, Sampled]:
        wanted = {i: row for i, row in heads.sample.items() if i not in broken}
        if not wanted:
            return {}
        assert logits is not None
        sampled = [pieces[i] for i in wanted]
        rows = [Row.of(p.sequence, p.start + p.n) for p in sampled]
        drawn = draw(logits[list(wanted.values())], rows)
        for p, token in zip(sampled, drawn, strict=True):
            p.sequence.drew(token.position, token.token)
        return dict(zip(wanted, drawn, strict=True))


def pieces_of(slices: Many[Slice], sequences: dict[str, Sequence]) -> list[Piece]:
    """The plan's slices with their sequences."""
    return [Piece(sequences[s.key], s.start, s.n, s.last) for s in slices]


def failure(piece: Piece, why: str) -> Result:
    """The sequence's end: nothing more is computed for it."""
    piece.sequence.failed = why
    return Result(piece.sequence.spec.key, piece.sequence.queue[0].tag, piece.start, piece.n, error=why)
