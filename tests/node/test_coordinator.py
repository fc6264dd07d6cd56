"""When the coordinator re-plans, and what one act commits; on a clock that the test moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from mesh.election.events import NotLeader
from mesh.election.record import Content
from mesh.placement import Placement, place, survivability
from mesh.types import MeshId, NodeId, NodeProfile
from mesh.view import MemberView, MeshView
from node.coordinator import MAX_SEALED, Coordinator, Pace, decode_placement
from node.identity import Identity, SealKey
from node.security.ca import Authority
from tests.mesh.exhaustive import model

MESH = MeshId("0123456789abcdef" * 2)
PACE = Pace(stable_s=1.0, between_s=5.0, new_term_s=3.0, mass_s=15.0, gain_s=60.0)
INFO = model(layer=100, embed=0, head=0)


def member(name: str, state: Any = "alive", **profile: Any) -> MemberView:
    profile = {"weight_bytes": 10_000, "flops": 1e9, "bandwidth": 1e6} | profile
    return MemberView(NodeId(name), state, NodeProfile(**profile))


def names(count: int) -> list[MemberView]:
    return [member(f"n{index}") for index in range(count)]


class Keeper:
    """The record, as one coordinator changes it."""

    def __init__(self) -> None:
        self.leads = True
        self.voters: tuple[str, ...] = ("n0",)
        self.content = Content(models=(msgspec.msgpack.encode(INFO),))
        self.ca: Authority | None = None
        self.commits = 0
        self.refuses: Exception | None = None
        self.meanwhile: Callable[[Content], Content] = lambda content: content

    def authority(self) -> Authority | None:
        return self.ca

    async def change(self, edit: Callable[[Content], Content]) -> Content:
        if self.refuses:
            raise self.refuses
        self.content = edit(self.meanwhile(self.content))
        self.commits += 1
        return self.content


class World:
    """``walk`` moves the clock in the coordinator's own steps and returns when it acted."""

    def __init__(self, members: list[MemberView], leads: bool = True) -> None:
        self.now = 100.0
        self.members = members
        self.keeper = Keeper()
        self.keeper.leads = leads
        self.keys: dict[str, SealKey] = {}
        self.coordinator = Coordinator(
            self.keeper,  # type: ignore[arg-type]
            lambda: MeshView(NodeId("n0"), tuple(self.members)),
            self.keys.get,  # type: ignore[arg-type]
            PACE,
            lambda: self.now,
        )

    async def walk(self, seconds: float) -> list[float]:
        acted, it, end = [], self.coordinator, self.now + seconds
        while self.now < end - 0.05:
            self.now = round(self.now + 0.1, 6)
            it._watch()
            if self.keeper.leads and it._due():
                acted.append(self.now)
                await it._act()
        return acted

    def lose(self, *gone: str) -> None:
        self.members = [msgspec.structs.replace(x, state="dead") if x.id in gone else x for x in self.members]

    @property
    def placement(self) -> Placement:
        return decode_placement(self.keeper.content.placement)


async def calm(count: int) -> World:
    """A mesh of ``count`` that has been planned and is due for no act soon."""
    world = World(names(count))
    acted = await world.walk(20.0)
    world.now = acted[-1]
    return world


# -- pacing ------------------------------------------------------------------------------------------------------------


async def test_at_the_start_the_cut_must_be_stable() -> None:
    world = World(names(3))
    world.coordinator.note_leading()
    (first, *_) = await world.walk(10.0)
    assert first == pytest.approx(100.0 + PACE.between_s, abs=0.15)


async def test_between_two_acts_there_is_time() -> None:
    world = World(names(3))
    acted = await world.walk(30.0)
    assert all(b - a == pytest.approx(PACE.between_s, abs=0.11) for a, b in pairwise(acted))


async def test_a_member_that_comes_or_goes_makes_the_cut_unstable() -> None:
    world = await calm(5)
    await world.walk(PACE.between_s - 0.5)
    for _ in range(8):  # somebody comes or goes all the time
        world.members = [*world.members, member(f"x{len(world.members)}")]
        since = world.now
        assert await world.walk(0.9) == []
    (acted,) = await world.walk(1.2)
    assert acted - since == pytest.approx(PACE.stable_s, abs=0.15)


async def test_a_suspicion_alone_is_no_change() -> None:
    world = await calm(5)
    await world.walk(PACE.between_s - 0.5)
    for state in ("suspect", "alive"):
        world.members[2] = msgspec.structs.replace(world.members[2], state=state)
        await world.walk(0.2)
    assert len(await world.walk(0.4)) == 1


