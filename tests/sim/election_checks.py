"""Checkers of I1-I12 for the election.  They share no code with what they check.

A checker looks at what a node shows after a step (role, durable state), at what it has on disk, and at the votes that
really went out.  Ids are plain tuples (epoch, term, version) here, majorities are counted by hand, and the lineage of
records is kept from the outside: a record's parent is what its maker held just before.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from functools import cache
from typing import Any

Key = tuple[int, int, int]


class Violation(AssertionError):
    """A property does not hold; ``rule`` is its name (``I1`` ...)."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(f"{rule}: {what}")
        self.rule = rule


def key_of(record: Any) -> Key:
    return (record.epoch, record.id.term, record.id.version)


@cache
def meet(old: tuple[str, ...], new: tuple[str, ...]) -> bool:
    """Whether all majorities of ``old`` and ``new`` intersect, by trying them all."""

    def majorities(voters: tuple[str, ...]) -> list[set[str]]:
        return [set(some) for some in itertools.combinations(voters, len(voters) // 2 + 1)]

    return all(a & b for a in majorities(old) for b in majorities(new))


class ElectionChecker:
    """Feed it ``sent`` for every message that leaves, ``stepped`` after every step; it raises ``Violation``."""

    def __init__(self, ignore: tuple[str, ...] = ()) -> None:
        self.ignore = ignore
        self.leaders: dict[tuple[int, int], str] = {}
        self.grants: dict[tuple[int, int, str], str] = {}
        """(epoch, term, voter) -> the candidate that it voted for."""
        self.contents: dict[Key, tuple[Any, Any]] = {}
        self.parents: dict[Key, Key | None] = {}
        self.committed: list[Key] = []
        self.voters: dict[Key, tuple[str, ...]] = {}
        self.seen: dict[str, tuple[Any, str]] = {}
        self.disks: dict[str, Key] = {}
        self.highest: dict[str, tuple[Any, ...]] = {}
        self.counts = {"elections": 0, "commits": 0, "reconfigurations": 0, "epochs": 0}

    def fail(self, rule: str, what: str) -> None:
        if rule not in self.ignore:
            raise Violation(rule, what)

    # -- what is fed

    def sent(self, sender: str, to: str, message: Any) -> None:
        """A message went out.  Only votes matter: I10, no two grants by one id in a term."""
        if type(message).__name__ == "Voted" and message.granted:
            self._granted(message.epoch, message.term, sender, to)

    def persisted(self, node: str, durable: Any) -> None:
        """``durable`` is what ``node`` would wake up with."""
        self.disks[node] = key_of(durable.record)

    def stepped(self, node: str, core: Any) -> None:
        """``node`` finished a step; nothing to do where neither role nor durable state changed."""
        durable, role = core.durable, core.role
        seen = self.seen.get(node)
        if seen is not None and seen[0] is durable and seen[1] == role:
            return
        before = seen[0] if seen is not None else None
        if before is None or before.record is not durable.record:
            self._check_record(node, durable.record, before.record if before else None)
        if before is not durable:
            self._check_progress(node, durable)
        if role in ("candidate", "leader") and durable.voted_for == node:
            self._granted(durable.epoch, durable.term, node, node)
        if role == "leader":
            self._check_leader(node, durable)
        if before is None or before.committed is not durable.committed:
            self._check_committed(durable.committed)
        self.seen[node] = (durable, role)

    def fenced(self, node: str, kind: str, asked: tuple[int, int], verdict: str, core: Any) -> None:
        """I7: ``node`` was asked to open work under (``kind`` "open") or to obey ("obey") ``asked``."""
        at = 3 if kind == "open" else 0
        top = self.highest.get(node, ((0, 0),) * 4)[at]
        if verdict == "ok" and asked < top:
            self.fail("I7", f"{node} accepted {kind} {asked} after {top}")

    def foreign(self, node: str, effects: list[Any]) -> None:
        """I12: a message of another mesh was given to ``node``."""
        if any(type(effect).__name__ != "Emit" for effect in effects):
            self.fail("I12", f"{node} acted on a message of another mesh: {effects}")

    def forget(self, node: str) -> None:
        """The disk of ``node`` was wiped: what it shows next may be older (only in the negative control)."""
        self.seen.pop(node, None)
        self.highest.pop(node, None)
        self.disks[node] = (0, 0, 0)

    # -- the properties

    def _granted(self, epoch: int, term: int, voter: str, candidate: str) -> None:
        was = self.grants.setdefault((epoch, term, voter), candidate)
        if was != candidate:
            self.fail("I10", f"{voter} voted for {was} and for {candidate} in term {term}")

    def _check_record(self, node: str, record: Any, before: Any) -> None:
        key = key_of(record)
        shown = (record.voters, record.content)
        known = self.contents.get(key)
        if known is None:
            self.contents[key] = shown
            self.voters[key] = record.voters
            parent = None if before is None else key_of(before)
            self.parents[key] = parent
            self._check_step(key, parent)
            self._check_ancestry(key)
            if any(voter in record.content.tombstones for voter in record.voters):
                self.fail("I11", f"a revoked voter in {key}")
        elif known[0] != record.voters or (known[1] is not record.content and known[1] != record.content):
            self.fail("I2", f"{node} holds other content under {key}")

    def _check_step(self, key: Key, parent: Key | None) -> None:
        if parent is not None and parent in self.voters and parent[0] == key[0]:
            self.counts["reconfigurations"] += self.voters[key] != self.voters[parent]
        self.counts["epochs"] += parent is not None and parent[0] != key[0]

    def _check_ancestry(self, key: Key) -> None:
        """I4, when a record is made: it descends from the largest smaller committed one of its epoch."""
        at = bisect_left(self.committed, key)
        if at and self.committed[at - 1][0] == key[0] and not self._descends(key, self.committed[at - 1]):
            self.fail("I4", f"{key} does not descend from committed {self.committed[at - 1]}")

    def _descends(self, key: Key, ancestor: Key) -> bool:
        at: Key | None = key
        while at is not None and at > ancestor:
            at = self.parents.get(at)
        return at == ancestor

    def _check_progress(self, node: str, durable: Any) -> None:
        """I5: nothing durable goes back."""
        now = (
            (durable.epoch, durable.term),
            key_of(durable.record),
            key_of(durable.committed),
            tuple(durable.active_placement),
        )
        was = self.highest.get(node)
        if was is not None and any(a > b for a, b in zip(was, now, strict=True)):
            self.fail("I5", f"{node} went back from {was} to {now}")
        self.highest[node] = now

    def _check_leader(self, node: str, durable: Any) -> None:
        term = (durable.epoch, durable.term)
        if term not in self.leaders:
            self.leaders[term] = node
            self.counts["elections"] += 1
            self._check_electorate(node, durable)
        elif self.leaders[term] != node:
            self.fail("I1", f"{node} and {self.leaders[term]} lead term {term}")

    def _check_electorate(self, node: str, durable: Any) -> None:
        """I10: those that voted for it are a majority of its record's voters (it voted for itself)."""
        voters = durable.record.voters
        votes = [v for v in voters if self.grants.get((durable.epoch, durable.term, v)) == node]
        if 2 * len(votes) <= len(voters):
            self.fail("I10", f"{node} leads term {durable.term} by the votes of {votes} of {voters}")

    def _check_committed(self, record: Any) -> None:
        if not record.voters:
            return
        key = key_of(record)
        at = bisect_left(self.committed, key)
        if at < len(self.committed) and self.committed[at] == key:
            return
        self._check_held(key, record)
        if at and self.committed[at - 1][0] == key[0]:
            self._check_adjacent(self.committed[at - 1], key)
        if at < len(self.committed) and self.committed[at][0] == key[0]:
            self._check_adjacent(key, self.committed[at])
        insort(self.committed, key)
        self.counts["commits"] += 1
        for other in self.contents:  # I4, for records that were made before this one committed
            if other > key and other[0] == key[0] and not self._descends(other, key):
                self.fail("I4", f"{other} does not descend from {key}, which committed after it")

    def _check_adjacent(self, older: Key, newer: Key) -> None:
        if not self._descends(newer, older):
            self.fail("I3", f"committed {newer} does not descend from committed {older}")
        if not meet(self.voters[older], self.voters[newer]):
            self.fail("I9", f"voters {self.voters[older]} and {self.voters[newer]} need not meet")

    def _check_held(self, key: Key, record: Any) -> None:
        """I6 and I8, at the moment of commitment: a majority of its voters has it, or a successor, on disk."""
        self.contents.setdefault(key, (record.voters, record.content))
        self.voters.setdefault(key, record.voters)
        holders = [v for v in record.voters if self.disks.get(v, (0, 0, 0)) >= key]
        if 2 * len(holders) <= len(record.voters):
            self.fail("I8", f"{key} was called committed, held by {holders} of {record.voters}")

    def check_kept(self) -> None:
        """I8, later: the largest committed record is still on a majority of its voters' disks."""
        if not self.committed:
            return
        key = self.committed[-1]
        holders = [v for v in self.voters[key] if self.disks.get(v, (0, 0, 0)) >= key]
        if 2 * len(holders) <= len(self.voters[key]):
            self.fail("I8", f"committed {key} is only left at {holders} of {self.voters[key]}")
