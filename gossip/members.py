"""The members table, and in ``decide`` every transition that a claim can cause.

============== ============ =================================== ==============================================
held           said         incarnation said                    held afterwards
============== ============ =================================== ==============================================
nothing        anything     any                                 what was said (a tombstone included)
anything       anything     smaller                             unchanged: old news
any            alive        larger                              alive: only this brings the dead back (G3)
any            suspect      larger                              suspect
not dead       dead         larger, hearsay                     suspect: the dead may speak before they are buried
any            dead         larger otherwise                    dead; the larger incarnation is stored even if it was
                                                                dead before (memberlist PR #197)
any            left         larger                              left; its record says so, signed by itself
alive, suspect dead         equal, hearsay                      suspect
any            any          equal otherwise                     the larger of the two states
============== ============ =================================== ==============================================

Hearsay is a death told in a full sync, or one that nobody but its finder confirms.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Iterator

import msgspec

from gossip.health import RoundTrips
from gossip.messages import BUCKETS, MAX_ACCUSERS, STATE_NAMES, MemberRecord, State, StateName, Update
from gossip.suspicion import Suspicion
from mesh.types import NodeId


def decide(held: State | None, held_incarnation: int, said: State, incarnation: int, hearsay: bool) -> State | None:
    """The state to hold after a claim (see the table); ``None``: old news."""
    if held is None:
        return said
    if incarnation < held_incarnation:
        return None
    newer = incarnation > held_incarnation
    if said is State.DEAD and hearsay and (held < State.DEAD or (newer and held is State.LEFT)):
        return State.SUSPECT
    return said if newer else max(held, said)


def says_nothing_new(held: Member, update: Update, sender: NodeId) -> bool:
    """Whether ``decide`` could change nothing: most claims come many times, and this is all that they cost."""
    state, accusers = update.state, held.accusers
    if state > held.state or update.record != held.record:
        return False
    if state is State.ALIVE or held.state is State.LEFT or len(accusers) == MAX_ACCUSERS:
        return True
    return all(name in accusers for name in update.by or (sender,))


class MemberInfo(msgspec.Struct, frozen=True):
    """A member as others of this process may see it: a copy, safe to keep."""

    node: NodeId
    state: StateName
    incarnation: int
    address: str
    confirmations: int
    """Distinct members, oneself included, known to have found it suspect or dead; 0 while alive."""
    rtt_ms: float | None
    """The shortest of the last probes' round trips; ``None``: never answered."""
    degraded: bool
    """Answers pings but computes nothing."""


class Member:
    """One row of the table."""

    __slots__ = (
        "accusers",
        "changed_at",
        "degraded",
        "record",
        "rtt",
        "share",
        "state",
        "suspicion",
        "told_at",
        "version",
    )

    def __init__(self, record: MemberRecord, state: State, now: float) -> None:
        self.record, self.state, self.changed_at = record, state, now
        self.accusers: tuple[NodeId, ...] = ()
        self.suspicion: Suspicion | None = None
        self.version = 0
        """Of the profile row held; 0: none."""
        self.share = 0
        """What it adds (by exclusive or) to its bucket's hash."""
        self.rtt = RoundTrips()
        self.degraded = False
        self.told_at = -1e9
        """When it was last told that it is held dead."""

    @property
    def present(self) -> bool:
        """Probed, counted and gossiped to: alive or suspect."""
        return self.state < State.DEAD

    def update(self) -> Update:
        return Update(self.state, self.record, self.accusers)

    def info(self) -> MemberInfo:
        record, rtt = self.record, self.rtt.least()
        milliseconds = None if rtt is None else rtt * 1000.0
        accusers, name = len(self.accusers), STATE_NAMES[self.state]
        return MemberInfo(record.node, name, record.incarnation, record.address, accusers, milliseconds, self.degraded)


def bucket_of(node: NodeId) -> int:
    """Which of the buckets of anti-entropy ``node`` belongs to."""
    return zlib.crc32(node.encode()) % BUCKETS


def share_of(member: Member) -> int:
    """64 bits that stand for what tables are compared by."""
    text = f"{member.record.node} {member.record.incarnation} {member.state:d} {member.version}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Members:
    """All members and tombstones, oneself included, with the probe order and the digests of anti-entropy."""

    def __init__(self, me: NodeId, rng: random.Random) -> None:
        self.me, self._rng = me, rng
        self._all: dict[NodeId, Member] = {}
        self._buckets: list[dict[NodeId, Member]] = [{} for _ in range(BUCKETS)]
        self._hashes = [0] * BUCKETS
        self._ring: list[NodeId] = []
        """Present members but oneself, in the order of probing."""
        self._next = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._all.values())

    def get(self, node: NodeId) -> Member | None:
        return self._all.get(node)

    @property
    def n(self) -> int:
        """Present members, oneself included: the N of every formula."""
        return len(self._ring) + 1

    @property
    def present(self) -> list[NodeId]:
        """Alive and suspect members but oneself; not to be changed."""
        return self._ring

    def put(self, member: Member) -> None:
        """Add ``member``, or note that it has changed."""
        node = member.record.node
        bucket = bucket_of(node)
        self._all[node] = member
        self._buckets[bucket][node] = member
        share = share_of(member)
        self._hashes[bucket] ^= share ^ member.share
        member.share = share

    def track(self, member: Member, was_present: bool) -> None:
        """Keep the probe order after a change of state."""
        node = member.record.node
        if node != self.me and member.present != was_present:
            if member.present:
                self._ring.insert(self._rng.randint(self._next, len(self._ring)), node)
            else:
                index = self._ring.index(node)
                del self._ring[index]
                self._next -= index < self._next

    def forget(self, node: NodeId) -> None:
        """Drop a tombstone."""
        member = self._all.pop(node)
        assert not member.present, node
        del self._buckets[bucket_of(node)][node]
        self._hashes[bucket_of(node)] ^= member.share

    def next_to_probe(self) -> NodeId | None:
        """Shuffled round robin: each once before any twice, in another order each time (SWIM 4.3)."""
        if not self._ring:
            return None
        if self._next >= len(self._ring):
            self._rng.shuffle(self._ring)
            self._next = 0
        self._next += 1
        return self._ring[self._next - 1]

    def sample(self, count: int, exclude: NodeId | None = None) -> list[NodeId]:
        """Up to ``count`` different present members, at random."""
        if len(self._ring) <= count:
            chosen = self._rng.sample(self._ring, len(self._ring))
        else:
            chosen = self._rng.sample(self._ring, count + (exclude is not None))
        return [node for node in chosen if node != exclude][:count]

    # -- digests

    def hashes(self) -> bytes:
        """The bucket digests, 8 bytes each: of ids, incarnations, states and profile versions."""
        return b"".join(value.to_bytes(8, "big") for value in self._hashes)

    def root(self) -> bytes:
        return hashlib.blake2b(self.hashes(), digest_size=8).digest()

    def bucket(self, index: int) -> list[Member]:
        return list(self._buckets[index].values())
