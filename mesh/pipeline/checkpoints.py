"""What a hop keeps of the hidden states that it sent: enough to rebuild the hop behind it."""

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


class Checkpoints:
    """One boundary's segments, without gap: positions [start, end).

    ``start`` is above 0 only after ``drop``, when the memory budget took the older ones.
    """

    def __init__(self) -> None:
        self.start = 0
        self.bytes = 0
        self._segments: list[Segment] = []

    @property
    def end(self) -> int:
        return self._segments[-1].end if self._segments else self.start

    def append(self, segment: Segment) -> None:
        assert segment.start == self.end, (segment.start, self.end)
        self._segments.append(segment)
        self.bytes += len(segment.payload)

    def take_over(self, other: Checkpoints) -> None:
        """What ``other`` holds, which is of no use afterwards."""
        self.start, self.bytes, self._segments = other.start, other.bytes, other._segments

    def skip(self, end: int) -> None:
        """Positions up to ``end`` are not to be had."""
        self.drop()
        self.start = end

    def cut(self, length: int) -> None:
        """Forget positions from ``length`` on (roll-back)."""
        while self._segments and self._segments[-1].end > length:
            last = self._segments.pop()
            self.bytes -= len(last.payload)
            if last.start < length:
                self.append(last.slice(last.start, length))
        self.start = min(self.start, length)

    def drop(self) -> int:
        """Give up everything held; returns the bytes freed."""
        freed = self.bytes
        self.start, self.bytes, self._segments = self.end, 0, []
        return freed

    def read(self, first: int) -> list[Segment]:
        """Positions [first, end) as few segments of at most ``REPLAY_ROWS`` rows each."""
        assert self.start <= first <= self.end, (self.start, first, self.end)
        wanted = [piece.slice(max(first, piece.start), piece.end) for piece in self._tail(first)]
        if len(wanted) <= 1:
            return wanted
        return [_join(group) for group in _groups(wanted)]

    def copy(self, first: int, end: int) -> memoryview:
        """The rows of [first, end), which are held, in memory of their own."""
        pieces = [s.slice(max(first, s.start), min(end, s.end)) for s in self._tail(first) if s.start < end]
        return memoryview(b"".join(piece.payload for piece in pieces))

    def rows(self, first: int, end: int) -> memoryview:
        """Positions [first, end) in one piece; empty where any of them is not held (any more)."""
        if not self.start <= first < end <= self.end:
            return memoryview(b"")
        tail = self._tail(first)
        return _join([x.slice(max(first, x.start), min(end, x.end)) for x in tail if x.start < end]).payload

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
