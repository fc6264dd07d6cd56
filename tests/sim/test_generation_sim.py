"""The production Session and Stage cores under weather: every stream ends with the undisturbed run's tokens."""

from __future__ import annotations

import random

import pytest

from mesh.pipeline import messages as m
from mesh.pipeline import session as s
from mesh.types import SamplingParams
from tests.sim.generation import FakeEngine, Peer, oracle
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


@pytest.mark.parametrize("sessions", [1, 5])
def test_a_quiet_run_gives_the_models_tokens_and_frees_everything(sessions: int) -> None:
    world = make_world(1)
    wanted = start(world, sessions)
    world.run(60.0, stop=lambda: len(world.core("entry").ends) == sessions)
    check_streams(world, wanted)
    world.run(world.now + 1.0)
    check_freed(world)


@pytest.mark.parametrize("victim", ["first", "middle", "sampler"])
@pytest.mark.parametrize("fault", ["crash", "silent", "pause"])
def test_a_lost_hop_is_rebuilt_and_survivors_compute_nothing_again(victim: str, fault: str) -> None:
    world = make_world(3)
    wanted = start(world, 1, max_tokens=60)
    entry = world.core("entry")
    world.run(60.0, stop=lambda: len(entry.streams["s0"]) >= 8 or bool(entry.ends))
    route = entry.sessions["s0"].route.hops
    node = route[{"first": 0, "middle": 1, "sampler": 2}[victim]].node
    before = {hop.node: world.core(hop.node).engine.computed_positions for hop in route}
    kind = "pause" if fault == "pause" else "crash"
    world.apply(Fault(world.now, kind, (node,), ("silent",) if fault == "silent" else ()))
    world.run(world.now + 30.0, stop=lambda: bool(entry.ends))
    check_streams(world, wanted)
    assert len(entry.recoveries) == 1
    positions = len(wanted["s0"].prompt) + len(entry.streams["s0"])
    for hop in route:
        if hop.node != node:
            again = before[hop.node] + positions
            # A survivor computes each position once, save for what was under way when the route changed.
            assert world.core(hop.node).engine.computed_positions <= positions + 2, (hop, again)


def test_frames_lost_repeated_and_reordered_change_nothing() -> None:
    world = make_world(5, NetParams(loss=0.05, duplicate=0.05, reorder=0.1))
    wanted = start(world, 4)
    world.run(250.0, stop=lambda: len(world.core("entry").ends) == 4)
    check_streams(world, wanted)


def test_a_session_waits_while_no_node_holds_a_span_and_goes_on_when_one_returns() -> None:
    world = make_world(7, spans={"a": (0, 3), "b": (3, 6)})
    wanted = start(world, 1, max_tokens=40)
    entry = world.core("entry")
    world.run(60.0, stop=lambda: len(entry.streams["s0"]) >= 5)
    world.apply(Fault(world.now, "crash", ("b",)))
    world.run(world.now + 20.0)
    assert not entry.ends
    world.apply(Fault(world.now, "restart", ("b",)))
    world.run(world.now + 30.0, stop=lambda: bool(entry.ends))
    check_streams(world, wanted)


def test_a_session_ends_with_a_reason_at_its_deadline() -> None:
    world = make_world(7, spans={"a": (0, 3), "b": (3, 6)})
    start(world, 1, max_tokens=40, timeout_s=20.0)
    entry = world.core("entry")
    world.run(60.0, stop=lambda: len(entry.streams["s0"]) >= 5)
    world.apply(Fault(world.now, "crash", ("b",)))
    world.run(world.now + 30.0)
    end = entry.ends["s0"]
    assert (end.code, "of at most 40 tokens" in end.why) == ("timeout", True)


def test_full_hops_refuse_before_anything_is_computed() -> None:
    world = make_world(9, spans={"a": (0, 6)})
    for name in ("a",):
        world.core(name).engine = FakeEngine(random.Random(0), slots=1)
    start(world, 3)
    world.run(60.0, stop=lambda: len(world.core("entry").ends) == 3)
    ends = world.core("entry").ends
    assert sorted(type(end).__name__ for end in ends.values()) == ["Ended", "Failed", "Failed"]
    assert all(end.code in ("busy", "no_route") for end in ends.values() if isinstance(end, s.Failed))


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


@pytest.mark.parametrize("seed", range(40))
def test_any_weather(seed: int) -> None:
    world = make_world(seed, NetParams(loss=0.01 if seed % 3 == 0 else 0.0))
    world.schedule(schedule(world.rng_for("faults"), list(SPANS)))
    wanted = start(world, 3, max_tokens=80)
    world.run(290.0, stop=lambda: len(world.core("entry").ends) == 3)
    check_streams(world, wanted)
    world.run(world.now + 150.0)
    check_freed(world)
