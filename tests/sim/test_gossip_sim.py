"""The membership core under weather: G1-G6 after every step, and controls that show the checkers can see."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest

from gossip.config import GossipConfig
from gossip.messages import Gossip, State, Update
from mesh.types import NodeProfile
from tests.sim.faults import FaultKind
from tests.sim.gossip_checks import GossipChecks
from tests.sim.gossip_mutants import CONTROLS, play
from tests.sim.gossip_weather import KINDS, Storm, draw_mix, weather
from tests.sim.gossip_world import gossip_world, node_id, views_agree
from tests.sim.world import Fault, NetParams


@pytest.mark.parametrize("batch", range(10))
def test_safety_of_a_hundred_nodes_in_any_weather(batch: int) -> None:
    """Fifty seeds; each has a mixture of its own."""
    for seed in range(5 * batch, 5 * batch + 5):
        Storm(seed, draw_mix(seed, n=100, until=3.0, every_s=0.3, warm=True)).run(liveness=False)


@pytest.mark.parametrize("seed", range(12))
def test_safety_and_liveness_of_small_meshes_in_any_weather(seed: int) -> None:
    Storm(seed, draw_mix(seed)).run()


def test_the_mixtures_hold_everything_that_may_happen() -> None:
    mixes = [draw_mix(seed) for seed in range(200)]
    assert {kind for mix in mixes for kind in mix.kinds} == set(KINDS)
    assert {mix.net.delay for mix in mixes} == {"exponential", "uniform", "pareto"}
    happened = {fault.kind for seed, mix in enumerate(mixes) for fault in weather(seed, mix)}
    assert happened == set(get_args(FaultKind)) - {"leave"}, "who leaves is what sessions move for, a verb of its core"


def test_a_schedule_is_a_value_that_prints_and_replays() -> None:
    first, again = (Storm(4, draw_mix(4, n=5, until=30.0)) for _ in range(2))
    first.faults = msgspec.json.decode(msgspec.json.encode(first.faults), type=list[Fault])
    assert first.run().digest() == again.run().digest()


def test_what_fails_shows_its_schedule_and_its_last_events() -> None:
    control = CONTROLS["no refutation"]
    with pytest.raises(AssertionError) as failure:
        Storm(0, **control).run()
    lines = failure.value.__notes__[0].splitlines()
    assert lines[0] == str(control["mix"])
    assert [line for line in lines if line.startswith("Fault(")] == [str(fault) for fault in weather(0, control["mix"])]
    assert len([line for line in lines if " deliver " in line or " tick " in line]) > 100
    assert all(len(line) <= 300 for line in lines[1:])


def crash_and_time(n: int, seed: int, config: GossipConfig, net: NetParams | None = None) -> tuple[float, float, float]:
    """Crash one node of ``n``: seconds to its first suspicion, to its first death, until it is dead at all."""
    world = gossip_world(n, seed, config, net)
    world.run(n * 0.05 + 15.0)
    victim, start = node_id(n // 2), world.now
    world.apply(Fault(start, "crash", (victim,), ("silent",)))
    live = [node for node in world.nodes.values() if node.up]
    times = []
    for held, many in (({"suspect", "dead"}, 1), ({"dead"}, 1), ({"dead"}, len(live))):
        done = lambda held=held, many=many: (  # noqa: E731
            sum(node.core.member(victim).state in held for node in live) >= many
        )
        assert done() or world.run(start + 60.0, stop=done), f"not {held} at {many} after 60 s"
        times.append(world.now - start)
    return times[0], times[1], times[2]


@pytest.mark.parametrize(("n", "bound_s"), [(2, 5.0), (3, 5.0), (5, 5.0), (30, 6.0)])
def test_a_crash_is_detected_in_time(n: int, bound_s: float) -> None:
    first, death, everywhere = crash_and_time(n, 7, GossipConfig())
    assert first <= 2.5
    assert death <= bound_s
    assert everywhere <= bound_s + 1.0


def test_no_false_positives_at_ten_percent_loss() -> None:
    world = gossip_world(20, 3, net=NetParams(loss=0.1))
    GossipChecks(world, steady=[node_id(index) for index in range(20)])
    world.run(60.0)


def test_a_joiner_knows_all_and_is_known_by_all() -> None:
    world = gossip_world(30, 4, stagger_s=0.01)
    assert world.run(10.0, stop=lambda: len(world.nodes) == 30 and world.steps % 50 == 0 and views_agree(world))


def test_a_partition_heals_without_seeds() -> None:
    world = gossip_world(12, 5)
    ids = [node_id(index) for index in range(12)]
    checks = GossipChecks(world)
    world.schedule([Fault(10.0, "partition", tuple(ids[:5])), Fault(60.0, "heal")])
    world.run(60.0)
    assert {info.state for info in world.core(ids[0]).members() if info.node in ids[5:]} == {"dead"}
    assert checks.all_views(60.0) <= 40.0


def test_a_leaver_is_never_suspected() -> None:
    world = gossip_world(10, 6)
    world.run(10.0)
    leaver = node_id(4)
    world.do(leaver, lambda core, now: core.leave(now))
    world.run(40.0)
    states = [
        (event.old, event.new)
        for node in world.nodes.values()
        for event in node.emitted
        if type(event).__name__ == "MemberChanged" and event.node == leaver and event.old
    ]
    assert states == [("alive", "left")] * 9


def test_a_restart_comes_back_at_a_new_address() -> None:
    world = gossip_world(6, 7)
    GossipChecks(world)
    victim = node_id(2)
    world.schedule([Fault(10.0, "crash", (victim,)), Fault(30.0, "restart", (victim,))])
    world.run(29.0)
    assert world.core(node_id(0)).member(victim).state == "dead"
    world.run(33.0)
    assert {world.core(node_id(i)).address_of(victim) for i in range(6)} == {f"{victim[:6]}:2"}
    assert views_agree(world)


def test_a_stalled_node_does_not_bury_the_others() -> None:
    world = gossip_world(8, 8)
    ids = [node_id(index) for index in range(8)]
    GossipChecks(world, steady=list(ids[1:]))
    for start in (12, 40, 70):
        world.schedule([Fault(start, "pause", (ids[0],)), Fault(start + 20, "resume", (ids[0],))])
    buried: list[Any] = []
    world.after_step.append(
        lambda world, node: buried.extend(
            info.node for info in (world.core(node).members() if node == ids[0] else []) if info.state == "dead"
        )
    )
    world.run(110.0)
    assert buried == []


def test_profiles_reach_everyone_and_only_when_they_change() -> None:
    world = gossip_world(12, 9)
    ids = [node_id(index) for index in range(12)]
    world.run(10.0)
    for index, node in enumerate(ids):
        profile = NodeProfile(name=f"node {index}", hardware="x" * (3000 if index == 3 else 10))
        world.do(node, lambda core, now, profile=profile: core.set_profile(profile, now))
    names = [f"node {index}" for index in range(12)]

    def complete() -> bool:
        held = [[profile and profile.name for profile in map(world.core(node).profile, ids)] for node in ids]
        return held == [names] * 12

    assert world.run(20.0, stop=complete), "after 10 s"
    world.run(world.now + 10.0)
    before = sum(size for _, size in world.sent.values())
    world.run(world.now + 30.0)
    idle = (sum(size for _, size in world.sent.values()) - before) / 30.0 / 12
    assert idle < 120.0  # bytes/s of plain text; profiles of 3,400 bytes are not among them


# -- controls: a rule removed is a violation seen (the search is ``python -m tests.sim.gossip_mutants``)

CAUGHT = {
    "no refutation": (0, "G4: a steady member is dead"),
    "the largest incarnation is forgotten": (1, "G2"),
    "dead is taken as dead": (0, "G4: a steady member is dead"),
    "no indirect probes": (0, "G4: suspected"),
    "no wake guard": (5, "G4: judged"),
    "old news revives the dead": (0, "G3"),
    "an incarnation is told before it is saved": (0, "G1"),
    "the dead are not written to": (2, "after 150"),
}
"""Name -> the seed that catches it, and what is seen."""


@pytest.mark.parametrize("name", CONTROLS)
def test_negative_control(name: str) -> None:
    seed, what = CAUGHT[name]
    assert play(seed, CONTROLS[name]["mix"]) == ""
    assert play(seed, **CONTROLS[name]).startswith(what)


def refutations(config: GossipConfig) -> int:
    """Two steady members cannot reach each other directly for two minutes."""
    world = gossip_world(6, 1, config)
    world.schedule([Fault(5.0, "partition", (node_id(0),), (node_id(1),))])
    world.run(120.0)
    return sum(type(event).__name__ == "Refuted" for node in world.nodes.values() for event in node.emitted)


def test_control_without_helpers() -> None:
    """Helpers see what the prober cannot."""
    assert refutations(GossipConfig()) == 0
    assert refutations(GossipConfig(helpers=0)) > 10


def burials_by_a_returner(seed: int, config: GossipConfig) -> str:
    """One member is cut off for 9 s, with suspicions of its own that nobody ever heard; then it is back."""
    world = gossip_world(8, seed, config)
    ids = [node_id(index) for index in range(8)]
    GossipChecks(world, steady=list(ids[1:]))
    world.schedule([Fault(10.0, "partition", (ids[0],)), Fault(19.0, "heal")])
    try:
        world.run(45.0)
    except AssertionError as error:
        return str(error)[:2]
    return ""


def test_control_without_the_last_call() -> None:
    assert [burials_by_a_returner(seed, GossipConfig()) for seed in range(1, 5)] == [""] * 4
    assert "G4" in [burials_by_a_returner(seed, GossipConfig(last_call=False)) for seed in range(1, 5)]


def buried_on_waking(config: GossipConfig) -> bool:
    """One member sleeps with a suspicion pending, and all its mail is lost."""
    world = gossip_world(5, 2, config)
    ids = [node_id(index) for index in range(5)]
    world.run(10.0)
    sleeper, accused = world.core(ids[0]), ids[1]
    claim = Update(State.SUSPECT, world.core(accused).roster.own.record, (ids[2], ids[3], ids[4]))
    world.apply(Fault(world.now, "cut", tuple(ids[1:]), (ids[0],)))
    world.do(ids[0], lambda core, now: core.receive(Gossip((claim,)), ids[2], now))
    world.apply(Fault(world.now, "pause", (ids[0],)))
    world.run(40.0)
    world.nodes[ids[0]].inbox.clear()
    world.apply(Fault(world.now, "heal"))
    world.apply(Fault(world.now, "resume", (ids[0],)))
    world.run(41.0)
    assert sleeper.member(accused) is not None
    return any(
        type(event).__name__ == "MemberChanged" and event.node == accused and event.new == "dead"
        for event in world.nodes[ids[0]].emitted
    )


def test_control_without_the_wake_guard() -> None:
    assert not buried_on_waking(GossipConfig())
    assert buried_on_waking(GossipConfig(wake_guard=False))
