"""How a leader tells the learners: new records at once to a few per heartbeat, and who leads to a few more.

The number of messages per heartbeat is bounded whatever the size of the mesh; learners pass on the ids of new records
among themselves (``Notice`` and ``Fetch``), so that a mesh of a thousand knows in a few rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh.election.config import ElectionConfig
from mesh.election.record import RecordId
from mesh.types import NodeId


class Spread:
    """Which learners hold which committed record, as far as the leader of one term knows."""

    def __init__(self, config: ElectionConfig) -> None:
        self._config = config
        self._holds: dict[NodeId, RecordId] = {}
        self._heard: dict[NodeId, float] = {}
        self._sent: dict[NodeId, tuple[float, int]] = {}
        self._turn = 0

    def acknowledged(self, learner: NodeId, record_id: RecordId, now: float) -> None:
        self._holds[learner] = max(record_id, self._holds.get(learner, record_id))
        self._heard[learner] = now
        self._sent.pop(learner, None)

    def caught_up(self, learner: NodeId, record_id: RecordId, now: float) -> bool:
        """Whether ``learner`` said in the last few heartbeats that it holds ``record_id``: fit to become a voter."""
        recent = now - self._heard.get(learner, float("-inf")) <= 4 * self._config.heartbeat_s
        return recent and self._holds.get(learner) == record_id

    def due(self, learners: Sequence[NodeId], record_id: RecordId, now: float) -> list[NodeId]:
        """Who is sent the record now.  Retries back off to 4 heartbeats; the dead are no learners."""
        behind = [n for n in learners if self._holds.get(n, RecordId()) < record_id and self._may_send(n, now)]
        chosen = behind[: self._config.spread]
        for node in chosen:
            self._sent[node] = (now, self._sent.get(node, (now, 0))[1] + 1)
        return chosen

    def reminded(self, learners: Sequence[NodeId], record_id: RecordId) -> list[NodeId]:
        """Who is told now who leads: a few of those that hold the record, in turn."""
        current = [n for n in learners if self._holds.get(n, RecordId()) >= record_id]
        if not current:
            return []
        first = self._turn % len(current)
        self._turn = first + self._config.beat
        return (current[first:] + current[:first])[: self._config.beat]

    def _may_send(self, learner: NodeId, now: float) -> bool:
        last, tries = self._sent.get(learner, (float("-inf"), 0))
        return now - last >= self._config.heartbeat_s * min(1 << tries, 4)
