"""How long a mesh is without a coordinator: one voter lost, in virtual time, with slow disks and restless machines."""

from __future__ import annotations

from typing import Any

from mesh.election.events import SteppedDown
from tests.sim.election_world import ElectionWorld
from tests.sim.world import Fault, NetParams

LOOPBACK = NetParams(base_s=0.0005, jitter_s=0.0015)
"""One way, with what the receiver's loop adds."""
FSYNC_S = 0.004


def prepared(seed: int, size: int, *, restless: bool = False, fsync_s: float = FSYNC_S, **how: Any) -> ElectionWorld:
    """A settled mesh of ``size`` voters.  ``restless``: each of them was stopped for 1.5 s in the last 8 s."""
    names = "abcdefg"[:size]
    world = ElectionWorld(seed, names, names, net=LOOPBACK, fsync_s=fsync_s, **how)
    world.run(until=6.0)
    if restless:
        for k, name in enumerate(names):
            world.schedule([Fault(6.0 + 1.6 * k, "pause", (name,)), Fault(7.5 + 1.6 * k, "resume", (name,))])
        world.run(until=7.0 + 1.6 * size)
    world.run(until=world.now + 1.0 + world.rng.random())
    world.run(until=world.now + 5.0, stop=world.settled)
    return world


def failover(seed: int, size: int, fault: str, **how: Any) -> tuple[float, float]:
    """Seconds from the loss of the coordinator ("crash", "pause", "partition") to (a new committed record, the old
    one's stepping down)."""
    world = prepared(seed, size, **how)
    old = world.leader()
    assert old is not None
    rest = [name for name in world.nodes if name != old]
    start, term = world.now, world.core(old).term
    world.apply(Fault(start, fault, (old,)))  # type: ignore[arg-type]
    world.run(until=start + 30.0, stop=lambda: any(world.core(n).committed.id.term > term for n in rest))
    back = world.now
    world.run(until=max(back, start + 3.0))
    down = [at for at, node, event in world.told if node == old and at > start and isinstance(event, SteppedDown)]
    return back - start, down[0] - start if down else float("inf")


def restless_hour(seed: int, hours: float = 1.0, **how: Any) -> int:
    """Leader changes of five voters on machines that are too busy: each stalls about every 20 s, for 0.1 to 1.5 s."""
    world = ElectionWorld(seed, "abcde", "abcde", net=NetParams(loss=0.01), **how)
    world.run(until=5.0)
    before = world.checker.counts["elections"]
    while world.now < hours * 3600.0:
        for name in world.nodes:
            at, length = world.now + world.rng.uniform(0.0, 18.0), world.rng.uniform(0.1, 1.5)
            world.schedule([Fault(at, "pause", (name,)), Fault(at + length, "resume", (name,))])
        world.run(until=world.now + 20.0)
    return world.checker.counts["elections"] - before
