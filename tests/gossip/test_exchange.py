"""Profiles and loads: when they are told, how they travel, what is refused."""

from __future__ import annotations

import math

import msgspec
import pytest

from gossip.config import GossipConfig
from gossip.messages import Ack, BigRows, Gossip, LoadPush, LoadRow, Ping, ProfileRow, Rows, Version, Want, Watch
from gossip.profiles import PROFILE_CODEC, load_changed, sound
from mesh.types import LayerSpan, Load, ModelId, ModelInfo, NodeId, NodeProfile
from tests.gossip.lab import ME, Lab, emitted, sends
from tests.sim.gossip_world import identity


def row(name: str, version: int, profile: NodeProfile | None = None, payload: bytes | None = None) -> ProfileRow:
    who = identity(NodeId(name))
    content = payload if payload is not None else PROFILE_CODEC.encode(profile or NodeProfile(name=name))
    bare = ProfileRow(who.node, version, content, b"")
    return msgspec.structs.replace(bare, signature=who.sign(bare.signed_bytes(who.mesh_id)))


def set_profile(lab: Lab, **fields: object) -> list:
    return lab.did(lab.core.set_profile(NodeProfile(**fields), lab.now))  # type: ignore[arg-type]


def versions_told(effects: list, node: str = "me") -> list[int]:
    return [
        version.version
        for _, message in sends(effects)
        for version in getattr(message, "versions", ())
        if version.node == node
    ]


# -- the own profile


def test_a_new_profile_is_announced_and_the_same_is_not() -> None:
    lab = Lab("b", "c")
    set_profile(lab, name="me", memory_bytes=5)
    assert versions_told(lab.run(3.0))
    lab.run(10.0)
    set_profile(lab, name="me", memory_bytes=5)
    assert versions_told(lab.run(3.0)) == []
    set_profile(lab, name="me", memory_bytes=6)
    assert versions_told(lab.run(3.0))


def test_versions_start_at_the_incarnation() -> None:
    """So a row of this life wins over those of an earlier one."""
    lab = Lab("b")
    set_profile(lab, name="me")
    assert set(versions_told(lab.run(1.0))) == {10}


def test_a_later_version_of_the_own_row_is_outranked() -> None:
    lab = Lab("b")
    set_profile(lab, name="me")
    lab.hears(Gossip(versions=(Version(ME, 500),)), "b")
    assert lab.core.exchange.profiles.version(ME) == 501


def test_a_jittering_round_trip_is_no_news() -> None:
    lab = Lab("b")
    set_profile(lab, name="me", rtt_ms=10.0)
    lab.run(30.0)
    for rtt in (10.5, 9.5, 10.9):
        set_profile(lab, name="me", rtt_ms=rtt)
    assert lab.core.exchange.profiles.version(ME) == 10
    set_profile(lab, name="me", rtt_ms=15.0)
    assert lab.core.exchange.profiles.version(ME) == 11
    set_profile(lab, name="me", rtt_ms=30.0)  # too soon
    assert lab.core.exchange.profiles.version(ME) == 11


# -- load


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        (Load(), Load(), False),
        (Load(running=10), Load(running=11), True),
        (Load(running=20), Load(running=21), False),
        (Load(free_tokens=1000), Load(free_tokens=950), False),
        (Load(free_tokens=1000), Load(free_tokens=900), True),
        (Load(lag_ms=1.0), Load(lag_ms=15.0), False),
        (Load(lag_ms=1.0), Load(lag_ms=25.0), True),
    ],
)
def test_load_changes_by_a_tenth(old: Load, new: Load, changed: bool) -> None:
    assert load_changed(old, new, 0.1) is changed


def test_load_is_told_at_most_once_in_ten_seconds() -> None:
    lab = Lab("b", "c")
    lab.core.prober.stop()  # the puppets would be dead soon
    told = 0
    for second in range(40):
        set_profile(lab, name="me", load=Load(running=second))
        told += len(sends(lab.run(1.0), "LoadPush"))
    assert 2 * 4 <= told <= 2 * 5
    assert lab.core.exchange.profiles.version(ME) == 10  # the profile itself has not changed


