"""What a node must not forget: one file, replaced whole and fsynced by the driver at each ``Persist``.

Bytes on disk: magic (8) | SHA-256 of the payload (32) | payload (msgpack of ``Durable``).
"""

from __future__ import annotations

import hashlib
import random

import msgspec

from mesh.election.record import EMPTY, Content, PlacementId, Record, RecordId, make_epoch, make_record
from mesh.errors import ConfigError
from mesh.types import MeshId, NodeId

MAGIC = b"MURELEC\x01"
"""Its last byte is the version of the format."""


class Durable(msgspec.Struct, frozen=True):
    """The election's state that survives a crash.  The record that may be acted upon is ``committed``.

    A voter may hold a newer ``record`` that is not committed yet; both are kept whole, so that a node that restarts in
    between still knows the placement that it serves.
    """

    mesh_id: MeshId
    epoch: int
    node_id: NodeId
    term: int
    """Of ``epoch``: terms of two epochs are not compared."""
    voted_for: NodeId | None
    """In ``term``."""
    record: Record
    committed: Record
    """``committed.id <= record.id``."""

    @property
    def committed_id(self) -> RecordId:
        return self.committed.id

    @property
    def active_placement(self) -> PlacementId:
        """The placement that work may be opened under: that of the newest committed record (I6)."""
        return self.committed.placement_id


def found(mesh_id: MeshId, node_id: NodeId, content: Content, rng: random.Random) -> Durable:
    """The first state of a new mesh of one: an explicit act, done once."""
    epoch = make_epoch(1, rng.getrandbits(32))
    record = make_record(epoch, RecordId(1, 1), (node_id,), content)
    return Durable(mesh_id, epoch, node_id, term=1, voted_for=node_id, record=record, committed=record)


def newcomer(mesh_id: MeshId, node_id: NodeId, committed: Record = EMPTY) -> Durable:
    """The first state of a member that joins; ``committed`` is what its introducer told it, if it did."""
    return Durable(
        mesh_id,
        committed.epoch,
        node_id,
        term=committed.id.term,
        voted_for=None,
        record=committed,
        committed=committed,
    )


def encode(durable: Durable) -> bytes:
    payload = msgspec.msgpack.encode(durable)
    return MAGIC + hashlib.sha256(payload).digest() + payload


def decode(data: bytes) -> Durable:
    """Raises ``ConfigError`` where the file is of another format or damaged: never guess at a vote."""
    head = len(MAGIC) + 32
    if data[: len(MAGIC) - 1] != MAGIC[:-1] or len(data) < head:
        raise ConfigError("the election's state file is not one of this program")
    if data[: len(MAGIC)] != MAGIC:
        raise ConfigError(
            f"the election's state file has format {data[len(MAGIC) - 1]}; this program reads {MAGIC[-1]}"
        )
    payload = data[head:]
    if hashlib.sha256(payload).digest() != data[len(MAGIC) : head]:
        raise ConfigError("the election's state file is damaged: remove the data folder and join as a new node")
    try:
        return msgspec.msgpack.decode(payload, type=Durable)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"the election's state file cannot be read: {error}") from error
