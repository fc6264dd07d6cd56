"""What members say to each other.

Every claim about a member carries that member's own signed record.  So nobody can speak of an incarnation that its
owner did not issue: others can only suspect it, at an incarnation that it really had, and it can always refute.

Structs are arrays on the wire (no field names); all bounds stand in the annotations and are checked by ``wire.Codec``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mesh.types import Load, NodeId
from mesh.wire import Codec

StateName = Literal["alive", "suspect", "dead", "left"]


class State(IntEnum):
    """Of a member in one observer's eyes; at one incarnation a larger state overrides a smaller."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


STATE_NAMES: tuple[StateName, ...] = ("alive", "suspect", "dead", "left")

Id = Annotated[NodeId, Meta(max_length=64)]
Address = Annotated[str, Meta(max_length=128)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Short = Annotated[int, Meta(ge=0, lt=2**16)]
Sequence = Annotated[int, Meta(ge=0, lt=2**32)]
Millis = Annotated[int, Meta(ge=0, lt=2**31)]
Accusers = Annotated[tuple[Id, ...], Meta(max_length=4)]

BUCKETS = 64
MAX_ACCUSERS = 4
"""Enough for the first accuser and K = 3 confirmations."""


class MemberRecord(msgspec.Struct, frozen=True, array_like=True):
    """What a member says of its own existence.  Each incarnation has one record."""

    node: Id
    incarnation: Count
    """max(stored + 1, unix milliseconds at boot), then raised by refutations; only the member raises it."""
    address: Address
    """host:port of its peer door (TCP and UDP)."""
    left: bool
    """It has left on purpose."""
    key: Annotated[bytes, Meta(max_length=64)]
    """Public key, of which ``node`` is the hash."""
    signature: Annotated[bytes, Meta(max_length=128)]

    def signed_bytes(self, mesh_id: str) -> bytes:
        """What the signature covers; the key is covered by being hashed to ``node``."""
        return msgspec.msgpack.encode(("murmur member", mesh_id, self.node, self.incarnation, self.address, self.left))


class ProfileRow(msgspec.Struct, frozen=True, array_like=True):
    """A node's profile as it signed it; the largest version wins."""

    node: Id
    version: Count
    payload: Annotated[bytes, Meta(max_length=32_768)]
    """msgpack of ``mesh.types.NodeProfile`` with its load left out."""
    signature: Annotated[bytes, Meta(max_length=128)]

    def signed_bytes(self, mesh_id: str) -> bytes:
        return msgspec.msgpack.encode(("murmur profile", mesh_id, self.node, self.version, self.payload))


class Update(msgspec.Struct, frozen=True, array_like=True):
    """The claim that a member is in ``state`` at its record's incarnation."""

    state: State
    record: MemberRecord
    by: Accusers = ()
    """Who found it suspect or dead: a union that only grows, so that confirmations travel with the claim."""


class Version(msgspec.Struct, frozen=True, array_like=True):
    """News that ``node``'s profile has reached ``version``."""

    node: Id
    version: Count


class LoadRow(msgspec.Struct, frozen=True, array_like=True):
    """Load of the sender (or of the member that an ack is about)."""

    version: Count
    load: Load


class Vitals(msgspec.Struct, frozen=True, array_like=True):
    """How the sender is: it may answer pings and yet compute nothing."""

    lag_ms: Millis = 0
    queue: Millis = 0
    """Sequences that its engine has work for."""
    stuck_ms: Millis = 0
    """Time since its last finished step while there was work."""


Updates = Annotated[tuple[Update, ...], Meta(max_length=64)]
Versions = Annotated[tuple[Version, ...], Meta(max_length=64)]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=1):
    seq: Sequence
    profile: Short = 0
    """Low 16 bits of the versions of the target's profile and load that the sender holds: the ack brings newer ones.
    0: none held; in a large mesh the load is then not sent."""
    load: Short = 0
    updates: Updates = ()
    versions: Versions = ()


