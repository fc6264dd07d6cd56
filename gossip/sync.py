"""Anti-entropy: tables are compared by digests, and only buckets that differ are sent.

::

    A                                     B
    Root(digest of all)          ->           8 bytes, a datagram: an idle mesh sends no more than this
                                 <-  Buckets  64 digests, if the roots differ
    SyncRows(differing, answer)  ->           A's rows of the buckets that differ
                                 <-  SyncRows B's rows of those buckets that still differ
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

from gossip.config import GossipConfig
from gossip.events import Joined
from gossip.exchange import Exchange
from gossip.members import Member, Members, bucket_of
from gossip.messages import BUCKETS, Buckets, Join, Message, Root, State, SyncRow, SyncRows, Version
from gossip.roster import Roster
from mesh.core import Effect, Emit, Rejected
from mesh.types import NodeId

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
        """A comparison brought ``news`` rows and profiles; True: the next should come soon."""
        if news < self.MANY:
            return False
        self._period = self.config.sync_min_s
        return True

    def next(self, now: float) -> float:
        """The time of the comparison after one at ``now``."""
        when = now + self._period * self._rng.uniform(0.8, 1.2)
        self._period = min(self._period * 2.0, self.config.sync_period_s)
        return when


class Comparer:
    """Joins, and keeps tables equal.  ``send(to, message)`` and ``out`` are the core's."""

    def __init__(
        self,
        config: GossipConfig,
        roster: Roster,
        exchange: Exchange,
        rng: random.Random,
        send: Callable[[NodeId, Message], None],
        out: list[Effect],
    ) -> None:
        self.config, self._roster, self._members, self._exchange = config, roster, roster.members, exchange
        self._rng, self._send, self._out = rng, send, out
        self._pace = Pace(config, rng)
        self._seeds: list[NodeId] = []
        self._join_wait = config.join_retry_s
        self._join_at = self._sync_at = math.inf

    @property
    def deadline(self) -> float:
        return min(self._join_at, self._sync_at)

    def start(self, seeds: list[NodeId], now: float) -> None:
        self._seeds = seeds
        self._join_at = now if seeds else math.inf
        self._sync_at = self._pace.next(now)

    def stop(self) -> None:
        self._join_at = self._sync_at = math.inf

    def tick(self, now: float) -> None:
        if self._join_at <= now:
            self._join(now)
        if self._sync_at <= now:
            self._sync_at = self._pace.next(now)
            for node in self._members.sample(1):
                self.compare_with(node)

    def _join(self, now: float) -> None:
        """Ask three seeds at a time, more slowly each time, until one answers."""
        for node in self._rng.sample(self._seeds, min(3, len(self._seeds))):
            self._send(node, Join(self._roster.own.update()))
        self._join_at = now + self._join_wait
        self._join_wait = min(self._join_wait * 1.5, 10.0)

    def compare_with(self, node: NodeId) -> None:
        self._send(node, Root(self._members.root()))

    def ask(self, stranger: NodeId) -> None:
        """Have ``stranger`` tell its rows, its own among them."""
        self._send(stranger, Buckets(self._members.hashes()))

    def on_join(self, message: Join, sender: NodeId, now: float) -> None:
        if message.update.record.node != sender:
            return self._out.append(Emit(Rejected(sender, "joined in another's name")))
        self._roster.apply(message.update, sender, now)
        for rows in tell(self._members, list(range(BUCKETS)), now, answer=False):
            self._send(sender, rows)

    def on_root(self, message: Root, sender: NodeId, now: float) -> None:
        if message.root != self._members.root():
            self._send(sender, Buckets(self._members.hashes()))

    def on_buckets(self, message: Buckets, sender: NodeId, now: float) -> None:
        buckets = differing(self._members.hashes(), message.hashes)
        for rows in tell(self._members, buckets, now, answer=True):
            self._send(sender, rows)

    def on_rows(self, message: SyncRows, sender: NodeId, now: float) -> None:
        if not honest(message):
            return self._out.append(Emit(Rejected(sender, "rows of other buckets, or of impossible age")))
        news = 0
        for row in message.rows:
            news += self._roster.apply(row.update, sender, now, synced=True, age_s=float(row.age_s))
            if row.version:
                news += self._exchange.hear(Version(row.update.record.node, row.version), sender, now, spread=False)
        if self._pace.found(news):
            self._sync_at = min(self._sync_at, self._pace.next(now))
        answer = reply(self._members, message, now) if message.answer else None
        if answer is not None:
            self._send(sender, answer)
        if self._join_at < math.inf:
            self._join_at = math.inf
            self._out.append(Emit(Joined(sender)))
