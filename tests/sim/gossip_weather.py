"""Random weather for the membership core: safety while it lasts, then calm, and all views must agree.

Shared by the tests and by ``scripts/simulate``.  One seed is one schedule, with a mixture of its own of what may happen
(swarm testing): a fault that is always there hides what only shows without it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from gossip.config import GossipConfig, lan, loopback, wan
from gossip.swim import Swim
from mesh.types import NodeId
from tests.sim.gossip_checks import GossipChecks
from tests.sim.gossip_world import gossip_world, node_id, warm_world
from tests.sim.world import Fault, NetParams, World

KINDS = (
    "crash",
    "silent",
    "crash_mid",
    "pause",
    "loss",
    "cut",
    "flap",
    "slow",
    "busy",
    "uplink",
    "fsync",
    "lies",
    "drift",
    "partition",
    "links",
)
"""``partition``: some members from all others; ``links``: one pair, both ways, which others can still reach."""
UNDONE = {"slow": 0.0, "uplink": 0.0, "busy": 0.0, "fsync": 0.0, "loss": 0.0, "drift": 1.0}
"""Faults with a value, and the value that ends them."""


class Mix(msgspec.Struct, frozen=True):
    """How one schedule goes."""

    n: int
    until: float
    """Seconds of weather; calm follows."""
    kinds: tuple[str, ...]
    every_s: float = 4.0
    net: NetParams = NetParams(loss=0.05, duplicate=0.02, reorder=0.02)
    preset: str = "lan"
    codec: bool = True
    warm: bool = False
    """All know each other when it begins, and the weather begins at once."""
    one_link: bool = False
    """Nothing but one link at a time that is down, both ways: nobody may be suspected."""

    @property
    def bound_s(self) -> float:
        """Until all views agree, once it is calm: those that are apart find each other by announcements."""
        return 150.0 if self.preset != "wan" else 300.0


PRESETS: dict[str, Callable[[], GossipConfig]] = {"lan": lan, "wan": wan, "loopback": loopback}


def draw_mix(seed: int, **fixed: Any) -> Mix:
    """Swarm testing: each schedule lacks some faults and has much of others."""
    rng = random.Random(f"mix {seed}")
    kinds = tuple(rng.sample(KINDS, rng.choice((1, 2, 3, 5, 8, len(KINDS)))))
    net = NetParams(
        jitter_s=rng.choice((0.0003, 0.0003, 0.003)),
        delay=rng.choice(("exponential", "uniform", "pareto")),
        loss=rng.choice((0.0, 0.0, 0.02, 0.05)),
        duplicate=rng.choice((0.0, 0.02, 0.2)),
        reorder=rng.choice((0.0, 0.02, 0.2)),
        inbox=rng.choice((8, 64, 1024)),
    )
    one_link = kinds == ("links",)
    mix = Mix(
        n=rng.choice((2, 3, 3, 4, 5, 5, 8, 12, 20)),
        until=rng.choice((30.0, 60.0, 90.0)),
        kinds=kinds,
        every_s=rng.choice((2.0, 4.0, 10.0)),
        net=net,
        preset=rng.choice(("lan", "lan", "lan", "loopback", "wan")),
        codec=rng.random() < 0.8,
        one_link=one_link,
    )
    if one_link:
        mix = msgspec.structs.replace(mix, n=max(5, mix.n), net=msgspec.structs.replace(net, loss=0.0))
    return msgspec.structs.replace(mix, **fixed)


def weather(seed: int, mix: Mix) -> list[Fault]:
    """A schedule of faults for the first half of the members; the others are left alone."""
    rng = random.Random(f"weather {seed}")
    ids = [node_id(index) for index in range(mix.n)]
    faults: list[Fault] = []
    at = 0.0 if mix.warm else 10.0
    while (at := at + rng.expovariate(1.0 / mix.every_s)) < mix.until:
        later = at + rng.uniform(0.5, 25.0)
        if mix.one_link:
            pair = rng.sample(ids, 2)
            faults += [Fault(at, "partition", (pair[0],), (pair[1],)), Fault(later, "heal")]
            at = later + 3.0
            continue
        faults += _spell(rng, rng.choice(mix.kinds), ids, at, later)
    return sorted(faults, key=lambda fault: fault.at)


def _spell(rng: random.Random, kind: str, ids: list[NodeId], at: float, later: float) -> list[Fault]:
    """One fault, and what ends it."""
    victims = ids[: max(1, len(ids) // 2)]
    one = (rng.choice(victims),)
    if kind in ("crash", "silent", "crash_mid"):
        plain = Fault(at, "crash" if kind == "silent" else kind, one, ("silent",) if kind == "silent" else ())
        back = [Fault(later, rng.choice(("restart", "restart", "wipe")), one)]
        return [plain, *(back if rng.random() < 0.7 else [])]
    if kind == "pause":
        return [Fault(at, "pause", one), Fault(later, "resume", one)]
    if kind == "lies":
        return [Fault(at, "lies", one, value=rng.choice((1, 3)))]
    if kind in ("cut", "links"):
        other = (rng.choice(ids),)
        return [Fault(at, "cut" if kind == "cut" else "partition", one, other), Fault(later, "heal", one)]
    if kind == "flap":
        other = tuple(rng.sample(ids, rng.randint(0, len(ids) - 1)))
        return [Fault(at, "flap", one, other, value=rng.uniform(0.1, 10.0)), Fault(later, "heal", one)]
    if kind == "partition":
        some = tuple(victims[: rng.randint(1, len(victims))])
        return [Fault(at, "partition", some), Fault(later, "heal", some)]
    values = {
        "loss": rng.uniform(0.2, 0.9),
        "slow": rng.uniform(0.01, 0.3),
        "busy": rng.choice((0.002, 0.02, 0.2)),
        "uplink": rng.choice((500.0, 2000.0, 10_000.0)),
        "fsync": rng.choice((0.01, 0.2, 2.0)),
        "drift": rng.uniform(0.95, 1.05),
    }
    return [Fault(at, kind, one, value=values[kind]), Fault(later, kind, one, value=UNDONE[kind])]  # type: ignore[arg-type]


def calm(world: World) -> None:
    """End all faults; who is down stays down."""
    names = tuple(world.nodes)
    world.apply(Fault(world.now, "heal"))
    for kind, value in UNDONE.items():
        if kind != "loss":  # healed
            world.apply(Fault(world.now, kind, names, value=value))  # type: ignore[arg-type]
    for node in world.nodes.values():
        node.crash_after = None
        world.apply(Fault(world.now, "resume", (node.id,))) if node.up and node.paused else None


class Storm:
    """One schedule of weather; ``run`` raises ``AssertionError`` where a property does not hold.

    With ``make`` another core than the production one plays (negative controls), ``config`` stands for the preset's."""

    def __init__(self, seed: int, mix: Mix, *, config: GossipConfig | None = None, make: type[Swim] = Swim) -> None:
        self.seed, self.mix = seed, mix
        config = config or PRESETS[mix.preset]()
        build = warm_world if mix.warm else gossip_world
        self.world = build(mix.n, seed, config, mix.net, codec=mix.codec, swim=make)
        self.faults = weather(seed, mix)
        ids = [node_id(index) for index in range(mix.n)]
        apart = mix.n > 3 and bool({"partition", "flap"} & set(mix.kinds))  # several bury the steady in good faith
        self.checks = GossipChecks(
            self.world,
            steady=[] if apart else ids[max(1, mix.n // 2) :],
            unsuspected=ids if mix.one_link else [],
            wake_s=0.8 * config.probe_period_s,
        )

    def run(self, liveness: bool = True) -> World:
        """Safety, then liveness; a failure carries the mixture, the schedule and the last events as a note."""
        try:
            self.world.schedule(self.faults)
            self.world.run(self.mix.until)
            if liveness:
                calm(self.world)
                self.checks.all_views(self.mix.bound_s)
        except AssertionError as violation:
            violation.add_note("\n".join([str(self.mix), *map(str, self.faults), *self.world.lines(200)]))
            raise
        return self.world

    def covered(self) -> dict[str, int]:
        """Counters of what the schedule brought about."""
        events = [event for node in self.world.nodes.values() for event in node.emitted]
        changes = Counter(event.new for event in events if hasattr(event, "old"))
        return {
            "steps": self.world.steps,
            "faults": sum(fault.kind not in ("restart", "resume", "heal") for fault in self.faults),
            **{f"faults.{kind}": count for kind, count in Counter(fault.kind for fault in self.faults).items()},
            "suspicions": changes["suspect"],
            "deaths": changes["dead"],
            "refutations": sum(type(event).__name__ == "Refuted" for event in events),
        }
