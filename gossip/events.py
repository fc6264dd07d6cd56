"""What the membership core tells its owner (``Emit``); ``mesh.core.Rejected`` besides."""

from __future__ import annotations

import msgspec

from gossip.messages import StateName
from mesh.types import NodeId


class MemberChanged(msgspec.Struct, frozen=True):
    """A member's state, incarnation or address is another now; ``old`` is empty for a new member."""

    node: NodeId
    old: StateName | None
    new: StateName
    incarnation: int
    confirmations: int
    """Distinct members (oneself included) known to have found it suspect or dead."""


class Confirmed(msgspec.Struct, frozen=True):
    """One more observer found a suspect or dead member so; ``confirmations`` in all."""

    node: NodeId
    confirmations: int


class ProfileChanged(msgspec.Struct, frozen=True):
    """A member's profile is newer now; with ``load_only`` nothing but its load."""

    node: NodeId
    load_only: bool = False


class DegradedChanged(msgspec.Struct, frozen=True):
    """A member answers pings but computes nothing (or does again)."""

    node: NodeId
    degraded: bool


class Refuted(msgspec.Struct, frozen=True):
    """Somebody held this node suspect or dead; it has said otherwise at a larger incarnation."""

    incarnation: int
    held: StateName
    sender: NodeId


class Conflict(msgspec.Struct, frozen=True):
    """Two records of one incarnation: two processes run with one identity, or a disk was copied."""

    node: NodeId
    held: str
    said: str
    """Their addresses."""


class Joined(msgspec.Struct, frozen=True):
    """A seed has sent its whole table."""

    seed: NodeId


class Departed(msgspec.Struct, frozen=True):
    """``leave`` has spread; the process may end."""
