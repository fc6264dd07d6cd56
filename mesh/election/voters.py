"""Who votes: one step of the policy, a pure function of the record's voters and what gossip says of the members.

One rule decides almost everything: *an odd number of living voters, spread over failure domains, changed as seldom
as possible*.  Steps are single additions or removals (R6); a growth 1 -> 2 -> 3 is two of them in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mesh.election.config import ElectionConfig
from mesh.election.quorum import majority
from mesh.types import NodeId


class MemberInfo(msgspec.Struct, frozen=True):
    """What gossip says of one member, in seconds of this node's clock."""

    id: NodeId
    alive_since: float | None
    """Alive and unsuspected since then; None: it is suspected, dead or gone."""
    dead_since: float | None = None
    """Dead or left since then; None: it is not."""
    domain: str = ""
    """What fails together: a machine, a site.  Empty: unknown, thus unlike all others."""
    can_vote: bool = True

    @property
    def live(self) -> bool:
        """Counted in N: alive or only suspected."""
        return self.dead_since is None


def target(live: int) -> int:
    """How many voters a mesh of ``live`` members should have: 1, 3 or 5."""
    if live <= 2:
        return 1
    return 3 if live <= 6 else 5


def next_voters(
    voters: tuple[NodeId, ...],
    members: Sequence[MemberInfo],
    leader: NodeId,
    now: float,
    config: ElectionConfig,
    *,
    last_step: float = float("-inf"),
    leaving: Sequence[NodeId] = (),
) -> tuple[NodeId, ...] | None:
    """The voters after one step, or None when there is nothing to do (yet).

    ``members`` includes the leader itself; a voter that is missing from it counts as not alive.  ``last_step``: when
    the voters changed last; ``leaving``: members that asked to go.
    """
    plan = _Plan(voters, members, leader, now, config, leaving)
    if any(v in leaving for v in voters):
        return plan.replace_leaver()
    if len(voters) % 2 == 0:
        return plan.leave_even_size()
    if now - last_step < config.step_s:
        return None
    return plan.remove_dead() or plan.grow()


class _Plan:
    """The facts of one decision."""

    def __init__(
        self,
        voters: tuple[NodeId, ...],
        members: Sequence[MemberInfo],
        leader: NodeId,
        now: float,
        config: ElectionConfig,
        leaving: Sequence[NodeId],
    ) -> None:
        self.voters, self.leader, self.now, self.config, self.leaving = voters, leader, now, config, leaving
        self.members = {m.id: m for m in sorted(members, key=lambda m: m.id)}
        self.target = target(sum(m.live and m.id not in leaving for m in self.members.values()))

    # -- the steps

    def replace_leaver(self) -> tuple[NodeId, ...] | None:
        """A substitute first, then the leaver goes; the leader itself goes by handing over (``Election.leave``)."""
        keepers = [v for v in self.voters if v not in self.leaving and self._alive(v)]
        substitutes = self.eligible() or ([] if keepers else self.eligible(after_s=0.0))
        if len(keepers) < self.target and substitutes:
            return self._with(self._best(substitutes))
        leavers = [v for v in self.voters if v in self.leaving and v != self.leader]
        return self._without(leavers[0]) if leavers else None

    def leave_even_size(self) -> tuple[NodeId, ...] | None:
        """Even sizes bear no more failures than the odd size below: on to the target, or back."""
        dead = self.removable()
        if dead:
            return self._without(dead[0])
        eligible = self.eligible()
        if len(self.voters) < self.target and eligible:
            return self._with(self._best(eligible))
        return self._without(self._least())

    def remove_dead(self) -> tuple[NodeId, ...] | None:
        dead = self.removable()
        return self._without(dead[0]) if dead else None

    def grow(self) -> tuple[NodeId, ...] | None:
        """Only when enough are eligible to reach the target, so that no even size is held for long.  A larger odd size
        than the target is kept while its voters live (sticky)."""
        eligible = self.eligible()
        if len(self.voters) < self.target <= len(self.voters) + len(eligible):
            return self._with(self._best(eligible))
        return None

    # -- who

    def eligible(self, after_s: float | None = None) -> list[MemberInfo]:
        """Members that may become voters: alive without suspicion for long enough, and staying."""
        wait = self.config.eligible_after_s if after_s is None else after_s
        return [
            m
            for m in self.members.values()
            if m.id not in self.voters
            and m.can_vote
            and m.live
            and m.alive_since is not None
            and self.now - m.alive_since >= wait
            and m.id not in self.leaving
        ]

    def removable(self) -> list[NodeId]:
        """Voters dead for long enough, while a majority of the rest lives; the longest dead first."""
        dead = [
            v
            for v in self.voters
            if v != self.leader and self._dead_for(v) >= self.config.dead_after_s and self._rest_lives(v)
        ]
        return sorted(dead, key=lambda v: (-self._dead_for(v), v))

    def _rest_lives(self, voter: NodeId) -> bool:
        rest = [v for v in self.voters if v != voter]
        return sum(self._alive(v) for v in rest) >= majority(len(rest))

    def _best(self, eligible: list[MemberInfo]) -> NodeId:
        """Another failure domain than the voters', then the longest alive."""
        return min(eligible, key=lambda m: (self._crowd(m.id), m.alive_since or 0.0, m.id)).id

    def _least(self) -> NodeId:
        """The voter to miss least, never the leader: in doubt, then crowded in its domain, then the youngest."""
        others = [v for v in self.voters if v != self.leader]
        return max(others, key=lambda v: (not self._alive(v), self._crowd(v), self._since(v), v))

    def _crowd(self, node: NodeId) -> int:
        """How many other voters share the failure domain of ``node``."""
        domain = self.members[node].domain if node in self.members else ""
        return sum(v != node and v in self.members and self.members[v].domain == domain != "" for v in self.voters)

    def _alive(self, node: NodeId) -> bool:
        return node == self.leader or (node in self.members and self.members[node].alive_since is not None)

    def _since(self, node: NodeId) -> float:
        since = self.members[node].alive_since if node in self.members else None
        return float("inf") if since is None else since

    def _dead_for(self, node: NodeId) -> float:
        since = self.members[node].dead_since if node in self.members else None
        return -1.0 if since is None else self.now - since

    def _with(self, node: NodeId) -> tuple[NodeId, ...]:
        return tuple(sorted((*self.voters, node)))

    def _without(self, node: NodeId) -> tuple[NodeId, ...]:
        return tuple(v for v in self.voters if v != node)
