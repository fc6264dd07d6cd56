"""Message-bag schedules: no common clock, any message at any time, for the election's safety.

A schedule is a row of phases.  Each draws an act (a time-out, a crash, a proposal ...) and a group of nodes that hear
each other, then lets some of the messages in flight among the group arrive, in some order, some lost or twice.  What
is left stays in the bag and may arrive much later.  Safety must not depend on time, so every node has a clock of its
own that jumps to its deadline.  One seed is one schedule, with weights of its own (swarm testing).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from mesh.core import Emit, Persist, Send
from mesh.election.config import ElectionConfig
from mesh.election.durable import Durable, newcomer
from mesh.election.election import Election
from mesh.election.events import Busy, NotLeader, Refused
from mesh.election.messages import AskPreVote, AskVote, Voted
from mesh.election.record import EMPTY, Content, RecordId, make_epoch, make_record
from mesh.election.voters import MemberInfo
from tests.sim.election_checks import ElectionChecker, Violation

MESH = "11" * 16
EPOCH = make_epoch(1, 7)
MANUAL = ElectionConfig(auto_voters=False)
NAMES = "abcdefg"

ACTS = ("time_out", "propose", "voters", "swap", "crash", "restart", "reset", "fence", "nothing")


class Weather(msgspec.Struct, frozen=True):
    """How one schedule goes."""

    nodes: int = 5
    voters: int = 3
    phases: int = 30
    weights: tuple[float, ...] = (6.0, 3.0, 5.0, 1.0, 2.0, 2.0, 0.5, 0.5, 2.0)
    """Of ``ACTS``."""
    bursts: tuple[int, ...] = (0, 3, 8, 20, 40)
    """How many messages may arrive in a phase."""
    loss: float = 0.05
    copies: float = 0.05
    flood: float = 0.1
    """Chance that what was not delivered in a phase is lost."""
    order: str = "any"
    """Which message is delivered: ``any``, ``old`` or ``new``."""
    bag: int = 40
    """Messages in flight; more are lost."""
    takeovers: bool = False
    wipe: bool = False
    """A crashed node may lose its disk and keep its id: what R10 forbids (a negative control)."""
    forget: tuple[str, ...] = ()
    """Fields of the durable state that are not written (negative controls): ``term``, ``voted_for``."""
    lies: bool = False
    """A crash loses the last write: the driver did not wait for fsync (a negative control)."""


def draw_weather(rng: random.Random, **fixed: Any) -> Weather:
    """Swarm testing: each schedule has its own mixture of acts, some of them absent."""
    voters = rng.choice((2, 3, 3, 4, 4, 5))
    scale = [rng.choice((0.0, 0.3, 1.0, 1.0, 3.0)) for _ in ACTS]
    weights = [b * s for b, s in zip(Weather().weights, scale, strict=True)]
    weights[0] = max(weights[0], 3.0)
    weather = Weather(
        nodes=min(voters + rng.choice((0, 1, 2)), len(NAMES)),
        voters=voters,
        weights=tuple(weights),
        loss=rng.choice((0.0, 0.0, 0.1, 0.3)),
        copies=rng.choice((0.0, 0.0, 0.1, 0.3)),
        flood=rng.choice((0.0, 0.1, 0.5)),
        order=rng.choice(("any", "old", "old", "new")),
        bag=rng.choice((15, 30, 60)),
        takeovers=rng.random() < 0.05,
    )
    return msgspec.structs.replace(weather, **fixed)


class Bag:
    """One schedule."""

    def __init__(
        self,
        seed: int,
        make: Callable[..., Election] = Election,
        ignore: tuple[str, ...] = (),
        **fixed: Any,
    ) -> None:
        self.rng = random.Random(seed)
        self.weather = draw_weather(self.rng, **fixed)
        self.make = make
        self.checker = ElectionChecker(ignore)
        self.names = list(NAMES[: self.weather.nodes])
        self.mail: list[tuple[int, str, str, Any]] = []
        """(number, from, to, message), the oldest first ..."""
        self.near: list[tuple[int, str, str, Any]] = []
        """... but for those within the group, while they are delivered (``arriving``)."""
        self.arriving = False
        self._sent = 0
        self.disks: dict[str, Durable] = {}
        self.synced: dict[str, Durable] = {}
        """What was on the disk before the last write."""
        self.cores: dict[str, Election | None] = {}
        self.clocks = dict.fromkeys(self.names, 100.0)
        self.group: list[str] = self.names
        self.told: list[str] = []
        self.keep_story = False
        self._value = 0
        self._do = [getattr(self, "_" + act) for act in ACTS]
        self._found()

    def _found(self) -> None:
        """All start in term 1 with the same committed record, voters being the first few."""
        record = make_record(EPOCH, RecordId(1, 1), tuple(self.names[: self.weather.voters]), Content())
        for name in self.names:
            self.disks[name] = Durable(MESH, EPOCH, name, 1, None, record, record)
            self.checker.persisted(name, self.disks[name])
        for name in self.names:
            self._boot(name)

    def run(self) -> ElectionChecker:
        """Play the schedule; raises ``Violation``."""
        for act in self.rng.choices(self._do, self.weather.weights, k=self.weather.phases):
            self.group = self._draw_group()
            self._note(f"among {' '.join(self.group)}: {act.__name__[1:]}")
            act()
            self._let_arrive(self.rng.choice(self.weather.bursts))
        return self.checker

    def _draw_group(self) -> list[str]:
        if self.rng.random() < 0.3:
            return self.names
        return sorted(self.rng.sample(self.names, self.rng.randint(2, len(self.names))))

    def _let_arrive(self, burst: int) -> None:
        """Up to ``burst`` messages within the group, those that they bring about included."""
        rng, weather, among, mail = self.rng, self.weather, self.group, self.mail
        near = self.near = [letter for letter in mail if letter[1] in among and letter[2] in among]
        self.mail = [letter for letter in mail if letter[1] not in among or letter[2] not in among]
        self.arriving = True
        for _ in range(burst):
            if not near:
                break
            at = self._draw(len(near))
            _, sender, to, message = near[at] if rng.random() < weather.copies else near.pop(at)
            if rng.random() >= weather.loss:
                self._deliver(sender, to, message)
        self.mail += near
        self.mail.sort()  # by age
        self.near, self.arriving = [], False
        if rng.random() < weather.flood:
            self.mail.clear()

    # -- nodes

    def _boot(self, name: str) -> None:
        disk = self.disks[name]
        if self.weather.forget:
            lost: dict[str, Any] = {"voted_for": None}
            if "term" in self.weather.forget:
                lost["term"] = disk.record.id.term
            disk = msgspec.structs.replace(disk, **lost)
        core = self.make(disk, MANUAL, self.rng, self.clocks[name])
        core.note_members([MemberInfo(n, 0.0) for n in self.names], self.clocks[name])
        self.cores[name] = core
        self.checker.stepped(name, core)

    def _perform(self, name: str, effects: list[Any]) -> None:
        for effect in effects:
            kind = type(effect)
            if kind is Send:
                self._send(name, effect.to, effect.message)
            elif kind is Persist:
                self.synced[name], self.disks[name] = self.disks[name], effect.record
                self.checker.persisted(name, effect.record)
            elif self.keep_story:
                assert kind is Emit, effect
                self.told.append(f"    {name} says {effect.event}")
        core = self.cores[name]
        if core is not None:
            self.checker.stepped(name, core)

    def _send(self, sender: str, to: str, message: Any) -> None:
        if type(message) is Voted:
            self.checker.sent(sender, to, message)
        self._sent += 1
        near, mail = self.near, self.mail
        within = self.arriving and to in self.group and sender in self.group
        (near if within else mail).append((self._sent, sender, to, message))
        if len(near) + len(mail) > self.weather.bag:
            at = self.rng.randrange(len(near) + len(mail))
            near.pop(at) if at < len(near) else mail.pop(at - len(near))

    def _someone(self) -> str:
        return self.rng.choice(self.group)

    def _leader(self) -> str | None:
        """Some node that believes to lead; often there are several."""
        leaders = [n for n in self.group if (core := self.cores[n]) is not None and core.role == "leader"]
        return self.rng.choice(leaders) if leaders else None

    def _note(self, what: str) -> None:
        if self.keep_story:
            self.told.append(what)

    # -- acts

    def _draw(self, size: int) -> int:
        if self.weather.order == "any":
            return self.rng.randrange(size)
        near = min(int(self.rng.expovariate(1.0)), size - 1)
        return near if self.weather.order == "old" else size - 1 - near

    def _deliver(self, sender: str, to: str, message: Any) -> None:
        core = self.cores[to]
        if core is None:
            return
        if self.keep_story:
            self.told.append(f"  {sender} -> {to} {message}")
        late = type(message) is AskPreVote and self.rng.random() < 0.8
        self.clocks[to] += 1.0 if late else 0.001  # else R3 would refuse nearly all
        self._perform(to, core.receive(message, sender, self.clocks[to]))

    def _nothing(self) -> None:
        """Only messages arrive."""

    def _time_out(self) -> None:
        name = self._someone()
        core = self.cores[name]
        if core is None or core.deadline is None:
            return self._restart()
        self._note(f"  {name}")
        self.clocks[name] = max(self.clocks[name], core.deadline)
        self._perform(name, core.tick(self.clocks[name]))

    def _crash(self) -> None:
        name = self._someone()
        self._note(f"  {name} crashes")
        self.cores[name] = None
        at_once = self.rng.random() < 0.5
        if self.weather.wipe and self.rng.random() < 0.5:
            self._note(f"  {name} loses its disk")
            self.disks[name] = newcomer(MESH, name, EMPTY)
            self.disks[name] = msgspec.structs.replace(self.disks[name], epoch=EPOCH)
            self.checker.forget(name)
        if self.weather.lies and name in self.synced:
            self._note(f"  {name} loses its last write")
            self.disks[name] = self.synced.pop(name)
            self.checker.persisted(name, self.disks[name])
        if at_once:
            self._boot(name)

    def _restart(self) -> None:
        down = [n for n in self.names if self.cores[n] is None]
        if down:
            name = self.rng.choice(down)
            self._note(f"  {name} restarts")
            self._boot(name)

    def _propose(self) -> None:
        def change(core: Election, now: float) -> list[Any]:
            self._value += 1
            placement = b"%d" % self._value if self._value % 3 else core.record.content.placement
            content = msgspec.structs.replace(core.record.content, placement=placement, models=(b"%d" % self._value,))
            return core.propose(now, content)

        self._ask_leader("content", change)

    def _voters(self) -> None:
        def change(core: Election, now: float) -> list[Any]:
            voters = list(core.record.voters)
            name = self._someone()
            if name in voters:
                voters.remove(name)
            else:
                voters.append(name)
            return core.propose(now, voters=voters)

        self._ask_leader("voters", change)

    def _swap(self) -> None:
        def change(core: Election, now: float) -> list[Any]:
            old = core.record.voters
            outside = [n for n in self.group if n not in old]
            if not outside:
                return core.transfer(now)
            voters = [*old, self.rng.choice(outside)]
            voters.remove(self.rng.choice(old))
            return core.propose(now, voters=voters)

        self._ask_leader("swap or transfer", change)

    def _ask_leader(self, what: str, change: Callable[[Election, float], list[Any]]) -> None:
        name = self._leader()
        if name is None:
            return self._time_out()
        core = self.cores[name]
        assert core is not None
        self._note(f"  {name} is asked for {what}")
        try:
            effects = change(core, self.clocks[name])
        except (NotLeader, Busy, Refused):
            return
        self._perform(name, effects)

    def _reset(self) -> None:
        """A node loses sight of another; rarely a person takes over."""
        name = self._someone()
        core = self.cores[name]
        if core is None:
            return
        if self.weather.takeovers and self.rng.random() < 0.2:
            self._note(f"  {name} takes over")
            return self._perform(name, core.takeover(self.clocks[name], force=True))
        self._perform(name, core.note_lost(core.leader or self._someone(), self.clocks[name]))

    def _fence(self) -> None:
        """Old and new work, old and new commands, and a message of another mesh."""
        name, other = self._someone(), self.rng.choice(self.names)
        core = self.cores[name]
        if core is None or name == other:
            return
        known = self.checker.highest[other]
        pid, command = known[3], known[0]
        answer, effects = core.may_open(pid, other)
        self.checker.fenced(name, "open", pid, answer.verdict, core)
        self._perform(name, effects)
        if command in self.checker.leaders:
            answer, effects = core.obey(*command, other, self.clocks[name])
            self.checker.fenced(name, "obey", command, answer.verdict, core)
            self._perform(name, effects)
        stranger = AskVote("22" * 16, core.epoch, core.term + 5, record=RecordId(10**6, 10**6))
        self.checker.foreign(name, core.receive(stranger, other, self.clocks[name]))
        self.checker.stepped(name, core)


def search(seeds: Sequence[int], **how: Any) -> tuple[int, AssertionError] | None:
    """The first of ``seeds`` whose schedule breaks a property, and how."""
    for seed in seeds:
        try:
            Bag(seed, **how).run()
        except AssertionError as violation:
            return seed, violation
    return None


def story(seed: int, last: int = 200, **how: Any) -> str:
    """The last lines of a schedule that broke a property."""
    bag = Bag(seed, **how)
    bag.keep_story = True
    with contextlib.suppress(Violation):
        bag.run()
    return "\n".join(bag.told[-last:])