@pytest.mark.parametrize("change", [{"weight_bytes": 1}, {"role": "entry"}, {"draining": True}])
async def test_what_members_can_hold_belongs_to_the_cut(change: dict[str, Any]) -> None:
    world = await calm(5)
    await world.walk(PACE.between_s - 0.2)
    world.members[2] = member("n2", **change)
    assert await world.walk(0.9) == []
    assert len(await world.walk(0.5)) == 1


async def test_a_new_coordinator_looks_around_first() -> None:
    world = World(names(3), leads=False)
    await world.walk(60.0)
    world.keeper.leads = True
    world.coordinator.note_leading()
    since = world.now
    (first,) = await world.walk(4.0)
    assert first - since == pytest.approx(PACE.new_term_s, abs=0.15)


async def test_one_of_many_that_goes_is_replaced_soon() -> None:
    world = await calm(10)
    await world.walk(PACE.between_s)
    world.lose("n5")
    since = world.now
    (acted, *_) = await world.walk(7.0)
    assert acted - since <= PACE.between_s + 0.2


@pytest.mark.parametrize("apart_s", [0.0, 0.4])
async def test_when_many_vanish_it_waits_for_longer(apart_s: float) -> None:
    """Who is cut off finds the others dead one by one."""
    world = await calm(10)
    await world.walk(PACE.between_s)
    for name in ("n4", "n5", "n6", "n7"):
        world.lose(name)
        assert await world.walk(apart_s) == []
    since = world.now - apart_s
    acted = await world.walk(PACE.mass_s + 2.0)
    assert acted[0] - since == pytest.approx(PACE.mass_s, abs=0.25)
    assert len(acted) == 1
    assert await world.walk(PACE.between_s) != [], "afterwards that is the mesh"


async def test_many_that_come_back_need_no_longer_wait() -> None:
    world = await calm(10)
    await world.walk(PACE.between_s - 0.2)
    world.lose("n4", "n5", "n6", "n7")
    assert await world.walk(3.0) == []
    world.members = names(10)
    assert len(await world.walk(PACE.stable_s + 0.3)) == 1


async def test_a_mesh_that_shrank_slowly_is_no_news_to_a_new_coordinator() -> None:
    world = World(names(10), leads=False)
    for index in range(1, 7):
        await world.walk(30.0)
        world.lose(f"n{index}")
    await world.walk(30.0)
    world.keeper.leads = True
    world.coordinator.note_leading()
    assert len(await world.walk(PACE.new_term_s + 0.3)) == 1


async def test_the_last_one_left_does_not_wait_for_others() -> None:
    world = await calm(4)
    await world.walk(PACE.between_s - 0.2)
    world.lose("n1", "n2", "n3")
    assert len(await world.walk(PACE.stable_s + 0.3)) == 1


# -- placing -----------------------------------------------------------------------------------------------------------


async def test_a_better_placement_is_committed_once() -> None:
    world = World(names(3))
    await world.walk(30.0)
    capacities = MeshView(NodeId("n0"), tuple(world.members)).capacities()
    assert world.placement == place((INFO,), capacities, Placement())
    assert world.placement.models[0].spans
    assert world.keeper.commits == 1


async def test_while_somebody_is_suspected_nothing_moves() -> None:
    world = await calm(3)
    before = world.placement
    world.members = [member("n0"), member("n1"), member("n2", "suspect", weight_bytes=0)]
    await world.walk(20.0)
    assert world.placement == before
    world.lose("n2")
    await world.walk(20.0)
    assert all(a.node != "n2" for a in world.placement.models[0].spans)


def sped(world: World, *faster: str) -> None:
    """Those named measure themselves a hundred times as fast as the others."""
    fast = {"flops": 1e11, "bandwidth": 1e8}
    slow = {"flops": 1e9, "bandwidth": 1e6}
    world.members = [
        msgspec.structs.replace(x, profile=msgspec.structs.replace(x.profile, **(fast if x.id in faster else slow)))
        for x in world.members
    ]


async def test_measurements_move_layers_only_when_they_say_so_for_long() -> None:
    world = World([member(f"n{index}", weight_bytes=600) for index in range(3)])
    await world.walk(20.0)
    before = world.placement
    for _ in range(20):
        sped(world, "n0")
        await world.walk(PACE.gain_s - PACE.between_s)
        sped(world)
        await world.walk(2 * PACE.between_s)
    assert (world.placement, world.keeper.commits) == (before, 1)
    sped(world, "n0")
    await world.walk(PACE.gain_s + 2 * PACE.between_s)
    assert world.placement != before
    assert world.keeper.commits == 2


async def test_no_copy_is_given_up_for_speed() -> None:
    world = World([member(f"n{index}", weight_bytes=500) for index in range(4)])
    await world.walk(20.0)
    before = world.placement
    assert survivability(before, [f"n{index}" for index in range(4)]) == {"m": 1}
    sped(world, "n0")
    await world.walk(10 * PACE.gain_s)
    assert world.placement == before


