"""What a node knows of the election: its state, what it shows, and the questions that its transitions ask.

Nothing here changes a role, a term or a record: that is done in ``election.py`` alone.
"""

from __future__ import annotations

import math
import random
from typing import Literal

import msgspec

from mesh.election import messages as m
from mesh.election.config import ElectionConfig
from mesh.election.durable import Durable
from mesh.election.events import Refused
from mesh.election.gate import Verify
from mesh.election.outbox import Outbox
from mesh.election.progress import Progress
from mesh.election.quorum import Ballot, one_step
from mesh.election.record import Content, Record, RecordId, make_record, restamp
from mesh.election.relay import Post, Sign
from mesh.election.roster import Roster
from mesh.election.spread import Spread
from mesh.types import MeshId, NodeId

Role = Literal["follower", "precandidate", "candidate", "leader"]
NEVER = float("-inf")


class State:
    """The fields of ``Election`` and all that can be said about them without changing them (but the time-out)."""

    def __init__(
        self,
        durable: Durable,
        config: ElectionConfig,
        rng: random.Random,
        now: float,
        *,
        sign: Sign | None = None,
        verify: Verify = lambda node, data, signature: False,
    ) -> None:
        """``durable``: from ``durable.found`` or ``newcomer``, or as last persisted.  ``sign`` and ``verify`` serve
        messages that a neighbour carries; without them nothing is relayed for this node."""
        self.me = durable.node_id
        self._config, self._rng, self._verify = config, rng, verify
        self._outbox = Outbox(durable)
        self._save, self._send, self._emit = self._outbox.save, self._outbox.send, self._outbox.emit
        self._post = Post(self._outbox, config.relay_after_s, sign)
        self._roster = Roster(self.me, config)
        self._role: Role = "follower"
        self._leader: NodeId | None = None
        self._heard_leader = NEVER
        self._said = NEVER
        """By the leader's clock: when it said what was heard last."""
        self._lost: tuple[NodeId | None, int, float] = None, 0, NEVER
        """The leader whose loss was seen, its term, and by its clock about when."""
        self._local_health = 0
        self._attempts, self._round_opened, self._round_ends = 0, NEVER, 0.0
        self._ballot = Ballot((), self.me)
        self._may_yield = self._waited_for_leader = False
        self._progress, self._spread = Progress(now), Spread(config)
        self._last_step = self._transfer_until = NEVER
        self._leave_at: float | None = None
        self._revoked = frozenset(durable.committed.content.tombstones)
        self._deadline: float | None = None
        self._arm(now)

    @property
    def deadline(self) -> float | None:
        """When to call ``tick``."""
        if self._leave_at is None:
            return self._deadline
        return self._leave_at if self._deadline is None else min(self._deadline, self._leave_at)

    @property
    def role(self) -> Role:
        return self._role

    @property
    def durable(self) -> Durable:
        return self._outbox.durable

    @property
    def epoch(self) -> int:
        return self._outbox.durable.epoch

    @property
    def term(self) -> int:
        return self._outbox.durable.term

    @property
    def record(self) -> Record:
        """The newest record held; perhaps not committed.  Act upon ``committed`` only."""
        return self._outbox.durable.record

    @property
    def committed(self) -> Record:
        return self._outbox.durable.committed

    @property
    def leader(self) -> NodeId | None:
        """Whom this node believes to lead; None: nobody known (say so as ``degraded``)."""
        return self._leader

    @property
    def is_voter(self) -> bool:
        return self.me in self.record.voters

    @property
    def ready(self) -> bool:
        """Whether ``propose`` would be heard: leader, a record of the own term committed, no change under way (R6)."""
        return self._role == "leader" and self._settled() and self._transfer_until == NEVER

    @property
    def _leaving(self) -> bool:
        return self._leave_at is not None

    # ------------------------------------------------------------------ questions that the transitions ask

    def _at_least(self, theirs: RecordId, mine: RecordId) -> bool:
        return theirs >= mine

    def _newer(self, a: RecordId, b: RecordId) -> bool:
        """R1, for every comparison of records in this file."""
        return a > b

    def _new_ballot(self) -> Ballot:
        """R2: of the candidate's own record."""
        return Ballot(self.record.voters, self.me)

    def _restamped(self) -> Record:
        """R4."""
        return restamp(self.record, RecordId(self.term, self.record.id.version))

    def _may_propose(self) -> bool:
        """R6: a record of the own term is committed, and it is the newest one."""
        return self.ready

    def _check_step(self, voters: tuple[NodeId, ...], content: Content) -> None:
        """R6 and I11, for a proposal."""
        if not one_step(self.record.voters, voters):
            raise Refused("voters change one at a time: add one, or remove one")
        if self.me not in voters:
            raise Refused("the coordinator stays a voter: transfer first")
        if any(v in content.tombstones for v in voters):
            raise Refused("a revoked member cannot vote")

    def _settled(self) -> bool:
        """Whether the record held is of this epoch and term, and committed."""
        return self.committed.id == self.record.id and self.record.id.term == self.term

    def _has_quorum(self, now: float) -> bool:
        return now < self._quorum_ends()

    def _quorum_ends(self) -> float:
        """R7: when this leader steps down if nobody answers from now on.

        Counted from when the last answered requests were *sent*: the voters heard them later, and refuse PreVotes for
        at least as long from then (R3), so that nobody else is elected before (but for drifting clocks).
        """
        return self._progress.majority_at(self.record.voters, self.me) + self._config.check_quorum_s

    def _hears_leader(self, now: float) -> bool:
        if self._role == "leader":
            return True
        return self._leader is not None and now - self._heard_leader < self._config.election_min_s

    def _learners(self) -> list[NodeId]:
        return self._roster.alive(besides=[*self.record.voters, *self._revoked])

    def _carriers(self) -> list[NodeId]:
        """Who may carry a message where a direct link stays silent: the other voters, then living members."""
        return [*(v for v in self.record.voters if v != self.me), *self._learners()]

    def _counted(self, content: Content) -> Content:
        old = self.record.content
        counter = old.placement_counter + (content.placement != old.placement)
        return msgspec.structs.replace(content, placement_counter=counter)

    def _next_record(self, voters: tuple[NodeId, ...], content: Content) -> Record:
        return make_record(self.epoch, RecordId(self.term, self.record.id.version + 1), voters, content)

    def _arm(self, now: float) -> None:
        """The time-out of a follower; nobody else can lead a mesh with one voter, so that one does not wait."""
        if not self.is_voter:
            self._deadline = None if self._leader is None else now + self._learner_patience()
        elif self.record.voters == (self.me,):
            self._deadline = now
        else:
            self._deadline = now + self._rng.uniform(self._config.election_min_s, self._config.election_max_s)
        self._may_yield = self._waited_for_leader = True

    def _learner_patience(self) -> float:
        """For how long a learner believes in a leader that does not remind it (``Spread.reminded``): it may be on the
        minority's side together with a leader that stepped down, and must not take that for a mesh that is whole."""
        turns = math.ceil((len(self._learners()) + 1) / self._config.beat)
        return self._config.election_max_s + 4 * turns * self._config.heartbeat_s

    # ------------------------------------------------------------------ messages

    def _head(self, term: int | None = None) -> tuple[MeshId, int, int]:
        return self._outbox.durable.mesh_id, self.epoch, self.term if term is None else term

    def _question(self) -> m.AskPreVote | m.AskVote:
        if self._role == "precandidate":
            return m.AskPreVote(*self._head(term=self.term + 1), record=self.record.id)
        return m.AskVote(*self._head(), record=self.record.id)

    def _append(self, now: float, whole: bool) -> m.Append:
        record = self.record
        return m.Append(
            *self._head(),
            record_id=record.id,
            record_hash=record.hash,
            committed=self.committed.id,
            sent_at=now,
            record=record if whole else None,
        )

    def _announce(self) -> m.Announce:
        return m.Announce(*self._head(), record=self.committed, leader=self._leader)

    def _notice(self) -> m.Notice:
        return m.Notice(*self._head(), record_id=self.committed.id, leader=self._leader)

    def _fetch(self) -> m.Fetch:
        return m.Fetch(*self._head(), record_id=self.committed.id)
