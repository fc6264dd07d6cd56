"""Worlds of sessions and stages, random schedules of faults, and what must be true when a schedule is over.

P1: the client sees each token once, in order, equal to an undisturbed run's.  P2: every sequence, checkpoint and
journal is freed after the end.  Shared by the tests and by ``scripts/simulate``.
"""

from __future__ import annotations

import random

from mesh.pipeline import messages as m
from mesh.pipeline import session as s
from mesh.types import SamplingParams
from tests.sim.generation import Peer, oracle
from tests.sim.world import Fault, NetParams, World

# Two holders of every layer besides the entry, so that any one stage may go.
SPANS = {"a1": (0, 2), "a2": (0, 2), "b1": (2, 4), "b2": (2, 4), "c1": (4, 6), "c2": (4, 6)}


def make_world(seed: int, net: NetParams | None = None, spans: dict[str, tuple[int, int]] = SPANS) -> World:
    world = World(seed, net)
    for name in ("entry", *spans):
        world.add(
            name,
            make=lambda disk, now, name=name: Peer(name, world.rng_for(name), spans),
            on_reset=lambda core, peer, now: core.reset(peer, now),
        )
    return world


def request(rng: random.Random, max_tokens: int = 24, timeout_s: float = 300.0) -> m.SessionRequest:
    prompt = tuple(rng.randrange(97) for _ in range(rng.randint(1, 40)))
    sampling = SamplingParams(max_tokens=max_tokens, seed=rng.randrange(1 << 32), stop_token_ids=(0,))
    return m.SessionRequest(model="toy", prompt=prompt, sampling=sampling, timeout_s=timeout_s)


def start(world: World, count: int, max_tokens: int = 24, timeout_s: float = 300.0) -> dict[str, m.SessionRequest]:
    rng = world.rng_for("requests")
    wanted = {f"s{index}": request(rng, max_tokens, timeout_s) for index in range(count)}
    for name, ask in wanted.items():
        world.do("entry", lambda core, now, name=name, ask=ask: core.open(name, ask, now))
    return wanted


def check_streams(world: World, wanted: dict[str, m.SessionRequest]) -> None:
    entry = world.core("entry")
    for name, ask in wanted.items():
        assert isinstance(entry.ends.get(name), s.Ended), (name, entry.ends.get(name), world.lines(40))
        assert entry.streams[name] == oracle(ask), name


def check_freed(world: World) -> None:
    for node in world.nodes.values():
        if node.up and not node.paused:
            assert node.core.stage.sessions() == []
            assert node.core.stage.checkpoint_bytes == 0
            assert node.core.engine.sequences == {}


def schedule(rng: random.Random, nodes: list[str]) -> list[Fault]:
    """At least two faults, never both holders of a span down for good."""
    faults: list[Fault] = []
    at = 0.1
    for _ in range(rng.randint(2, 5)):
        victim = rng.choice(nodes)
        kind = rng.choice(["crash", "pause", "partition", "cut", "slow"])
        lasts = rng.uniform(0.2, 6.0)
        other = ("silent",) if kind == "crash" and rng.random() < 0.5 else ()
        faults.append(Fault(at, kind, (victim,), other, value=0.3 if kind == "slow" else 0.0))
        undo = {"crash": "restart", "pause": "resume", "slow": "slow"}.get(kind, "heal")
        faults.append(Fault(at + lasts, undo, (victim,)))
        at += lasts + rng.uniform(0.0, 1.0)
    return faults


def play(seed: int, sessions: int = 3) -> World:
    """One schedule: faults while ``sessions`` stream, then P1, and P2 once leases have run out.

    A violation carries the schedule and the last events as notes.
    """
    world = make_world(seed, NetParams(loss=0.01 if seed % 3 == 0 else 0.0))
    faults = schedule(world.rng_for("faults"), list(SPANS))
    world.schedule(faults)
    wanted = start(world, sessions, max_tokens=80)
    try:
        world.run(290.0, stop=lambda: len(world.core("entry").ends) == sessions)
        check_streams(world, wanted)
        world.run(world.now + 150.0)
        check_freed(world)
    except AssertionError as violation:
        violation.add_note("\n".join([*map(str, faults), *world.lines(200)]))
        raise
    return world
