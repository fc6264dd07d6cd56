"""The production election core in ``tests.sim.world``: timed weather, an oracle for gossip, checkers after each step.

Gossip is played by an oracle: a member that cannot be reached, even through others, is suspected after 1 s and dead
after 3 s.  Everything
else (clock, network, disk, crashes) is the simulator's.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from gossip.config import GossipConfig
from mesh.election.config import ElectionConfig, lan
from mesh.election.durable import Durable, newcomer
from mesh.election.election import Election
from mesh.election.events import Busy, NotLeader, Refused
from mesh.election.messages import Voted
from mesh.election.record import Content, RecordId, make_epoch, make_record
from mesh.election.voters import MemberInfo
from tests.sim.election_checks import ElectionChecker
from tests.sim.world import Fault, NetParams, Node, World

MESH = "11" * 16
EPOCH = make_epoch(1, 7)
GOSSIP_S, SUSPECT_S, DEAD_S = 0.5, 1.0, 3.0
GOSSIP = GossipConfig()
CALM_S, LONG_CALM_S, LONG_CALM_EVERY = 8.0, 30.0, 8
"""How long a leader must stay in calm, of every eighth seed for longer: 8 s are four times the longest time-out, and
after 5 the policy has nothing more to change in these schedules."""


class ElectionWorld(World):
    """Members ``names`` that agree on a first record with ``voters``; more may ``join``."""

    def __init__(
        self,
        seed: int,
        names: Sequence[str],
        voters: Sequence[str],
        *,
        config: ElectionConfig | None = None,
        net: NetParams | None = None,
        make: Callable[..., Election] = Election,
        rng_of: Callable[[str], random.Random] | None = None,
        gossip: bool = True,
        fsync_s: float = 0.0,
    ) -> None:
        super().__init__(seed, net)
        self.fsync_s = fsync_s
        self.checker = ElectionChecker()
        self.config, self.make, self.rng_of = config or lan(), make, rng_of or self.rng_for
        self.told: list[tuple[float, str, Any]] = []
        """(time, node, event), all of them."""
        self.faults: list[Fault] = []
        """The schedule, where ``play`` drew one."""
        self._paused_at: dict[str, float] = {}
        self._stalls: dict[str, tuple[float, float]] = {}
        """The last stall of each node: (when it ended, how long it was)."""
        self._lost_at: dict[tuple[str, str], float] = {}
        self._alive: dict[tuple[str, str], MemberInfo] = {}
        self._heard: dict[str, tuple[int, list[MemberInfo]]] = {}
        """What gossip said last to each node, in which life."""
        self.after_step.append(lambda world, node: self._stepped(node))
        first = make_record(EPOCH, RecordId(1, 1), tuple(voters), Content())
        disks = {name: Durable(MESH, EPOCH, name, 1, None, first, first) for name in names}
        for name, disk in disks.items():
            self.checker.persisted(name, disk)
        for name, disk in disks.items():
            self.join(name, disk)
        if gossip:
            self.at(0.0, self._gossip)

    def join(self, name: str, durable: Durable | None = None) -> None:
        """Add a member; without a state it has heard of nothing yet."""
        first = durable or newcomer(MESH, name)
        self.checker.persisted(name, first)

        def build(disk: list[Any], now: float) -> Election:
            rng, state = self.rng_of(name), disk[-1] if disk else first
            return self.make(state, self.config, rng, now, sign=lambda data: name.encode(), verify=_verify)

        node = self.add(
            name,
            boot=False,
            make=build,
            on_emit=lambda event, now: self.told.append((self.now, name, event)),
            on_persist=lambda record, now: self.checker.persisted(name, record),
            on_reset=lambda core, peer, now: core.note_lost(peer, now),
        )
        node.fsync_s = self.fsync_s
        self._boot(node)

    def _send(self, source: str, to: str, message: Any) -> None:
        if type(message) is Voted:
            self.checker.sent(source, to, message)
        super()._send(source, to, message)

    def _stepped(self, name: str) -> None:
        core = self.core(name)
        if core is not None:
            self.checker.stepped(name, core)

    # -- the oracle

    def _reached(self, name: str) -> set[str]:
        """Who can be probed from ``name``, perhaps through others."""
        known, front = {name}, [name]
        while front:
            near = front.pop()
            fresh = [n for n in self.nodes if n not in known and self._linked(near, n)]
            known.update(fresh)
            front += fresh
        return known

    def _linked(self, a: str, b: str) -> bool:
        node = self.nodes[b]
        return node.up and not node.paused and not self.blocked(a, b) and not self.blocked(b, a)

    def _gossip(self) -> None:
        here = [name for name, node in self.nodes.items() if node.up and not node.paused]
        everyone = set(here)
        for name in here:
            if self.nodes[name].up:
                self._tell(name, self._reached(name) if self.network.cuts else everyone)
        self.at(self.now + GOSSIP_S, self._gossip)

    def _apply_to_node(self, fault: Fault, node: Node) -> None:
        super()._apply_to_node(fault, node)
        if node.paused:
            self._paused_at.setdefault(node.id, self.now)
        elif since := self._paused_at.pop(node.id, 0.0):
            self._stalls[node.id] = (self.now, self.now - since)

    def local_health(self, name: str) -> int:
        """What Lifeguard would say of ``name``: its worst stall counts for as long as it is remembered."""
        ended, length = self._stalls.get(name, (-math.inf, 0.0))
        recent = self.now - ended <= GOSSIP.lag_window_s
        return min(GOSSIP.health_max, int(length / GOSSIP.lag_step_s)) if recent else 0

    def _tell(self, name: str, reached: set[str]) -> None:
        """What gossip knows now, to one member; nothing where it has no news."""
        node = self.nodes[name]
        node.core.note_health(self.local_health(name))
        members = [self._info(name, other, other in reached) for other in self.nodes]
        for other in self.nodes:
            gone = self.now - self._lost_at.get((name, other), self.now)
            if other not in reached and DEAD_S <= gone < DEAD_S + GOSSIP_S:
                self.do(name, lambda core, now, other=other: core.note_lost(other, now))
        if self._heard.get(name) != (node.life, members) and self.now >= node.busy_until:
            self._heard[name] = (node.life, members)
            self.do(name, lambda core, now: core.note_members(members, now))

    def _info(self, name: str, other: str, reached: bool) -> MemberInfo:
        """What ``name`` would hear of ``other``, in the clock of ``name``."""
        pair, clock = (name, other), self.nodes[name].clock
        if reached:
            self._lost_at.pop(pair, None)
            if pair not in self._alive:
                self._alive[pair] = MemberInfo(other, alive_since=clock(self.now))
            return self._alive[pair]
        lost = self._lost_at.setdefault(pair, self.now)
        if self.now - lost < SUSPECT_S and pair in self._alive:
            return self._alive[pair]
        self._alive.pop(pair, None)
        dead = None if self.now - lost < DEAD_S else clock(lost + DEAD_S)
        return MemberInfo(other, alive_since=None, dead_since=dead)

    # -- what tests ask

    def leader(self, among: Sequence[str] = ()) -> str | None:
        """The node that leads the highest term; None if nobody does."""
        leaders = [(c.epoch, c.term, n) for n in among or self.nodes if (c := self.core(n)) and c.role == "leader"]
        return max(leaders)[2] if leaders else None

    def settled(self, among: Sequence[str] = ()) -> bool:
        """Whether the leader committed a record of its term and all of ``among`` know it."""
        name = self.leader(among)
        if name is None or not self.core(name).ready:
            return False
        want = self.core(name).committed
        live = [n for n in among or self.nodes if self.core(n) is not None]
        return all(self.core(n).committed == want and self.core(n).leader is not None for n in live)

    def ask(self, name: str, verb: Callable[[Any, float], list[Any]]) -> str:
        """Call a verb; the refusal's name, or empty."""
        try:
            self.do(name, verb)
        except (NotLeader, Busy, Refused) as refusal:
            return f"{type(refusal).__name__}: {refusal}"
        return ""

    def propose(self, name: str, placement: bytes) -> str:
        def change(core: Any, now: float) -> list[Any]:
            return core.propose(now, msgspec.structs.replace(core.record.content, placement=placement))

        return self.ask(name, change)


