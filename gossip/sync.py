"""Anti-entropy: tables are compared by digests, and only buckets that differ are sent.

::

    A                                     B
    Root(digest of all)          ->           8 bytes, a datagram: an idle mesh sends no more than this
                                 <-  Buckets  64 digests, if the roots differ
    SyncRows(differing, answer)  ->           A's rows of the buckets that differ
                                 <-  SyncRows B's rows of those buckets that still differ
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from gossip.config import GossipConfig
from gossip.members import Member, Members, bucket_of
from gossip.messages import BUCKETS, State, SyncRow, SyncRows

ROWS_PER_MESSAGE = 512


def differing(ours: bytes, theirs: bytes) -> list[int]:
    """Buckets whose digests differ."""
    return [index for index in range(BUCKETS) if ours[8 * index : 8 * index + 8] != theirs[8 * index : 8 * index + 8]]


def to_mask(buckets: Iterable[int]) -> bytes:
    return sum(1 << index for index in buckets).to_bytes(BUCKETS // 8, "big")


def from_mask(mask: bytes) -> list[int]:
    bits = int.from_bytes(mask, "big")
    return [index for index in range(BUCKETS) if bits >> index & 1]


def row_of(member: Member, now: float) -> SyncRow:
    age = 0 if member.present else int(now - member.changed_at)
    return SyncRow(member.update(), member.version, max(0, age))


def tell(members: Members, buckets: list[int], now: float, answer: bool) -> list[SyncRows]:
    """All rows of ``buckets``, in messages of whole buckets and about ``ROWS_PER_MESSAGE`` rows."""
    messages: list[SyncRows] = []
    indexes: list[int] = []
    rows: list[SyncRow] = []
    for index in buckets:
        indexes.append(index)
        rows += [row_of(member, now) for member in members.bucket(index)]
        if len(rows) >= ROWS_PER_MESSAGE or index == buckets[-1]:
            messages.append(SyncRows(to_mask(indexes), tuple(rows), answer))
            indexes, rows = [], []
    return messages


def reply(members: Members, heard: SyncRows, now: float) -> SyncRows | None:
    """Our rows of the buckets heard that still differ from what was heard; ``None``: there are none."""
    theirs = {row.update.record.node: row for row in heard.rows}
    buckets = from_mask(heard.mask)
    ours = [member for index in buckets for member in members.bucket(index)]
    rows = tuple(row_of(member, now) for member in ours if _differs(member, theirs.get(member.record.node)))
    return SyncRows(heard.mask, rows, False) if rows else None


def _differs(member: Member, row: SyncRow | None) -> bool:
    if row is None:
        return True
    said = row.update
    same = said.record.incarnation == member.record.incarnation and said.state is member.state
    return not same or member.version > row.version


def honest(message: SyncRows) -> bool:
    """Every row is in a bucket that the message speaks of, and age is given to the dead alone."""
    spoken = set(from_mask(message.mask))
    return all(
        bucket_of(row.update.record.node) in spoken and (row.age_s == 0 or row.update.state >= State.DEAD)
        for row in message.rows
    )


class Pace:
    """When to compare next: soon while comparisons find differences (after joining, after a partition), else slowly."""

    MANY = 4
    """Rows that were news: fewer is what gossip has in flight at any time."""

    def __init__(self, config: GossipConfig, rng: random.Random) -> None:
        self.config, self._rng = config, rng
        self._period = config.sync_min_s

    def found(self, news: int) -> bool:
        """A comparison brought ``news`` rows; True: the next should come soon."""
        if news < self.MANY:
            return False
        self._period = self.config.sync_min_s
        return True

    def next(self, now: float) -> float:
        """The time of the comparison after one at ``now``."""
        when = now + self._period * self._rng.uniform(0.8, 1.2)
        self._period = min(self._period * 2.0, self.config.sync_period_s)
        return when
