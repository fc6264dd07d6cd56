"""Messages of the election.  Every one carries the mesh and its epoch; another mesh's changes nothing (I12).

``term`` is the sender's term, except in ``AskPreVote``, where it is the term that the sender would campaign in.
"""

from __future__ import annotations

import msgspec

from mesh.election.record import Record, RecordId
from mesh.types import MeshId, NodeId

MAX_PAYLOAD = 8 * 2**20
"""Bytes of a relayed message: a record of the largest mesh is far below."""


class _Message(msgspec.Struct, frozen=True, tag=True):
    mesh: MeshId
    epoch: int
    term: int


class AskPreVote(_Message, frozen=True, tag=True):
    """Would you vote for me in ``term``?  Changes nothing at the receiver (R3)."""

    record: RecordId


class PreVoted(_Message, frozen=True, tag=True):
    campaign: int
    """The ``term`` that was asked about."""
    granted: bool


class AskVote(_Message, frozen=True, tag=True):
    record: RecordId
    """The candidate's; a voter with a newer one refuses (R2)."""


class Voted(_Message, frozen=True, tag=True):
    granted: bool


class Append(_Message, frozen=True, tag=True):
    """The leader's heartbeat and its record.  ``record`` is sent where the follower has other content."""

    record_id: RecordId
    record_hash: bytes
    """A follower with the same content under an older id restamps its own."""
    committed: RecordId
    sent_at: float
    """The leader's clock; echoed, so that an answer proves that the leader was alive to its voters *then*."""
    record: Record | None = None


class Appended(_Message, frozen=True, tag=True):
    record_id: RecordId
    """What the follower holds durably; it counts only if it is exactly the leader's (R5)."""
    sent_at: float


class Announce(_Message, frozen=True, tag=True):
    """A committed record, from anyone to anyone."""

    record: Record
    leader: NodeId | None
    """Who leads ``term``; None: the sender knows of nobody, and ``term`` means nothing."""


class Notice(_Message, frozen=True, tag=True):
    """I hold this committed record: fetch it if yours is older."""

    record_id: RecordId
    leader: NodeId | None


class Announced(_Message, frozen=True, tag=True):
    """I hold this committed record: no need to send it again."""

    record_id: RecordId


class Fetch(_Message, frozen=True, tag=True):
    """My newest committed record is this: send yours if it is newer."""

    record_id: RecordId


class TimeoutNow(_Message, frozen=True, tag=True):
    """From the leader to the best voter: campaign at once, I am leaving."""


class Leaving(_Message, frozen=True, tag=True):
    """From a voter to the leader: replace me, I wait for it."""


class Relayed(_Message, frozen=True, tag=True):
    """A message that a neighbour carries where the direct link failed.  ``signature``: ``origin`` over ``signed``."""

    origin: NodeId
    to: NodeId
    payload: bytes
    signature: bytes


Message = (
    AskPreVote
    | PreVoted
    | AskVote
    | Voted
    | Append
    | Appended
    | Announce
    | Notice
    | Announced
    | Fetch
    | TimeoutNow
    | Leaving
    | Relayed
)

Relayable = AskPreVote | PreVoted | AskVote | Voted | Append | Appended | TimeoutNow
"""Between voters only: everything else finds its way by itself."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_relayable: msgspec.msgpack.Decoder[Relayable] = msgspec.msgpack.Decoder(Relayable)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """Raises ``msgspec.MsgspecError`` on anything but one well-formed message."""
    return _decoder.decode(data)


def decode_relayed(payload: bytes) -> Relayable:
    """What a ``Relayed`` carries; a relay within a relay is refused with ``msgspec.MsgspecError``."""
    return _relayable.decode(payload)


def signed(message: Relayed) -> bytes:
    """The bytes that ``message.signature`` covers: nobody can redirect or re-attribute it."""
    return _encoder.encode((message.mesh, message.origin, message.to, message.payload))
