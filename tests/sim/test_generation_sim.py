"""The production Session and Stage cores under weather: every stream ends with the undisturbed run's tokens."""

from __future__ import annotations

import random

import pytest

from mesh.pipeline import session as s
from tests.sim.generation import FakeEngine
from tests.sim.generation_world import check_freed, check_streams, make_world, play, start
from tests.sim.world import Fault, NetParams


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


@pytest.mark.parametrize("seed", range(40))
def test_any_weather(seed: int) -> None:
    play(seed)
