"""The arithmetic of majorities.  Voters are counted as a set of ids of one record, never as responses."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from mesh.types import NodeId


def majority(size: int) -> int:
    """How many of ``size`` voters are more than half."""
    return size // 2 + 1


def is_quorum(voters: Collection[NodeId], agreeing: Iterable[NodeId]) -> bool:
    """Whether ``agreeing`` holds a majority of ``voters``; repeated ids and outsiders do not count (I10)."""
    return bool(voters) and len(set(agreeing).intersection(voters)) >= majority(len(voters))


def overlaps(old: Iterable[NodeId], new: Iterable[NodeId]) -> bool:
    """Whether every majority of ``old`` meets every majority of ``new`` (what R6 rests on).

    Two disjoint majorities exist iff the common ids can be dealt out: each side first fills up with the ids that only
    it has, and what both still need fits into what they share.
    """
    before, after = set(old), set(new)
    shared = len(before & after)
    need_before = max(0, majority(len(before)) - len(before - after))
    need_after = max(0, majority(len(after)) - len(after - before))
    return need_before + need_after > shared


def one_step(old: Iterable[NodeId], new: Iterable[NodeId]) -> bool:
    """Whether ``new`` adds one voter, removes one, or changes none.  A swap is two steps (R6)."""
    return len(set(old) ^ set(new)) <= 1


class Ballot:
    """Who granted one candidacy: a set of voter ids of the candidate's own record (R2)."""

    def __init__(self, voters: tuple[NodeId, ...], me: NodeId) -> None:
        self._voters = voters
        self._granted = [me]
        self._refused: list[NodeId] = []

    def grant(self, voter: NodeId) -> None:
        """Count ``voter`` once; an outsider's grant is no grant."""
        if voter in self._voters and voter not in self._granted:
            self._granted.append(voter)

    def refuse(self, voter: NodeId) -> None:
        """Within a term no voter changes its mind."""
        if voter in self._voters and voter not in self._refused:
            self._refused.append(voter)

    def granted_by(self, voter: NodeId) -> bool:
        return voter in self._granted

    @property
    def won(self) -> bool:
        return len(self._granted) >= majority(len(self._voters))

    @property
    def lost(self) -> bool:
        """Whether so many refused that no majority is left."""
        return len(self._voters) - len(self._refused) < majority(len(self._voters))
