"""Which messages are heard at all: of this mesh, from a member, and such as an honest node could have sent."""

from __future__ import annotations

from collections.abc import Callable, Collection

from mesh.election import messages as m
from mesh.election.durable import Durable
from mesh.election.record import MAX_TERM, flaw
from mesh.types import NodeId

Verify = Callable[[NodeId, bytes, bytes], bool]
"""(node, data, signature) -> whether ``node`` signed ``data``."""


def objection(message: m.Message, sender: NodeId, durable: Durable, revoked: Collection[NodeId]) -> str:
    """Why ``message`` changes nothing at the node of ``durable``; empty: it is heard."""
    if message.mesh != durable.mesh_id:
        return "another mesh"  # I12
    if sender in revoked:
        return "a revoked member"  # I11
    if sender == durable.node_id:
        return "a message of one's own"
    if not 0 <= message.term <= MAX_TERM:
        return "an impossible term"
    if isinstance(message, m.Append):
        return _bad_append(message, sender)
    if isinstance(message, m.Announce):
        return _bad_announce(message)
    return ""


def _bad_append(message: m.Append, sender: NodeId) -> str:
    record = message.record
    if record is None:
        return ""
    if (record.epoch, record.id, record.hash) != (message.epoch, message.record_id, message.record_hash):
        return "another record than announced"
    if record.id.term > message.term or sender not in record.voters:
        return "a record that its sender cannot lead with"
    return flaw(record)


def _bad_announce(message: m.Announce) -> str:
    if message.record.epoch != message.epoch:
        return "a record of another epoch"
    return flaw(message.record)


def opened(relayed: m.Relayed, verify: Verify) -> m.Relayable | str:
    """What ``relayed`` carries, or why it is not heard."""
    if len(relayed.payload) > m.MAX_PAYLOAD:
        return "a relayed message too large"
    if not verify(relayed.origin, m.signed(relayed), relayed.signature):
        return "a relayed message with a wrong signature"
    try:
        return m.decode_relayed(relayed.payload)
    except (ValueError, RecursionError, OverflowError) as error:  # msgspec's errors are ValueErrors
        return f"a relayed message that cannot be read: {error}"
