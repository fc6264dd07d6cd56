"""What gossip says of the members, and what the leader makes of it: learners, leavers, the next step of the voters."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mesh.election.config import ElectionConfig
from mesh.election.record import Record
from mesh.election.voters import MemberInfo, next_voters
from mesh.types import NodeId


class Roster:
    """The members as last told, this node among them."""

    def __init__(self, me: NodeId, config: ElectionConfig) -> None:
        self._me, self._config = me, config
        self._members: dict[NodeId, MemberInfo] = {}
        self._missing: dict[NodeId, float] = {}
        """Voters of whom gossip knows nothing: since when."""
        self._leavers: dict[NodeId, float] = {}
        """Who asked to be replaced: when it did last."""

    def note(self, members: Sequence[MemberInfo], voters: tuple[NodeId, ...], now: float) -> None:
        self._members = {member.id: member for member in sorted(members, key=lambda member: member.id)}
        self._members.setdefault(self._me, MemberInfo(self._me, alive_since=now))
        self._missing = {v: self._missing.get(v, now) for v in voters if v not in self._members}

    def alive(self, besides: Collection[NodeId] = ()) -> list[NodeId]:
        """Living members but this node and ``besides``."""
        return [n for n, info in self._members.items() if info.live and n != self._me and n not in besides]

    def leaving(self, node: NodeId, now: float) -> None:
        self._leavers[node] = now

    def forget_leavers(self) -> None:
        """A new leader is told anew: who still leaves asks again."""
        self._leavers = {}

    def wish(
        self, record: Record, now: float, last_step: float, also_leaving: Sequence[NodeId]
    ) -> tuple[NodeId, ...] | None:
        """The voters that should follow ``record``'s, by the policy of ``voters.py``."""
        members = [m for m in self._members.values() if m.id not in record.content.tombstones]
        missing = [MemberInfo(v, None, dead_since=since) for v, since in self._missing.items()]
        leaving = [*self._current_leavers(now), *also_leaving]
        return next_voters(
            record.voters,
            [*members, *missing],
            self._me,
            now,
            self._config,
            last_step=last_step,
            leaving=leaving,
        )

    def is_leaving(self, node: NodeId, now: float) -> bool:
        return node in self._current_leavers(now)

    def _current_leavers(self, now: float) -> list[NodeId]:
        """A node that asked long ago went, or changed its mind; it may return as any other (R10)."""
        self._leavers = {n: at for n, at in self._leavers.items() if now - at < self._config.dead_after_s}
        return list(self._leavers)
