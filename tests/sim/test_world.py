"""The simulator itself: determinism, faults, order of effects, clocks."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesh.core import Effect, Emit, Persist, Send
from tests.sim.network import Network
from tests.sim.world import Fault, NetParams, World

ROOT = Path(__file__).parents[2]


class Hello(msgspec.Struct, frozen=True):
    count: int


class Beacon:
    """Sends a counter to every peer each second; emits what it hears; persists its count."""

    def __init__(self, peers: list[str], count: int, now: float) -> None:
        self.peers, self.count, self.deadline = peers, count, now + 1.0

    def receive(self, message: Hello, sender: str, now: float) -> list[Effect]:
        return [Emit((sender, message.count, round(now, 6)))]

    def tick(self, now: float) -> list[Effect]:
        self.deadline = now + 1.0
        self.count += 1
        sends: list[Effect] = [Send(peer, Hello(self.count)) for peer in self.peers]
        return [Persist(self.count), *sends]


def beacons(seed: int, net: NetParams | None = None, **options: object) -> World:
    world = World(seed, net, **options)
    names = ["a", "b", "c"]
    for name in names:
        peers = [other for other in names if other != name]
        world.add(name, make=lambda disk, now, peers=peers: Beacon(peers, disk[-1] if disk else 0, now))
    return world


def heard(world: World, name: str, sender: str) -> list[int]:
    return [count for who, count, _ in world.nodes[name].emitted if who == sender]


def stormy(seed: int) -> World:
    world = beacons(seed, NetParams(loss=0.2, duplicate=0.1, reorder=0.2, reorder_s=2.0))
    world.schedule([Fault(3.2, "crash_mid", ("a",)), Fault(9.0, "restart", ("a",)), Fault(12.0, "pause", ("b",))])
    world.schedule([Fault(20.0, "resume", ("b",)), Fault(22.0, "partition", ("c",)), Fault(30.0, "heal")])
    world.run(60.0)
    return world


def test_one_seed_one_run() -> None:
    assert stormy(1).digest() == stormy(1).digest() != stormy(2).digest()


def test_the_digest_does_not_depend_on_the_hash_seed() -> None:
    code = "from tests.sim.test_world import stormy; print(stormy(5).digest())"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != b""


def test_all_is_delivered_on_a_good_network() -> None:
    world = beacons(1)
    world.run(10.5)
    assert heard(world, "b", "a") == list(range(1, 11))


def test_crash_loses_the_core_and_restart_finds_the_disk() -> None:
    world = beacons(1)
    world.schedule([Fault(3.5, "crash", ("a",)), Fault(6.0, "restart", ("a",))])
    world.run(8.5)
    assert heard(world, "b", "a") == [1, 2, 3, 4, 5]


def test_wipe_loses_the_disk() -> None:
    world = beacons(1)
    world.schedule([Fault(3.5, "crash", ("a",)), Fault(6.0, "wipe", ("a",))])
    world.run(8.5)
    assert heard(world, "b", "a") == [1, 2, 3, 1, 2]


def test_a_crash_in_mid_step_keeps_what_was_persisted_before() -> None:
    world = beacons(3)
    world.nodes["a"].crash_after = 1
    world.run(1.5)
    assert not world.nodes["a"].up
    assert world.nodes["a"].disk == [1]
    assert heard(world, "b", "a") == []


def test_pause_keeps_messages_and_resume_delivers_them_first() -> None:
    world = beacons(1)
    world.schedule([Fault(1.5, "pause", ("b",)), Fault(4.5, "resume", ("b",))])
    world.run(4.6)
    assert heard(world, "b", "a") == [1, 2, 3, 4]
    assert heard(world, "a", "b")[0] == 1
    assert world.core("b").count == 2  # one late tick, not three


def test_partition_is_symmetric_and_cut_is_not() -> None:
    world = beacons(1)
    world.apply(Fault(0, "cut", ("a",), ("b",)))
    world.apply(Fault(0, "partition", ("c",), ("a",)))
    world.run(1.5)
    assert (heard(world, "b", "a"), heard(world, "a", "b")) == ([], [1])
    assert (heard(world, "c", "a"), heard(world, "a", "c"), heard(world, "c", "b")) == ([], [], [1])
    world.apply(Fault(0, "heal"))
    world.run(2.5)
    assert (heard(world, "b", "a"), heard(world, "a", "c")) == ([2], [2])


def test_loss_and_duplication_have_their_rate() -> None:
    world = beacons(1, NetParams(loss=0.3, duplicate=0.5))
    world.run(400.5)
    counts = heard(world, "b", "a")
    assert 0.6 < len(set(counts)) / 400 < 0.8
    assert 1.4 < len(counts) / len(set(counts)) < 1.6


def test_reliable_messages_keep_their_order_and_survive_loss() -> None:
    world = beacons(1, NetParams(loss=0.5, jitter_s=3.0, duplicate=0.5), reliable=lambda message: True)
    world.run(100.0)
    counts = heard(world, "b", "a")
    assert counts == sorted(set(counts))
    assert len(counts) > 90


def test_drift_changes_the_rate_of_ticks() -> None:
    world = beacons(1)
    world.apply(Fault(0, "drift", ("a",), value=1.1))
    world.run(100.5)
    assert world.core("a").count in (109, 110)


def test_peers_see_a_reset_unless_the_power_was_cut() -> None:
    seen: list[tuple[str, str]] = []
    world = World(1)
    for name in "abc":
        world.add(name, Beacon([], 0, 0.0), on_reset=lambda core, peer, now, me=name: seen.append((me, peer)) or [])
    world.apply(Fault(0, "crash", ("a",)))
    world.apply(Fault(0, "crash", ("b",), ("silent",)))
    world.run(0.5)
    assert seen == [("c", "a")]


def test_faults_print_and_replay() -> None:
    faults = [Fault(1.0, "cut", ("a",), ("b",)), Fault(2.0, "heal")]
    assert msgspec.json.decode(msgspec.json.encode(faults), type=list[Fault]) == faults
    assert "kind='cut'" in repr(faults[0])


def test_a_flapping_link_is_there_half_of_the_time() -> None:
    world = beacons(1)
    world.apply(Fault(0, "flap", ("a",), ("b",), value=3.0))
    world.run(12.5)
    assert heard(world, "b", "a") == [3, 4, 5, 9, 10, 11]  # cut from 0 to 3 and from 6 to 9
    assert heard(world, "a", "b") == list(range(1, 13))


def test_a_heal_can_be_for_the_faults_of_some_nodes_alone() -> None:
    world = beacons(1)
    world.apply(Fault(0, "cut", ("a",), ("c",)))
    world.apply(Fault(0, "partition", ("b",), ("c",)))
    world.apply(Fault(0, "heal", ("b",)))
    world.run(1.5)
    assert (heard(world, "c", "a"), heard(world, "c", "b"), heard(world, "b", "c")) == ([], [1], [1])


@pytest.mark.parametrize("delay", ["exponential", "uniform", "pareto"])
def test_delays_have_their_mean(delay: Any) -> None:
    network = Network(NetParams(base_s=1.0, jitter_s=0.5, delay=delay), random.Random(1))
    drawn = sorted(network.delay("a", "b") for _ in range(20_000))
    assert drawn[0] >= 1.0
    assert 1.4 < sum(drawn) / len(drawn) < 1.6
    assert (drawn[-20] > 10.0) == (delay == "pareto")


def test_a_slow_uplink_delays_and_then_drops() -> None:
    world = beacons(1, NetParams(jitter_s=0.0, queue_s=3.0))
    world.apply(Fault(0, "uplink", ("a",), value=100.0))  # two messages of 200 bytes a second take four seconds
    world.run(40.0)
    assert 18 <= len(heard(world, "b", "a")) + len(heard(world, "c", "a")) <= 20
    assert len(heard(world, "b", "c")) >= 39
    last = max(at for who, _, at in world.nodes["b"].emitted if who == "a")
    world.apply(Fault(0, "uplink", ("a",), value=0.0))
    world.run(last + 20.0)
    assert heard(world, "b", "a")[-1] >= 45


def test_a_busy_node_reads_one_message_at_a_time() -> None:
    world = beacons(1, NetParams(jitter_s=0.0))
    clock = world.nodes["b"].clock(0.0)
    world.apply(Fault(0, "busy", ("b",), value=0.3))
    world.run(2.9)
    read = [round(at - clock, 2) for _, _, at in world.nodes["b"].emitted]
    assert read == [1.3, 1.6, 2.3, 2.6]  # its own tick is a step too


def test_a_slow_disk_holds_back_what_comes_after_the_record() -> None:
    world = beacons(1, NetParams(jitter_s=0.0))
    world.apply(Fault(0, "fsync", ("a",), value=0.25))
    seen: list[float] = []
    world.after_step.append(lambda world, node: seen.append(world.now) if node == "a" and world.heard is None else None)
    world.run(1.1)
    assert (world.nodes["a"].disk, heard(world, "b", "a"), seen) == ([], [], [])
    world.run(1.3)
    assert (world.nodes["a"].disk, heard(world, "b", "a"), seen) == ([1], [1], [1.25])
    assert heard(world, "a", "b") == [1]  # which had to wait


def test_a_crash_while_the_disk_writes_loses_the_record_or_not_but_tells_nobody() -> None:
    kept = []
    for seed in range(20):
        world = beacons(seed)
        world.apply(Fault(0, "fsync", ("a",), value=0.25))
        world.schedule([Fault(1.1, "crash", ("a",)), Fault(2.0, "restart", ("a",))])
        world.run(3.5)
        assert 1 not in heard(world, "b", "a") or world.nodes["a"].disk[0] == 1
        kept.append(world.core("a").count)
    assert set(kept) == {1, 2}


def test_a_disk_that_lies_loses_its_tail_in_a_crash() -> None:
    world = beacons(1)
    world.apply(Fault(0, "lies", ("a",), value=2))
    world.schedule([Fault(4.5, "crash", ("a",)), Fault(6.0, "restart", ("a",)), Fault(7.5, "crash", ("a",))])
    world.run(8.0)
    assert heard(world, "b", "a") == [1, 2, 3, 4, 3]
    assert world.nodes["a"].disk == [1, 2, 3]
