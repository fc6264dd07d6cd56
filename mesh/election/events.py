"""What the election tells its driver, and why it refuses a verb."""

from __future__ import annotations

from typing import Literal

import msgspec

from mesh.election.record import PlacementId, Record
from mesh.errors import MeshError
from mesh.types import NodeId


class BecameLeader(msgspec.Struct, frozen=True):
    """This node won ``term``.  It may propose once a record of this term is committed (``Election.ready``)."""

    term: int


class SteppedDown(msgspec.Struct, frozen=True):
    """This node led ``term`` and does so no more.  What it proposed and was not told committed is uncertain."""

    term: int
    why: str


class LeaderIs(msgspec.Struct, frozen=True):
    """``node`` leads ``term``."""

    node: NodeId
    term: int


class LeaderLost(msgspec.Struct, frozen=True):
    """The belief in ``node`` was cleared; no leader is known."""

    node: NodeId


class Committed(msgspec.Struct, frozen=True):
    """This node learnt that ``record`` is committed: announce it and act on it."""

    record: Record


class Released(msgspec.Struct, frozen=True):
    """After ``leave``: this node is no voter any more (or alone) and may go."""


Event = BecameLeader | SteppedDown | LeaderIs | LeaderLost | Committed | Released


class Answer(msgspec.Struct, frozen=True):
    """What the fence says.  ``fetch``: this node is behind and has asked; try again when ``Committed`` tells."""

    verdict: Literal["ok", "stale", "fetch"]
    newer: PlacementId
    """The active placement id, or (epoch, term) for a coordinator's command: what the asker should know."""


class NotLeader(MeshError):
    """Only the leader proposes; ``leader`` is whom this node believes in."""

    status = 503
    code = "not_coordinator"
    retry_after_s = 1.0

    def __init__(self, leader: NodeId | None) -> None:
        nobody = "no coordinator is known here: a majority of the voters cannot be reached"
        super().__init__(f"this node is not the coordinator; that is {leader}" if leader else nobody)
        self.leader = leader


class Busy(MeshError):
    """A change is being committed, or none of this term is yet: certainly nothing happened, try again after it."""

    status = 503
    code = "coordinator_busy"
    retry_after_s = 0.5


class Refused(MeshError):
    """The change breaks a rule of the election: certainly nothing happened, and it never will."""

    status = 409
    code = "refused"