def test_load_goes_to_everyone_in_a_small_mesh_and_to_watchers_in_a_large_one() -> None:
    lab = Lab("b", "c", "d", config=GossipConfig(load_everyone=3))
    lab.hears(Watch(), "c")
    set_profile(lab, name="me", load=Load(running=3))
    assert [to for to, _ in sends(lab.run(1.0), "LoadPush")] == ["c"]
    small = Lab("b", "c", "d")
    set_profile(small, name="me", load=Load(running=3))
    assert sorted(to for to, _ in sends(small.run(1.0), "LoadPush")) == ["b", "c", "d"]


def test_watchers_are_told_at_once_renew_and_expire() -> None:
    lab = Lab("b", "c", config=GossipConfig(load_everyone=1))
    set_profile(lab, name="me", load=Load(running=3))
    lab.run(1.0)
    assert [to for to, _ in sends(lab.hears(Watch(), "c"), "LoadPush")] == ["c"]
    assert sends(lab.hears(Watch(), "c"), "LoadPush") == []
    lab.run(31.0)
    set_profile(lab, name="me", load=Load(running=9))
    assert sends(lab.run(1.0), "LoadPush") == []


def test_watching_is_renewed_in_a_large_mesh_only() -> None:
    lab = Lab("b", "c", "d", config=GossipConfig(load_everyone=2))
    lab.core.prober.stop()  # the puppets would be dead soon
    lab.did(lab.core.watch([NodeId("b")], lab.now))
    assert [to for to, _ in sends(lab.run(25.0), "Watch")] == ["b"] * 3
    lab.did(lab.core.watch([], lab.now))
    assert sends(lab.run(25.0), "Watch") == []


def test_probers_see_the_load_on_the_ack() -> None:
    lab = Lab("b", "c", config=GossipConfig(load_everyone=1))
    set_profile(lab, name="me", load=Load(running=3))
    lab.run(1.0)
    ((_, ack),) = sends(lab.hears(Ping(1), "b"), "Ack")
    assert ack.load is None  # a large mesh, and it never asked for it
    ((_, ack),) = sends(lab.hears(Ping(1, load=7), "b"), "Ack")
    assert ack.load.load == Load(running=3)
    known = ack.load.version & 0xFFFF
    ((_, ack),) = sends(lab.hears(Ping(1, load=known), "b"), "Ack")
    assert ack.load is None


def test_loads_are_merged_into_profiles() -> None:
    lab = Lab("b")
    lab.hears(Rows((row("b", 1, NodeProfile(name="b", memory_bytes=7)),)), "b")
    effects = lab.hears(LoadPush(LoadRow(5, Load(running=2))), "b")
    assert emitted(effects, "ProfileChanged")[0].load_only
    profile = lab.core.profile(NodeId("b"))
    assert profile is not None
    assert (profile.memory_bytes, profile.load.running) == (7, 2)
    lab.hears(LoadPush(LoadRow(4, Load(running=9))), "b")  # older
    assert lab.core.profile(NodeId("b")) is profile


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_impossible_loads_are_ignored(value: float) -> None:
    lab = Lab("b")
    assert emitted(lab.hears(LoadPush(LoadRow(5, Load(tokens_per_s=value))), "b"), "ProfileChanged") == []


def test_loads_are_believed_of_their_owner_alone() -> None:
    lab = Lab("b", "c")
    lab.hears(Ack(77, NodeId("c"), load=LoadRow(5, Load(running=9))), "b")
    assert lab.core.exchange.profiles.load_row(NodeId("c")) is None


# -- rows


def test_a_version_is_pulled_from_who_told_it_then_from_its_owner() -> None:
    lab = Lab("b", "c")
    lab.hears(Gossip(versions=(Version(NodeId("c"), 3),)), "b")
    assert sends(lab.run(0.0), "Want") == [("b", Want((NodeId("c"),)))]
    asked = [to for to, _ in sends(lab.run(5.0), "Want")]
    assert asked == ["c", "b"]
    assert lab.core.exchange.profiles.pulls == {}


