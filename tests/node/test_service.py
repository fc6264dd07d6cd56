"""The API's view of a node, where it spans nodes: ending a session from anywhere, and from several places at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mesh.pipeline import messages as m
from node.api.service import Caller, EndEvent
from node.node import Node
from node.service import ADMIN, NodeService
from tests.mesh.views import member
from tests.node.test_entry import World, request, rest
from tests.node.test_relay import Wire

MINE, STRANGER = Caller("k1", frozenset({"infer"})), Caller("k2", frozenset({"infer"}))


class Mesh:
    """Two nodes with sessions, and hops that answer nothing of this."""

    def __init__(self) -> None:
        wires: dict[str, Wire] = {}
        self.worlds: list[World] = []
        self.services: list[NodeService] = []
        for name in ("one", "two"):
            world = World(member("one"), member("two"), member("a", (0, 4)), member("b", (4, 8)))
            wire: Any = Wire(name, wires)
            config = SimpleNamespace(name=name)
            node = SimpleNamespace(me=name, config=config, entry=world.entry, peers=wire, view=world.seen)
            self.worlds.append(world)
            self.services.append(NodeService(cast(Node, node), "0"))


@pytest.fixture
async def mesh() -> Mesh:
    return Mesh()


async def test_a_session_is_ended_from_any_node_with_all_its_choices(mesh: Mesh) -> None:
    one, two = mesh.worlds
    running = [await one.open(request("s", caller="k1")), await two.open(request("s-1", caller="k1"))]
    other = await one.open(request("t", caller="k1"))
    assert not await mesh.services[1].cancel("s", STRANGER)
    assert not any(generation.over for generation in running)
    assert await mesh.services[1].cancel("s", MINE)
    assert [(await rest(generation))[-1] for generation in running] == [EndEvent("cancelled")] * 2
    assert not other.over
    assert not await mesh.services[0].cancel("s", MINE), "it has ended"
    assert await mesh.services[1].cancel("t", ADMIN)


async def test_of_several_that_end_one_session_at_once_one_is_told_so(mesh: Mesh) -> None:
    one, _ = mesh.worlds
    generation = await one.open(request("s", caller="k1"))
    one.posted.clear()
    found = await asyncio.gather(*(mesh.services[at].cancel("s", MINE) for at in (1, 0, 1, 0, 1)))
    assert sum(found) == 1
    assert await rest(generation) == [EndEvent("cancelled")]
    assert sorted(to for to, _ in one.take(m.Release)) == ["a", "b"], "every hop is freed, once"
