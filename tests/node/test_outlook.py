"""The view as it is built from gossip and election, and what the policy of voters is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gossip.members import MemberInfo as Gossiped
from mesh.placement import Placement
from mesh.types import NodeProfile
from node.advice import NO_COORDINATOR
from node.outlook import Outlook


def told(node: str, state: Any = "alive", address: str = "10.0.0.1:9400", rtt_ms: float | None = None) -> Gossiped:
    return Gossiped(node, state, 1, address, 0, rtt_ms, state == "suspect")  # type: ignore[arg-type]


class World:
    """Gossip and election as attributes."""

    def __init__(self, *members: Gossiped) -> None:
        self.table = list(members)
        self.profiles: dict[str, NodeProfile] = {}
        self.core = SimpleNamespace(leader="b", term=3)
        swim = SimpleNamespace(members=lambda: list(self.table), profile=self.profiles.get)
        peers: Any = SimpleNamespace(swim=swim, core=self.core)
        self.built = 0
        self.outlook = Outlook("me", peers, self._own)  # type: ignore[arg-type]

    def _own(self) -> NodeProfile:
        self.built += 1
        return NodeProfile(name="own")


def test_members_in_order_of_id_with_what_they_said() -> None:
    world = World(told("me"), told("c", "suspect"), told("a", rtt_ms=2.5), told("b", "dead"))
    world.profiles["a"] = NodeProfile(name="ann")
    world.profiles["me"] = NodeProfile(name="what gossip still holds of us")
    view = world.outlook.view
    assert [(m.id, m.state, m.profile.name, m.rtt_ms, m.degraded) for m in view.members] == [
        ("a", "alive", "ann", 2.5, False),
        ("b", "dead", "", 0.0, False),
        ("c", "suspect", "", 0.0, True),
        ("me", "alive", "own", 0.0, False),
    ]
    assert (view.me, view.coordinator, view.term, view.degraded) == ("me", "b", 3, "")


def test_a_view_is_built_once_for_each_change() -> None:
    world = World(told("me"))
    assert world.outlook.view is world.outlook.view
    assert world.built == 1
    before = world.outlook.view
    world.table.append(told("a"))
    assert world.outlook.view is before
    world.outlook.touch()
    assert len(world.outlook.view.members) == 2
    assert len(before.members) == 1


def test_a_placement_is_in_the_next_view() -> None:
    world = World(told("me"))
    assert (world.outlook.view.placement, world.outlook.view.placement_id) == (Placement(), (0, 0))
    placement = Placement()
    world.outlook.placement(placement, (1, 4))
    assert world.outlook.view.placement is placement
    assert world.outlook.view.placement_id == (1, 4)


def test_without_a_coordinator_the_mesh_is_degraded() -> None:
    world = World(told("me"))
    world.core.leader = None
    assert (world.outlook.view.coordinator, world.outlook.view.degraded) == (None, NO_COORDINATOR)


def since(world: World, now: float) -> list[tuple[str, float | None, float | None]]:
    return [(x.id, x.alive_since, x.dead_since) for x in world.outlook.electorate(now)]


def test_how_long_members_have_been_as_they_are() -> None:
    world = World(told("a"), told("b"))
    assert since(world, 10.0) == [("a", 10.0, None), ("b", 10.0, None)]
    assert since(world, 20.0) == [("a", 10.0, None), ("b", 10.0, None)]
    world.table[1] = told("b", "suspect")
    assert since(world, 30.0)[1] == ("b", None, None)
    world.table[1] = told("b", "dead")
    assert since(world, 40.0)[1] == ("b", None, 40.0)
    world.table[1] = told("b", "left")
    assert since(world, 50.0)[1] == ("b", None, 40.0), "dead or left is gone"
    world.table[1] = told("b")
    assert since(world, 60.0) == [("a", 10.0, None), ("b", 60.0, None)]


def test_a_refuted_suspicion_counts_anew() -> None:
    world = World(told("a"))
    since(world, 1.0)
    world.table[0] = told("a", "suspect")
    since(world, 2.0)
    world.table[0] = told("a")
    assert since(world, 3.0) == [("a", 3.0, None)]


@pytest.mark.parametrize(
    ("address", "domain"),
    [("10.0.0.1:9400", "10.0.0.1"), ("[::1]:9400", "::1"), ("", ""), ("garbage", ""), ("h:port", ""), (":::1", "")],
)
def test_what_fails_together_and_an_address_that_is_none_harms_nobody(address: str, domain: str) -> None:
    (info,) = World(told("a", address=address)).outlook.electorate(0.0)
    assert info.domain == domain


def test_who_drains_is_not_asked_to_vote() -> None:
    world = World(told("a"), told("b"))
    world.profiles["a"] = NodeProfile(draining=True)
    assert [info.can_vote for info in world.outlook.electorate(0.0)] == [False, True]
