"""Ending a session from anywhere, from several places at once, and while it has no owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from mesh.errors import PeerError, PeerUnreachable
from mesh.pipeline import messages as m
from mesh.pipeline.journal import Adopt, JournalConfig, Journals
from mesh.types import Hop, ModelId, NodeId, Route
from node import endings
from node.api.service import Caller, EndEvent
from node.endings import Endings
from node.entry import _journal
from node.relay import Relay
from tests.mesh.views import member
from tests.node.test_entry import World, request, rest
from tests.node.test_relay import Wire

MINE, STRANGER = Caller("k1", frozenset({"infer"})), Caller("k2", frozenset({"infer"}))
ADMIN = Caller("admin", frozenset({"admin"}))
ROUTE = Route(ModelId("m"), (Hop(NodeId("a"), 0, 4), Hop(NodeId("two"), 4, 8)))


class Mesh:
    """Two nodes with sessions, and hops that answer nothing of this."""

    def __init__(self) -> None:
        wires: dict[str, Wire] = {}
        self.worlds: list[World] = []
        self.wires: list[Wire] = []
        self.journals: list[Journals] = []
        self.relays: list[Relay] = []
        self.endings: list[Endings] = []
        for name in ("one", "two"):
            world = World(member("one"), member("two"), member("a", (0, 4)), member("b", (4, 8)))
            wire: Any = Wire(name, wires)
            journals = Journals(NodeId(name), JournalConfig(), lambda session: [])
            me, view = NodeId(name), lambda world=world: world.seen
            self.worlds.append(world)
            self.wires.append(wire)
            self.journals.append(journals)
            self.relays.append(Relay(me, world.entry, wire, view, lambda s, held=journals: held.get(s) is not None))
            self.endings.append(Endings(me, world.entry, journals, wire, view))

    def hold(self, session: str) -> Adopt:
        """The journal of ``session``, whose owner is lost, is at node two; how that one will adopt it."""
        asked = _journal(request(session, caller="k1"))
        opened = m.Open(session, (4, "gone"), route=ROUTE, hop=1, placement_id=(0, 0), max_positions=20,
                        priority="normal", accepted=6, request=asked, left_s=90.0)  # fmt: skip
        self.journals[1].follow(opened, 0.0)
        return Adopt(session, (4, "gone"), ROUTE, asked, (), 90.0, "reset")


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    made = Mesh()
    yield made
    for world in made.worlds:
        for generation in world.entry.sessions():
            generation.finish("cancelled")


async def test_a_session_is_ended_from_any_node_with_all_its_choices(mesh: Mesh) -> None:
    one, two = mesh.worlds
    running = [await one.open(request("s", caller="k1")), await two.open(request("s-1", caller="k1"))]
    other = await one.open(request("sx", caller="k1"))
    assert not await mesh.endings[1].cancel("s", STRANGER)
    assert not any(generation.over for generation in running)
    assert await mesh.endings[1].cancel("s", MINE)
    assert [(await rest(generation))[-1] for generation in running] == [EndEvent("cancelled")] * 2
    assert not other.over
    assert not await mesh.endings[0].cancel("s", MINE), "it has ended"
    assert await mesh.endings[1].cancel("sx", ADMIN)


async def test_of_several_that_end_one_session_at_once_one_is_told_so(mesh: Mesh) -> None:
    one, _ = mesh.worlds
    generation = await one.open(request("s", caller="k1"))
    one.posted.clear()
    found = await asyncio.gather(*(mesh.endings[at].cancel("s", MINE) for at in (1, 0, 1, 0, 1)))
    assert sum(found) == 1
    assert await rest(generation) == [EndEvent("cancelled")]
    assert sorted(to for to, _ in one.take(m.Release)) == ["a", "b"], "every hop is freed, once"


async def test_one_that_has_no_owner_yet_is_ended_by_whoever_adopts_it(mesh: Mesh) -> None:
    """A 404 would be a lie: it is adopted in a moment, and would run on."""
    found = mesh.hold("s")
    assert not await mesh.endings[0].cancel("s", STRANGER), "who may not end it learns nothing of it"
    ending = asyncio.create_task(mesh.endings[0].cancel("s", MINE))
    asked = mesh.wires[1].asked
    async with asyncio.timeout(10.0):
        while asked["cancel"] < 3:  # noqa: ASYNC110 - it has said that it holds the journal
            await asyncio.sleep(0.01)
        mesh.worlds[1].entry.adopt(found)
        assert await ending
    assert mesh.worlds[1].entry.sessions() == []


async def test_what_not_all_have_denied_and_nobody_ends_is_to_be_asked_again(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "FIND_S", 0.3)
    mesh.wires[0].silent.add("a")
    with pytest.raises(PeerUnreachable):
        await mesh.endings[0].cancel("s", MINE)
    await mesh.worlds[1].open(request("s", caller="k1"))
    assert await mesh.endings[0].cancel("s", MINE), "who owns it has ended it"
    mesh.hold("t")
    with pytest.raises(PeerUnreachable):
        await mesh.endings[1].cancel("t", MINE)


async def test_that_it_was_ended_is_known_to_who_looks_for_it_later(mesh: Mesh) -> None:
    """A reader that lost its connection, a repeated request, a holder that comes back with the journal on its disk: all
    of them would run it again if nobody knew it."""
    one, _ = mesh.worlds
    generation = await one.open(request("s", caller="k1", priority="batch", idempotency_key="k"))
    one.draw(generation, 20)
    assert await mesh.endings[1].cancel("s", MINE)
    assert await mesh.relays[1].find("s", 0.0) == "one"
    reading = await mesh.relays[0].attach("s", 0.0)
    assert reading is not None
    assert [type(event).__name__ for event in await rest(reading)] == ["TokenEvent", "EndEvent"]  # type: ignore[arg-type]
    assert one.entry.batch() == [], "nothing of it stays on the disk"


async def test_who_only_went_away_may_ask_again(mesh: Mesh) -> None:
    generation = await mesh.worlds[0].open(request("s", caller="k1"))
    await generation.cancel("disconnected")
    assert generation.over
    assert await mesh.relays[1].find("s", 0.0) is None


async def test_a_wish_that_is_none_is_the_peers_fault(mesh: Mesh) -> None:
    with pytest.raises(PeerError):
        await mesh.wires[1].door.verbs["cancel"]("one", msgspec.msgpack.encode("s"))