def _verify(node: str, data: bytes, signature: bytes) -> bool:
    return signature == node.encode()


def draw_faults(rng: random.Random, names: Sequence[str], until: float, count: int) -> list[Fault]:
    """A schedule of weather: each fault is undone or healed some time later, or never before ``until``."""
    faults: list[Fault] = []
    for _ in range(count):
        at, length = rng.uniform(1.0, until), rng.uniform(0.1, 8.0)
        some = tuple(sorted(rng.sample(list(names), rng.randint(1, max(1, len(names) // 2)))))
        one = (rng.choice(list(names)),)
        kind = rng.choice(
            ("crash", "crash_mid", "silent", "pause", "partition", "cut", "flap", "loss", "slow", "fsync", "drift")
        )
        if kind in ("crash", "crash_mid", "silent"):
            other = ("silent",) if kind == "silent" else ()
            faults.append(Fault(at, "crash_mid" if kind == "crash_mid" else "crash", one, other))
            faults.append(Fault(at + length, "restart", one))
        elif kind == "pause":
            faults += [Fault(at, "pause", one), Fault(at + length, "resume", one)]
        elif kind in ("partition", "cut"):
            faults += [Fault(at, kind, some), Fault(at + length, "heal")]
        elif kind == "loss":
            faults += [Fault(at, "loss", (), value=rng.choice((0.05, 0.3, 0.6))), Fault(at + length, "heal")]
        elif kind == "slow":
            faults += [Fault(at, "slow", one, value=rng.uniform(0.0, 0.5)), Fault(at + length, "slow", one)]
        elif kind == "flap":
            faults += [Fault(at, "flap", some, value=rng.uniform(0.1, 1.0)), Fault(at + length, "heal")]
        elif kind == "fsync":
            faults += [Fault(at, "fsync", one, value=rng.uniform(0.0, 0.1)), Fault(at + length, "fsync", one)]
        else:
            faults.append(Fault(at, "drift", one, value=rng.uniform(0.97, 1.03)))
    return sorted(faults, key=lambda fault: fault.at)


def recover(world: ElectionWorld, names: Sequence[str]) -> None:
    """The second phase: the network is whole, nobody is paused, slow or down."""
    world.apply(Fault(world.now, "heal"))
    for name in names:
        node = world.nodes[name]
        node.crash_after = None  # a crash in the middle of a step that was still to come
        world.apply(Fault(world.now, "slow", (name,)))
        world.apply(Fault(world.now, "fsync", (name,)))
        if not node.up:
            world.apply(Fault(world.now, "restart", (name,)))
        elif node.paused:
            world.apply(Fault(world.now, "resume", (name,)))


def play(seed: int, *, seconds: float = 30.0, **how: Any) -> ElectionWorld:
    """One timed schedule: weather with proposals, then calm; raises on a violated property or on a missing leader.

    It is played without a trace, which costs a fifth; where it fails, once more with one, for the note of the error:
    the faults and the last events.  ``how`` goes to ``ElectionWorld``.
    """
    world = drawn(seed, seconds, **how)
    world.traced = False
    try:
        _go_through(world, seed, seconds)
    except AssertionError as violation:
        world = drawn(seed, seconds, **how)
        with contextlib.suppress(AssertionError):
            _go_through(world, seed, seconds)
        violation.add_note("\n".join([*map(str, world.faults), *world.lines(200)]))
        raise
    return world


def drawn(seed: int, seconds: float, **how: Any) -> ElectionWorld:
    """The world of a schedule, its faults and proposals still to come."""
    rng = random.Random(f"{seed}/weather")
    names = "abcdefg"[: rng.randint(3, 7)]
    voters = names[: rng.choice([k for k in (1, 3, 5) if k <= len(names)])]
    net = NetParams(
        loss=rng.choice((0.0, 0.0, 0.02, 0.1)),
        duplicate=rng.choice((0.0, 0.05)),
        reorder=rng.choice((0.0, 0.1)),
        base_s=rng.choice((0.0002, 0.002, 0.02)),
    )
    config = msgspec.structs.replace(lan(), eligible_after_s=2.0, dead_after_s=4.0, step_s=1.0)
    world = ElectionWorld(seed, names, voters, config=config, net=net, **how)
    world.faults = draw_faults(rng, names, seconds, rng.randint(5, 12))
    world.schedule(world.faults)
    for number in range(int(seconds)):
        world.at(rng.uniform(0.0, seconds), lambda number=number: _change(world, b"%d" % number))
    return world


def _go_through(world: ElectionWorld, seed: int, seconds: float) -> None:
    world.run(until=seconds)
    _check_calm(world, LONG_CALM_S if seed % LONG_CALM_EVERY == 0 else CALM_S)


def _change(world: ElectionWorld, placement: bytes) -> None:
    name = world.leader()
    if name is not None:
        world.propose(name, placement)


def _check_calm(world: ElectionWorld, calm_s: float) -> None:
    """Liveness: from the end of all faults, a committed record within 3 s, known to all within 2 s more, and the same
    leader for ``calm_s``."""
    recover(world, list(world.nodes))
    world.network.loss, world.network.params = 0.0, msgspec.structs.replace(world.net, loss=0.0)
    start = world.now
    _check_committed(world, start + 3.0)
    over = start + world.config.check_quorum_s  # until then, what the faults swallowed may yet depose a leader
    world.run(until=over)
    _check_committed(world, over + 3.0)
    spread = world.run(until=world.now + 2.0, stop=world.settled)
    assert spread, f"the record did not reach everyone: {states(world)}"
    leader, terms = world.leader(), world.checker.counts["elections"]
    world.run(until=world.now + calm_s)
    assert (world.leader(), world.checker.counts["elections"]) == (leader, terms), f"no calm: {states(world)}"
    world.checker.check_kept()


def _check_committed(world: ElectionWorld, until: float) -> None:
    committed = world.run(until=until, stop=lambda: (n := world.leader()) is not None and world.core(n)._settled())
    assert committed, f"no committed leader 3 s after the faults ended: {states(world)}"


def states(world: ElectionWorld) -> list[str]:
    return [f"{n} {c.role} t{c.term} {c.record} c{c.committed.id}" if (c := world.core(n)) else n for n in world.nodes]


# -- figures that both the tests and scripts/simulate ask for


def needless_elections(seed: int, hours: float) -> int:
    """Q13: five voters, 5 % loss, one of them stalls for 1 s every 30 s: elections after the first."""
    world = ElectionWorld(seed, "abcde", "abcde", net=NetParams(loss=0.05))
    world.run(until=5.0)
    before = world.checker.counts["elections"]
    staller = next(n for n in "abcde" if n != world.leader())
    for k in range(int(hours * 120)):
        world.schedule([Fault(10.0 + 30 * k, "pause", (staller,)), Fault(11.0 + 30 * k, "resume", (staller,))])
    while world.now < hours * 3600.0:
        world.run(until=min(world.now + 600.0, hours * 3600.0))
        world.told.clear()
        for node in world.nodes.values():
            del node.disk[:-1]
    return world.checker.counts["elections"] - before


PARTIAL = {
    "quorum-loss": [("a", "cde"), ("c", "de"), ("d", "e")],  # only b hears everyone
    "constrained": [("c", "abde"), ("b", "de"), ("d", "e")],  # c is alone, only a hears the rest, perhaps behind
    "chained": [("a", "c")],
    "bridge": [("ab", "de")],  # c joins two halves
}


def cut_partly(seed: int, name: str) -> float:
    """Q14: seconds from cutting the links of ``PARTIAL[name]`` until somebody leads and commits something new."""
    names = "abc" if name == "chained" else "abcde"
    world = ElectionWorld(seed, names, names)
    world.run(until=5.0)
    for here, there in PARTIAL[name]:
        world.apply(Fault(5.0, "partition", tuple(here), tuple(there)))
    start, asked = world.now, ("", 0)
    while world.now < start + 30.0:
        if (leader := world.leader()) is not None:
            core = world.core(leader)
            if core.ready and core.committed.content.placement == b"through":
                return world.now - start
            if (leader, core.term) != asked and world.propose(leader, b"through") == "":
                asked = (leader, core.term)
        world.run(until=world.now + 0.01)
    return math.inf