async def test_a_new_cut_is_planned_for_at_once_with_what_is_measured_by_then() -> None:
    world = World([member(f"n{index}", weight_bytes=600) for index in range(3)])
    await world.walk(20.0)
    sped(world, "n0")
    await world.walk(3 * PACE.between_s)
    world.lose("n1")
    await world.walk(PACE.mass_s + 2 * PACE.between_s)
    assert world.keeper.commits == 2


async def test_only_the_placement_is_changed_whatever_was_committed_meanwhile() -> None:
    world = World(names(3))
    world.keeper.meanwhile = lambda content: msgspec.structs.replace(content, tombstones=("x",))
    await world.walk(6.0)
    assert world.keeper.content.tombstones == ("x",)
    assert world.placement.models


async def test_leadership_lost_midway_is_no_error_and_it_is_tried_again() -> None:
    world = World(names(3))
    world.keeper.refuses = NotLeader(None)
    assert len(await world.walk(12.0)) == 2
    world.keeper.refuses = None
    await world.walk(6.0)
    assert world.keeper.commits == 1


def test_a_record_without_a_placement() -> None:
    assert decode_placement(b"") == Placement()


# -- the CA's key ------------------------------------------------------------------------------------------------------


class Sealing(World):
    """Members with real identities; this node, the first, holds the CA's key."""

    def __init__(self, count: int, voters: int = 1) -> None:
        self.identities = [Identity.generate() for _ in range(count)]
        self.ids = [x.node_id for x in self.identities]
        super().__init__([member(x) for x in self.ids])
        self.keys.update({x.node_id: x.seal_key for x in self.identities})
        self.keeper.voters = tuple(self.ids[:voters])
        self.keeper.ca = Authority.found(MESH, time.time())

    @property
    def holders(self) -> list[str]:
        return [node for node, _ in self.keeper.content.sealed_ca]

    async def share(self) -> None:
        await self.coordinator._share_authority()


async def test_in_a_small_mesh_every_member_holds_the_key() -> None:
    world = Sealing(3)
    await world.share()
    assert world.holders == sorted(world.ids)
    assert world.keeper.ca is not None
    for identity in world.identities:
        raw = dict(world.keeper.content.sealed_ca)[identity.node_id]
        assert Authority.unsealed(identity, MESH, raw).der == world.keeper.ca.der
    await world.share()
    assert world.keeper.commits == 1, "what is sealed is not sealed again"


async def test_in_a_large_mesh_the_voters_do() -> None:
    world = Sealing(MAX_SEALED + 1, voters=3)
    await world.share()
    assert world.holders == sorted(world.ids[:3])


async def test_members_that_are_gone_lose_theirs_but_voters_and_suspects_keep_it() -> None:
    world = Sealing(4, voters=2)
    await world.share()
    world.lose(world.ids[1], world.ids[2])
    world.members[3] = msgspec.structs.replace(world.members[3], state="suspect")
    await world.share()
    assert world.holders == sorted([world.ids[0], world.ids[1], world.ids[3]])


async def test_who_has_not_said_its_key_yet_gets_it_later() -> None:
    world = Sealing(2)
    key = world.keys.pop(world.ids[1])
    await world.share()
    assert world.holders == [world.ids[0]]
    world.keys[world.ids[1]] = key
    await world.share()
    assert world.holders == sorted(world.ids)


async def test_a_member_with_anothers_seal_key_gets_none_and_holds_up_nobody() -> None:
    world = Sealing(3)
    liar, other = world.ids[1], world.ids[2]
    world.keys[liar] = world.keys[other]
    await world.walk(6.0)
    assert world.holders == sorted({*world.ids} - {liar})
    assert world.placement.models


async def test_the_revoked_get_no_key_though_gossip_still_sees_them() -> None:
    world = Sealing(3)
    await world.share()
    gone = world.ids[1]
    left = tuple(entry for entry in world.keeper.content.sealed_ca if entry[0] != gone)
    world.keeper.content = msgspec.structs.replace(world.keeper.content, tombstones=(gone,), sealed_ca=left)
    before = world.keeper.commits
    await world.share()
    assert gone not in world.holders
    assert world.keeper.commits == before, "and no commit is spent on it"


async def test_who_is_revoked_while_the_key_is_shared_gets_none() -> None:
    world = Sealing(3)
    gone = world.ids[1]
    world.keeper.meanwhile = lambda content: msgspec.structs.replace(content, tombstones=(gone,))
    await world.share()
    assert world.holders == sorted({*world.ids} - {gone})


async def test_without_the_key_nothing_is_shared() -> None:
    world = Sealing(2)
    world.keeper.ca = None
    await world.share()
    assert world.keeper.commits == 0
