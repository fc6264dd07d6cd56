"""What a leader knows of its voters in one term: who holds its record, and who answered lately."""

from __future__ import annotations

from mesh.election.quorum import majority
from mesh.election.record import RecordId
from mesh.types import NodeId


class Progress:
    """Acknowledgements are kept per voter; which of them count is the caller's arithmetic (``quorum.is_quorum``)."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._holds: dict[NodeId, RecordId] = {}
        self._heard: dict[NodeId, float] = {}
        self._whole: dict[NodeId, tuple[RecordId, float]] = {}

    def answered(self, voter: NodeId, record_id: RecordId, sent_at: float, now: float) -> None:
        """``voter`` holds ``record_id`` and was there at ``sent_at``, when the leader asked (never later than now)."""
        self._holds[voter] = max(record_id, self._holds.get(voter, record_id))
        self._heard[voter] = max(min(sent_at, now), self._heard.get(voter, self._since))

    def holders(self, record_id: RecordId) -> list[NodeId]:
        """Who acknowledged exactly ``record_id``."""
        return [voter for voter, held in self._holds.items() if held == record_id]

    def heard_since(self, when: float, voters: tuple[NodeId, ...]) -> list[NodeId]:
        """Voters that answered a request sent at or after ``when``; the time of new leaders and voters starts fresh."""
        return [voter for voter in voters if self._heard.get(voter, self._since) >= when]

    def majority_at(self, voters: tuple[NodeId, ...], me: NodeId) -> float:
        """The latest time at which a majority of ``voters`` is known to have been there; this node always is."""
        times = sorted((self._heard.get(v, self._since) for v in voters if v != me), reverse=True)
        others = majority(len(voters)) - (me in voters)
        return times[others - 1] if others > 0 else float("inf")

    def welcome(self, voter: NodeId, now: float) -> None:
        """A new voter has as long as everyone to answer for the first time."""
        self._heard[voter] = now

    def send_whole(self, voter: NodeId, record_id: RecordId, now: float, every_s: float) -> bool:
        """Whether to send ``voter`` the whole record now: once per ``every_s``, however often it asks."""
        last_id, last_at = self._whole.get(voter, (None, 0.0))
        if last_id == record_id and now - last_at < every_s:
            return False
        self._whole[voter] = (record_id, now)
        return True
