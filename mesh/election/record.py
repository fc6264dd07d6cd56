"""What the voters agree on: one record, ordered by (term, version), replaced whole.

The election reads the ids, the voters and the tombstones.  Everything else in ``Content`` is carried, not understood:
``placement`` is the msgpack of a ``mesh.placement.Placement``, so that this package never depends on it.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal

import msgspec

from mesh.types import NodeId

PlacementId = tuple[int, int]
"""(epoch, counter): rises only when the placement's content changes, or with a new epoch."""

MAX_TERM = 2**48
"""No mesh gets here by elections (one a second for nine million years): a larger term is a lie."""

_RANDOM: Final = 1 << 32


def make_epoch(counter: int, random: int) -> int:
    """An epoch as one ordered number: (counter, 32 random bits), so that two takeovers of one mesh differ."""
    return counter * _RANDOM + random % _RANDOM


def epoch_counter(epoch: int) -> int:
    """How many epochs this mesh has had: 1 at the founding, one more with each takeover."""
    return epoch // _RANDOM


class RecordId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """R1: ordered by (term, version), lexicographically; never by version alone."""

    term: int = 0
    version: int = 0

    def __str__(self) -> str:
        return f"({self.term},{self.version})"


class JoinToken(msgspec.Struct, frozen=True):
    """A way into the mesh.  Only the hash of its secret is kept."""

    id: str
    secret_hash: bytes
    expires_unix_s: float
    uses_left: int = -1
    """-1: unlimited."""
    created_by: NodeId = NodeId("")


class ApiKey(msgspec.Struct, frozen=True):
    """A key of the public API; good at every node because its SHA-256 lives here."""

    id: str
    hash: bytes
    scope: Literal["infer", "rag", "admin"]
    name: str = ""
    expires_unix_s: float | None = None
    """None: never."""


class Content(msgspec.Struct, frozen=True):
    """What the coordinator decides and the voters commit.  Changed only through ``Election.propose``."""

    placement_counter: int = 0
    """Set by ``Election.propose``: one more whenever ``placement`` differs."""
    placement: bytes = b""
    """msgpack of ``mesh.placement.Placement``; opaque here."""
    tombstones: tuple[NodeId, ...] = ()
    """Revoked members only (R10): they never vote, never count, never return."""
    tokens: tuple[JoinToken, ...] = ()
    api_keys: tuple[ApiKey, ...] = ()
    ca_certificate: bytes = b""
    sealed_ca: tuple[tuple[NodeId, bytes], ...] = ()
    """The CA's private key, sealed to the identity of each voter."""
    gossip_keys: tuple[bytes, ...] = ()
    """The key ring, newest first.  Opaque: as the driver's security part encodes (or seals) it."""
    models: tuple[bytes, ...] = ()
    """Offered models, msgpack of ``ModelInfo`` each; opaque here."""


class Record(msgspec.Struct, frozen=True):
    """One state of the mesh's agreement.  Make it with ``make_record`` or ``restamp``."""

    epoch: int
    id: RecordId
    voters: tuple[NodeId, ...]
    """Sorted, unique."""
    content: Content
    hash: bytes
    """SHA-256 over voters and content: equal hashes differ in id only."""

    @property
    def placement_id(self) -> PlacementId:
        return (self.epoch, self.content.placement_counter)

    def __str__(self) -> str:
        return f"{self.id}{{{' '.join(self.voters)}}}#{self.content.placement_counter}"


def content_hash(voters: tuple[NodeId, ...], content: Content) -> bytes:
    """SHA-256 over voters and content, as msgpack in the order of their fields."""
    return hashlib.sha256(msgspec.msgpack.encode((voters, content))).digest()


def make_record(epoch: int, record_id: RecordId, voters: tuple[NodeId, ...], content: Content) -> Record:
    voters = tuple(sorted(set(voters)))
    return Record(epoch=epoch, id=record_id, voters=voters, content=content, hash=content_hash(voters, content))


def restamp(record: Record, record_id: RecordId) -> Record:
    """The same voters and content under another id (R4)."""
    return msgspec.structs.replace(record, id=record_id)


def flaw(record: Record) -> str:
    """Why ``record`` cannot be one that an honest node made; empty: nothing is wrong with it."""
    if not record.voters:
        return "a record without voters"
    if list(record.voters) != sorted(set(record.voters)):
        return "voters are not sorted and unique"
    if not (0 < record.id.term <= MAX_TERM and 0 < record.id.version <= MAX_TERM and record.epoch > 0):
        return "an id out of bounds"
    if record.hash != content_hash(record.voters, record.content):
        return "the hash does not fit the content"
    return ""


EMPTY = make_record(0, RecordId(), (), Content())
"""What a member holds before it has heard of any record: older than all others, and nobody votes in it."""
