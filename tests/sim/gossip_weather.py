"""Random weather for the membership core: safety while it lasts, then calm, and all views must agree.

Shared by the tests and by ``scripts/simulate``.
"""

from __future__ import annotations

import random

from gossip.config import GossipConfig
from mesh.types import NodeId
from tests.sim.gossip_checks import GossipChecks
from tests.sim.gossip_world import gossip_world, node_id
from tests.sim.world import Fault, NetParams, World


def weather(seed: int, ids: list[NodeId], until: float, start: float = 10.0) -> list[Fault]:
    """A schedule of faults for the first half of ``ids``; the others are left alone."""
    rng = random.Random(f"weather {seed}")
    victims, faults, at = ids[: len(ids) // 2], [], start
    while (at := at + rng.expovariate(0.25)) < until:
        node = (rng.choice(victims),)
        kind = rng.choice(["crash", "crash", "silent", "crash_mid", "pause", "loss", "cut", "slow", "drift"])
        later = at + rng.uniform(0.5, 25.0)
        if kind in ("crash", "silent", "crash_mid"):
            plain = "crash" if kind == "silent" else kind
            faults.append(Fault(at, plain, node, ("silent",) if kind == "silent" else ()))
            if rng.random() < 0.7:
                faults.append(Fault(later, rng.choice(["restart", "restart", "wipe"]), node))
        elif kind == "pause":
            faults += [Fault(at, "pause", node), Fault(later, "resume", node)]
        elif kind == "loss":
            faults += [Fault(at, "loss", node, value=rng.uniform(0.2, 0.9)), Fault(later, "loss", node)]
        elif kind == "cut":
            faults.append(Fault(at, "cut", node, (rng.choice(ids),)))
        elif kind == "slow":
            faults += [Fault(at, "slow", node, value=rng.uniform(0.01, 0.3)), Fault(later, "slow", node)]
        else:
            faults.append(Fault(at, "drift", node, value=rng.uniform(0.95, 1.05)))
    return sorted(faults, key=lambda fault: fault.at)


def calm(world: World) -> None:
    """End all faults; who is down stays down."""
    world.apply(Fault(world.now, "heal"))
    for node in world.nodes.values():
        world.apply(Fault(world.now, "slow", (node.id,)))
        world.apply(Fault(world.now, "resume", (node.id,))) if node.up and node.paused else None


def stormy(seed: int, n: int, until: float, bound_s: float = 150.0, config: GossipConfig | None = None) -> World:
    """Safety, then liveness; a failure shows the schedule and the last events."""
    net = NetParams(loss=0.05, duplicate=0.02, reorder=0.02)
    world = gossip_world(n, seed, config, net)
    ids = [node_id(index) for index in range(n)]
    faults = weather(seed, ids, until)
    world.schedule(faults)
    checks = GossipChecks(world, steady=list(ids[n // 2 :]))
    try:
        world.run(until)
        calm(world)
        checks.all_views(bound_s)
    except AssertionError as error:
        raise AssertionError("\n".join([str(error), *map(str, faults), *world.lines(200)])) from error
    return world
