"""A bench for single cores and small sets of them: no network but a queue, no clock but a number."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from mesh.core import Emit, Persist, Send
from mesh.election import messages as m
from mesh.election.config import ElectionConfig, lan
from mesh.election.durable import Durable
from mesh.election.election import Election
from mesh.election.record import Content, Record, RecordId, make_epoch, make_record
from mesh.election.voters import MemberInfo

MESH = "11" * 16
EPOCH = make_epoch(1, 7)
START = 100.0
MANUAL = ElectionConfig(auto_voters=False)


def record(term: int = 1, version: int = 1, voters: str = "abc", content: Content | None = None) -> Record:
    return make_record(EPOCH, RecordId(term, version), tuple(voters), content or Content())


def disk(
    name: str = "a",
    term: int = 1,
    voted_for: str | None = None,
    held: Record | None = None,
    committed: Record | None = None,
) -> Durable:
    held = held or record()
    return Durable(MESH, EPOCH, name, term, voted_for, held, committed or held)


def core(name: str = "a", seed: int = 1, config: ElectionConfig = MANUAL, **state: Any) -> Election:
    return Election(disk(name, **state), config, random.Random(seed), START)


def sent(effects: Sequence[Any], kind: type | None = None) -> list[tuple[str, Any]]:
    """(to, message) of the Sends among ``effects``, of one kind."""
    found = [(e.to, e.message) for e in effects if isinstance(e, Send)]
    return [(to, message) for to, message in found if kind is None or isinstance(message, kind)]


def events(effects: Sequence[Any], kind: type | None = None) -> list[Any]:
    found = [e.event for e in effects if isinstance(e, Emit)]
    return [event for event in found if kind is None or isinstance(event, kind)]


def persisted(effects: Sequence[Any]) -> list[Durable]:
    return [e.record for e in effects if isinstance(e, Persist)]


def ask_vote(term: int, rid: tuple[int, int] = (1, 1)) -> m.AskVote:
    return m.AskVote(MESH, EPOCH, term, record=RecordId(*rid))


def ask_prevote(term: int, rid: tuple[int, int] = (1, 1)) -> m.AskPreVote:
    return m.AskPreVote(MESH, EPOCH, term, record=RecordId(*rid))


def voted(term: int, granted: bool = True) -> m.Voted:
    return m.Voted(MESH, EPOCH, term, granted=granted)


def prevoted(campaign: int, granted: bool = True, term: int | None = None) -> m.PreVoted:
    return m.PreVoted(MESH, EPOCH, campaign - 1 if term is None else term, campaign=campaign, granted=granted)


def append(
    term: int, held: Record, committed: tuple[int, int] = (1, 1), whole: bool = True, sent_at: float = START
) -> m.Append:
    return m.Append(
        MESH,
        EPOCH,
        term,
        record_id=held.id,
        record_hash=held.hash,
        committed=RecordId(*committed),
        sent_at=sent_at,
        record=held if whole else None,
    )


def appended(term: int, rid: tuple[int, int], sent_at: float = START) -> m.Appended:
    return m.Appended(MESH, EPOCH, term, record_id=RecordId(*rid), sent_at=sent_at)


def relayed(inner: Any, origin: str = "c", to: str = "a", signature: bytes | None = None) -> m.Relayed:
    message = m.Relayed(MESH, EPOCH, 2, origin=origin, to=to, payload=m.encode(inner), signature=b"")
    return msgspec.structs.replace(message, signature=origin.encode() if signature is None else signature)


def candidate(name: str = "a", now: float = START + 3.0, **state: Any) -> tuple[Election, float]:
    """A core that won its PreVote by all others' grants; its term is one more."""
    it = core(name, **state)
    it.tick(now)
    for voter in it.record.voters:
        if voter != name and it.role == "precandidate":
            it.receive(prevoted(it.term + 1), voter, now)
    assert it.role == "candidate"
    return it, now


