"""Negative controls: the election with one rule switched off.  Each must be caught by the checkers.

Each is a subclass that overrides one small method of the core, or a way for the world to forget what must be durable.
``python -m tests.sim.election_mutants [SCHEDULES] [NAME]`` searches for the first seed that catches each.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import msgspec

from mesh.election.election import Election
from mesh.election.messages import Appended
from mesh.election.quorum import Ballot, majority
from mesh.election.record import Content, Record, RecordId
from mesh.types import NodeId


class SwapInOneStep(Election):
    """R6 without "add one or remove one"."""

    def _check_step(self, voters: tuple[NodeId, ...], content: Content) -> None:
        if self.me not in voters:
            super()._check_step(voters, content)


class ChangeBeforeOwnTermCommitted(Election):
    """Ongaro's single-server bug: a new leader changes the record before its restamp is committed."""

    def _may_propose(self) -> bool:
        return self.role == "leader" and self.record.id.version == self.committed.id.version


class NoRestamp(Election):
    """R4 left out: the winner replicates the record under its old id, and counts that as committed."""

    def _restamped(self) -> Record:
        return self.record

    def _settled(self) -> bool:
        return self.committed.id == self.record.id


class CountsResponses(Election):
    """R2 without the set: every grant that arrives counts, also a repeated one."""

    def _new_ballot(self) -> Ballot:
        return _Tally(self.record.voters, self.me)


class _Tally(Ballot):
    def grant(self, voter: NodeId) -> None:
        if voter in self._voters:
            self._granted.append(voter)


class VersionOnly(Election):
    """R1 reversed: records are compared by version alone."""

    def _at_least(self, theirs: RecordId, mine: RecordId) -> bool:
        return theirs.version >= mine.version

    def _newer(self, a: RecordId, b: RecordId) -> bool:
        return a.version > b.version


class VotesForOlder(Election):
    """R2 without the comparison of records."""

    def _at_least(self, theirs: RecordId, mine: RecordId) -> bool:
        return True


class CountsOutsiders(Election):
    """R5 with acknowledgements counted against the wrong majority: of half the voters."""

    def _try_commit(self, now: float) -> None:
        holders = {*self._progress.holders(self.record.id), self.me}.intersection(self.record.voters)
        if len(holders) >= majority(len(self.record.voters)) - 1 and self.committed.id != self.record.id:
            self._commit()
            self._replicate(now, whole=False)


class TakesFromAnyLeader(Election):
    """R9 without terms: a record of a deposed leader is still taken and acknowledged."""

    def _on_append(self, message: Any, sender: NodeId, now: float) -> None:
        if message.term >= self.term:
            return super()._on_append(message, sender, now)
        if message.record is not None and self._newer(message.record.id, self.record.id):
            self._save(record=message.record)
        head = (message.mesh, message.epoch, message.term)
        self._send(sender, Appended(*head, record_id=self.record.id, sent_at=message.sent_at))


class AcceptsOtherMeshes(Election):
    """I12: the mesh id is not looked at."""

    def receive(self, message: Any, sender: NodeId, now: float) -> list[Any]:
        return super().receive(msgspec.structs.replace(message, mesh=self.durable.mesh_id), sender, now)


class ObeysAnyTerm(Election):
    """I7: a coordinator's command of any term is obeyed."""

    def obey(self, epoch: int, term: int, sender: NodeId, now: float) -> Any:
        return super().obey(epoch, max(term, self.term), sender, now)


class NoPreVote(Election):
    """R3 left out: a time-out raises the term at once."""

    def _prevote(self, now: float) -> None:
        if self.is_voter:
            self._campaign(now)
        else:
            super()._prevote(now)


_CRASHES = (6.0, 0.5, 0.5, 0.0, 8.0, 4.0, 0.0, 0.0, 2.0)
"""Weights of ``election_bag.ACTS``: a vote must be forgotten just after it was given."""
_PROPOSALS = (6.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0)

CONTROLS: dict[str, dict[str, Any]] = {
    "swap one voter in a single step": {"make": SwapInOneStep, "ignore": ("I9",)},
    "a wiped disk rejoins with the same id": {"wipe": True},
    "change before a record of the own term is committed": {
        "make": ChangeBeforeOwnTermCommitted,
        "voters": 4,  # two changes of an odd set always meet
        "nodes": 6,
    },
    "no restamp at election": {"make": NoRestamp},
    "term and vote not persisted": {"forget": ("term", "voted_for"), "ignore": ("I5", "I10")},
    "vote not persisted": {"forget": ("voted_for",), "ignore": ("I10",), "weights": _CRASHES},
    "writes trusted before their fsync": {"lies": True, "ignore": ("I5", "I10"), "weights": _CRASHES},
    "duplicate votes counted": {"make": CountsResponses, "ignore": ("I10",)},
    "votes for older records": {"make": VotesForOlder},
    "commit without a majority": {"make": CountsOutsiders, "ignore": ("I8",)},
    "records of deposed leaders taken": {"make": TakesFromAnyLeader, "weights": _PROPOSALS, "voters": 3},
    "messages of other meshes heard": {"make": AcceptsOtherMeshes},
    "commands of any term obeyed": {"make": ObeysAnyTerm},
}
"""Name -> how ``election_bag.Bag`` is made.  ``ignore``: the rule that sees the cause at once; what is asked for is
that the *consequences* are seen (two leaders in a term, forked or lost commits)."""


def main(schedules: int, only: str = "") -> None:
    """Search, one line per control."""
    from tests.sim.election_bag import search

    for name, how in CONTROLS.items():
        if only in name:
            start = time.monotonic()
            found = search(range(schedules), **how)
            seen = f"seed {found[0]}: {str(found[1])[:110]}" if found else f"not caught in {schedules}"
            print(f"{name}: {seen} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000, " ".join(sys.argv[2:]))