class Ack(msgspec.Struct, frozen=True, array_like=True, tag=2):
    seq: Sequence
    about: Id = NodeId("")
    """The member that answered, where a helper passes its ack on; empty: the sender."""
    vitals: Vitals = Vitals()
    load: LoadRow | None = None
    updates: Updates = ()
    versions: Versions = ()


class PingReq(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Ask a helper to ping ``target``; it answers Ack, or Nack before ``within_ms`` are over."""

    seq: Sequence
    target: Id
    within_ms: Millis
    updates: Updates = ()
    versions: Versions = ()


class Nack(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The helper lives, and heard nothing from the target: so the prober's own network is fine."""

    seq: Sequence


class Gossip(msgspec.Struct, frozen=True, array_like=True, tag=5):
    updates: Updates = ()
    versions: Versions = ()


class Root(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Digest of the sender's whole table: one that differs is answered with ``Buckets``."""

    root: Annotated[bytes, Meta(max_length=16)]


class Watch(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """The sender routes to the receiver: it wants its load for a while."""


class LoadPush(msgspec.Struct, frozen=True, array_like=True, tag=8):
    row: LoadRow


class Want(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """Asks for the profiles of ``nodes``."""

    nodes: Annotated[tuple[Id, ...], Meta(max_length=128)]


class Rows(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Profiles that fit a datagram."""

    rows: Annotated[tuple[ProfileRow, ...], Meta(max_length=64)]


class StreamPing(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """The ping of last resort: UDP may be blocked where TCP is not."""

    seq: Sequence


class StreamAck(msgspec.Struct, frozen=True, array_like=True, tag=12):
    seq: Sequence
    vitals: Vitals = Vitals()


class Join(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """The sender's first word: answered with every row."""

    update: Update


class Buckets(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """The digests of the sender's buckets, 8 bytes each: answered with the rows of those that differ."""

    hashes: Annotated[bytes, Meta(min_length=8 * BUCKETS, max_length=8 * BUCKETS)]


class SyncRow(msgspec.Struct, frozen=True, array_like=True):
    update: Update
    version: Count = 0
    """Of its profile; 0: none held."""
    age_s: Count = 0
    """How long the sender has held it dead or left, so that a tombstone's age survives its travels."""


class SyncRows(msgspec.Struct, frozen=True, array_like=True, tag=15):
    """All rows of the buckets whose bits are set in ``mask``."""

    mask: Annotated[bytes, Meta(min_length=BUCKETS // 8, max_length=BUCKETS // 8)]
    rows: Annotated[tuple[SyncRow, ...], Meta(max_length=8_192)]
    answer: bool
    """The receiver should answer with its rows of these buckets that differ."""


class BigRows(msgspec.Struct, frozen=True, array_like=True, tag=16):
    """Profiles that do not fit a datagram."""

    rows: Annotated[tuple[ProfileRow, ...], Meta(max_length=128)]


DatagramMessage = Ping | Ack | PingReq | Nack | Gossip | Root | Watch | LoadPush | Want | Rows
StreamMessage = StreamPing | StreamAck | Join | Buckets | SyncRows | BigRows
Message = DatagramMessage | StreamMessage

STREAM = (StreamPing, StreamAck, Join, Buckets, SyncRows, BigRows)
"""Messages that the driver sends over the peer stream; all others are datagrams."""

MAX_DATAGRAM = 1_150
MAX_STREAM = 4 * 1024 * 1024
DATAGRAM_CODEC: Codec[DatagramMessage] = Codec(DatagramMessage, MAX_DATAGRAM)
STREAM_CODEC: Codec[StreamMessage] = Codec(StreamMessage, MAX_STREAM)


class SavedIncarnation(msgspec.Struct, frozen=True):
    """The record that the core persists: a restart must come back with a larger incarnation."""

    incarnation: int
