"""What a hop keeps of the hidden states that it sent: enough to rebuild the hop behind it.

The latest rows are in memory, those before them may lie on the disk (mesh/pipeline/keeping.py decides), in pieces that
the node around the core reads back when they are wanted.
"""

from __future__ import annotations

import msgspec

REPLAY_ROWS = 512
"""Positions in one replayed frame: large enough to compute well, small enough that hops overlap."""


class Segment(msgspec.Struct, frozen=True):
    """Rows of positions [start, start + n), n rows of equal size in the dtype that went over the wire."""

    start: int
    n: int
    payload: memoryview

    @property
    def end(self) -> int:
        return self.start + self.n

    def slice(self, first: int, end: int) -> Segment:
        """The rows of [first, end), a view and no copy."""
        if (first, end) == (self.start, self.end):
            return self
        row = len(self.payload) // self.n
        return Segment(first, end - first, self.payload[(first - self.start) * row : (end - self.start) * row])


class Piece(msgspec.Struct, frozen=True):
    """Rows on the disk under ``number``, of which the first ``n`` still hold: positions [start, start + n)."""

    number: int
    start: int
    n: int
    row: int
    """Bytes of a row ..."""
    bytes: int
    """... and of all that were written."""

    @property
    def end(self) -> int:
        return self.start + self.n

    def rows(self, payload: memoryview, first: int) -> Segment:
        """Of ``payload``, which is what was written, positions from ``first`` on."""
        at = (first - self.start) * self.row
        return Segment(first, self.end - first, payload[at : self.n * self.row])


class Ledger:
    """What all boundaries of a node hold together."""

    def __init__(self) -> None:
        self.memory = self.disk = 0
        """Bytes of rows."""
        self.gone: list[int] = []
        """Numbers of pieces that nobody holds any more and the disk has not been told of."""


class Checkpoints:
    """One boundary's rows, without gap: positions [start, warm) on the disk, [warm, end) in memory.

    ``start`` is above 0 only after ``drop``, when the budgets took the older ones.
    """

    def __init__(self, ledger: Ledger | None = None) -> None:
        self.start = 0
        self.bytes = 0
        """In memory."""
        self._ledger = ledger or Ledger()
        self._pieces: list[Piece] = []
        self._segments: list[Segment] = []

    @property
    def warm(self) -> int:
        return self._pieces[-1].end if self._pieces else self.start

    @property
    def end(self) -> int:
        return self._segments[-1].end if self._segments else self.warm

    def append(self, segment: Segment) -> None:
        assert segment.start == self.end, (segment.start, self.end)
        self._segments.append(segment)
        self._count(len(segment.payload))

    def take_over(self, other: Checkpoints) -> None:
        """What ``other`` holds, in memory alone; it is of no use afterwards."""
        assert self.end == 0 == other.warm - other.start
        self.start, self._segments = other.start, other._segments
        self._count(other.bytes)

    def next_spill(self) -> list[Segment]:
        """The oldest rows in memory, as many as make one piece."""
        return _groups(self._segments[:REPLAY_ROWS])[0]

    def spill(self, number: int) -> tuple[memoryview, ...]:
        """The rows of ``next_spill`` are given to the disk, under ``number``."""
        group = self.next_spill()
        size, n = sum(len(segment.payload) for segment in group), sum(segment.n for segment in group)
        self._pieces.append(Piece(number, group[0].start, n, size // n, size))
        del self._segments[: len(group)]
        self._count(-size)
        self._ledger.disk += size
        return tuple(segment.payload for segment in group)

    def piece_of(self, position: int) -> Piece | None:
        """The piece that ``position`` lies in."""
        return next((piece for piece in self._pieces if piece.start <= position < piece.end), None)

    def holds(self, number: int) -> bool:
        return any(piece.number == number for piece in self._pieces)

    def skip(self, end: int) -> None:
        """Positions up to ``end`` are not to be had."""
        self.drop()
        self.start = end

    def cut(self, length: int) -> None:
        """Forget positions from ``length`` on (roll-back)."""
        while self._segments and self._segments[-1].end > length:
            last = self._segments.pop()
            self._count(-len(last.payload))
            if last.start < length:
                self.append(last.slice(last.start, length))
        while self._pieces and self._pieces[-1].end > length:
            piece = self._pieces.pop()
            if piece.start < length:
                self._pieces.append(msgspec.structs.replace(piece, n=length - piece.start))
            else:
                self._forget(piece)
        self.start = min(self.start, length)

    def drop(self) -> int:
        """Give up everything held; returns the bytes freed."""
        end, freed = self.end, self.bytes + sum(piece.bytes for piece in self._pieces)
        for piece in self._pieces:
            self._forget(piece)
        self._count(-self.bytes)
        self.start, self._pieces, self._segments = end, [], []
        return freed

    def read(self, first: int) -> list[Segment]:
        """Positions [first, end), which are in memory, as few segments of at most ``REPLAY_ROWS`` rows each."""
        assert self.warm <= first <= self.end, (self.warm, first, self.end)
        wanted = [piece.slice(max(first, piece.start), piece.end) for piece in self._tail(first)]
        if len(wanted) <= 1:
            return wanted
        return [_join(group) for group in _groups(wanted)]

    def copy(self, first: int, end: int) -> memoryview:
        """The rows of [first, end), which are in memory, in memory of their own."""
        pieces = [s.slice(max(first, s.start), min(end, s.end)) for s in self._tail(first) if s.start < end]
        return memoryview(b"".join(piece.payload for piece in pieces))

    def rows(self, first: int, end: int) -> memoryview:
        """Positions [first, end) in one piece; empty where any of them is not in memory (any more)."""
        if not self.warm <= first < end <= self.end:
            return memoryview(b"")
        tail = self._tail(first)
        return _join([x.slice(max(first, x.start), min(end, x.end)) for x in tail if x.start < end]).payload

    def _count(self, bytes_: int) -> None:
        self.bytes += bytes_
        self._ledger.memory += bytes_

    def _forget(self, piece: Piece) -> None:
        self._ledger.disk -= piece.bytes
        self._ledger.gone.append(piece.number)

    def _tail(self, first: int) -> list[Segment]:
        """The segments that reach past ``first``; searched from the end, where a live session reads."""
        index = len(self._segments)
        while index and self._segments[index - 1].end > first:
            index -= 1
        return self._segments[index:]


def _groups(segments: list[Segment]) -> list[list[Segment]]:
    groups: list[list[Segment]] = []
    rows = REPLAY_ROWS
    for segment in segments:
        if rows + segment.n > REPLAY_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(segment)
        rows += segment.n
    return groups


def _join(group: list[Segment]) -> Segment:
    if len(group) == 1:
        return group[0]
    return Segment(group[0].start, sum(s.n for s in group), memoryview(b"".join(s.payload for s in group)))