def leader(name: str = "a", now: float = START + 3.0, commit: bool = True, **state: Any) -> tuple[Election, float]:
    """A core that won its election by all others' votes; with ``commit``, its restamped record is committed."""
    it, now = candidate(name, now, **state)
    for voter in it.record.voters:
        if voter != name and it.role == "candidate":
            it.receive(voted(it.term), voter, now)
    assert it.role == "leader"
    for voter in it.record.voters if commit else ():
        if voter != name:
            it.receive(appended(it.term, (it.record.id.term, it.record.id.version), now), voter, now)
    return it, now


class Lab:
    """Cores that exchange messages at once, in order; links can be cut, messages dropped by a rule."""

    def __init__(
        self,
        names: str = "abc",
        voters: str = "abc",
        config: ElectionConfig = MANUAL,
        seed: int = 1,
        make: Callable[..., Election] = Election,
    ) -> None:
        self.names, self.config, self.seed, self.make = list(names), config, seed, make
        self.now = START
        self.disks = {n: disk(n, held=record(voters=voters)) for n in names}
        self.cores: dict[str, Election] = {}
        self.told: list[tuple[str, Any]] = []
        self.carried: list[tuple[str, str, Any]] = []
        """All messages that arrived."""
        self.queue: deque[tuple[str, str, Any]] = deque()
        self.cuts: set[tuple[str, str]] = set()
        self.drop: Callable[[str, str, Any], bool] = lambda sender, to, message: False
        for name in names:
            self.boot(name)

    def boot(self, name: str) -> None:
        sign = name.encode()
        self.cores[name] = self.make(
            self.disks[name],
            self.config,
            random.Random(f"{self.seed}{name}"),
            self.now,
            sign=lambda data: sign,
            verify=lambda node, data, signature: signature == node.encode(),
        )
        self.cores[name].note_members([MemberInfo(n, alive_since=START - 100.0) for n in self.names], self.now)

    def cut(self, a: str, b: str) -> None:
        self.cuts |= {(a, b), (b, a)}

    def isolate(self, name: str) -> None:
        for other in self.names:
            self.cut(name, other)

    def heal(self) -> None:
        self.cuts = set()

    def perform(self, name: str, effects: Sequence[Any]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.queue.append((name, effect.to, effect.message))
            elif isinstance(effect, Persist):
                self.disks[name] = effect.record
            else:
                self.told.append((name, effect.event))

    def flow(self) -> None:
        """Deliver until nothing is in flight."""
        for _ in range(10_000):
            if not self.queue:
                return
            sender, to, message = self.queue.popleft()
            if to in self.cores and (sender, to) not in self.cuts and not self.drop(sender, to, message):
                self.carried.append((sender, to, message))
                self.perform(to, self.cores[to].receive(message, sender, self.now))
        raise AssertionError("the messages never end")

    def do(self, name: str, verb: Callable[[Election, float], Sequence[Any]]) -> None:
        self.perform(name, verb(self.cores[name], self.now))
        self.flow()

    def time_out(self, name: str) -> None:
        """Let the election time-out of ``name`` pass, and as much time for everyone."""
        self.now = max(self.now + 1.001, self.cores[name].deadline or 0.0)
        self.do(name, lambda it, now: it.tick(now))

    def run(self, seconds: float) -> None:
        """Tick everyone at its deadline for ``seconds``."""
        until = self.now + seconds
        while True:
            due = [(it.deadline, n) for n, it in self.cores.items() if it.deadline is not None]
            if not due or min(due)[0] > until:
                break
            when, name = min(due)
            self.now = max(self.now, when)
            self.do(name, lambda it, now: it.tick(now))
        self.now = until

    def elect(self, name: str) -> Election:
        """Make ``name`` the leader by time-outs (it must be able to win)."""
        for _ in range(5):
            self.time_out(name)
            if self.cores[name].role == "leader":
                return self.cores[name]
        raise AssertionError(f"{name} was not elected")

    def roles(self) -> dict[str, str]:
        return {n: it.role for n, it in self.cores.items()}

    def leaders(self) -> list[str]:
        return [n for n, it in self.cores.items() if it.role == "leader"]


LAN = lan()
