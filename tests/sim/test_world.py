"""The simulator itself: determinism, faults, order of effects, clocks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from mesh.core import Effect, Emit, Persist, Send
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