def test_versions_told_together_are_pulled_together_and_once() -> None:
    lab = Lab("b", "c", "d")
    for _ in range(3):
        lab.hears(Gossip(versions=(Version(NodeId("c"), 3), Version(NodeId("d"), 4))), "b")
    assert sends(lab.run(0.0), "Want") == [("b", Want((NodeId("c"), NodeId("d"))))]


def test_a_pulled_row_is_kept_and_passed_on() -> None:
    lab = Lab("b", "c")
    lab.hears(Gossip(versions=(Version(NodeId("c"), 3),)), "b")
    lab.run(0.0)
    effects = lab.hears(Rows((row("c", 3),)), "b")
    assert emitted(effects, "ProfileChanged")[0].node == "c"
    assert versions_told(lab.run(1.0), "c")


def test_old_versions_are_not_pulled() -> None:
    lab = Lab("b", "c")
    lab.hears(Rows((row("c", 3),)), "b")
    for version in (1, 3):
        lab.hears(Gossip(versions=(Version(NodeId("c"), version),)), "b")
    assert sends(lab.run(1.0), "Want") == []


def test_a_row_that_its_owner_did_not_sign_is_rejected() -> None:
    lab = Lab("b", "c")
    forged = msgspec.structs.replace(row("c", 3), version=4)
    assert emitted(lab.hears(Rows((forged,)), "b"), "Rejected")[0].sender == "b"
    assert lab.core.profile(NodeId("c")) is None


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        PROFILE_CODEC.encode(NodeProfile(flops=math.nan)),
        PROFILE_CODEC.encode(NodeProfile(memory_bytes=-1)),
    ],
)
def test_a_senseless_profile_is_rejected_even_if_signed(payload: bytes) -> None:
    lab = Lab("b", "c")
    assert emitted(lab.hears(Rows((row("c", 3, payload=payload),)), "c"), "Rejected")
    assert lab.core.profile(NodeId("c")) is None


def test_rows_of_strangers_are_ignored() -> None:
    lab = Lab("b")
    lab.hears(Rows((row("stranger", 3),)), "b")
    assert lab.core.profile(NodeId("stranger")) is None


def test_small_rows_go_by_datagram_and_big_ones_over_the_stream() -> None:
    lab = Lab("b", "c", "d")
    lab.hears(Rows((row("c", 1),)), "c")
    ((_, small),) = sends(lab.hears(Want((NodeId("c"),)), "b"))[:1]
    assert isinstance(small, Rows)
    lab.hears(BigRows((row("d", 1, NodeProfile(name="d", hardware="x" * 2000)),)), "d")
    ((_, big),) = sends(lab.hears(Want((NodeId("c"), NodeId("d"), NodeId("nobody"))), "b"))[:1]
    assert isinstance(big, BigRows)
    assert [each.node for each in big.rows] == ["c", "d"]
    assert sends(lab.hears(Want((NodeId("nobody"),)), "b")) == []


def test_pulls_are_bounded() -> None:
    lab = Lab(*[f"p{index}" for index in range(1200)])
    for index in range(1200):
        lab.hears(Gossip(versions=(Version(NodeId(f"p{index}"), 3),)), "p0")
    assert len(lab.core.exchange.profiles.pulls) <= 1024


def test_a_real_profile_survives() -> None:
    model = ModelInfo(ModelId("m"), "0" * 64, 4, 1, 1, 1, 64, 8, 100, 256, "float32", (NodeId("c"),))
    profile = NodeProfile(name="c", models=(model,), spans=(LayerSpan(ModelId("m"), 0, 4),), exact=True, flops=1e12)
    assert sound(profile)
    lab = Lab("c")
    lab.hears(Rows((row("c", 1, profile),)), "c")
    assert lab.core.profile(NodeId("c")) == profile
