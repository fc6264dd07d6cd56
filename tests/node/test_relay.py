"""Reading a session at another node: what a frame is, and what silence means."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, cast
from unittest import mock

import msgspec
import pytest
from aiohttp import ClientSession, StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import TestServer

from mesh.errors import Leaving, PeerError, PeerUnreachable
from mesh.pipeline import events as core
from mesh.pipeline import messages as m
from mesh.types import NodeId
from node import relay
from node.api.service import EndEvent, PromptEvent, TokenEvent
from node.endings import Found
from node.generation import LiveGeneration
from node.peers import Peers
from tests.mesh.views import member
from tests.node.test_entry import STOP, World, request


def content() -> StreamReader:
    return StreamReader(mock.create_autospec(BaseProtocol, instance=True), 1 << 16, loop=asyncio.get_running_loop())


async def test_frames_come_back_as_they_were_written() -> None:
    stream, steps = content(), [relay.Step(token=TokenEvent(3, 7, -0.5, ())), relay.Step(end=EndEvent("stop"))]
    stream.feed_data(b"".join(map(relay._framed, steps)))
    assert [await relay._read_frame(stream) for _ in steps] == steps


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\x09half"])
async def test_an_owner_that_falls_silent_anywhere_in_a_frame_is_given_up(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "SILENT_S", 0.01)
    stream = content()
    stream.feed_data(sent)
    with pytest.raises(TimeoutError):
        await relay._read_frame(stream)


async def test_a_frame_has_a_limit() -> None:
    stream = content()
    stream.feed_data(b"\xff\xff\xff\xff")
    with pytest.raises(PeerError, match="too large"):
        await relay._read_frame(stream)


# -- two nodes ---------------------------------------------------------------------------------------------------------


class Door:
    """What a relay serves, by HTTP without TLS."""

    def __init__(self) -> None:
        self.verbs: dict[str, Any] = {}
        self.app = web.Application()

    def on_rpc(self, verb: str, handler: Any) -> None:
        self.verbs[verb] = handler

    def add_get(self, path: str, handler: Any) -> None:
        self.app.router.add_get(path, handler)


class Wire:
    """A node's peers, by the others' doors."""

    def __init__(self, me: str, wires: dict[str, Wire]) -> None:
        self.me, self._wires, self.door = me, wires, Door()
        self.asked: Counter[str] = Counter()
        self.silent: set[str] = set()
        wires[me] = self

    async def start(self) -> None:
        self.server = TestServer(self.door.app)
        await self.server.start_server()
        self.http = ClientSession()

    async def stop(self) -> None:
        await self.http.close()
        await self.server.close()

    async def request(self, node: str, verb: str, payload: bytes, timeout_s: float) -> bytes:
        if node in self.silent:
            raise PeerUnreachable("busy")
        if node not in self._wires:
            return msgspec.msgpack.encode({"owner": relay.UNKNOWN, "cancel": Found()}[verb])  # a hop of the test
        self._wires[node].asked[verb] += 1
        return bytes(await self._wires[node].door.verbs[verb](self.me, payload))

    def get(self, node: str, path: str, params: Any, *, lasting: bool) -> Any:
        return self.http.get(self._wires[node].server.make_url(path))


class Two:
    """``owner`` owns the sessions, ``reader`` has the clients."""

    def __init__(self) -> None:
        self.world = World(member("owner"), member("reader"), member("a", (0, 4)), member("b", (4, 8)))
        self.other = World()
        self.other.seen = self.world.seen
        wires: dict[str, Wire] = {}
        self.wires = [Wire("owner", wires), Wire("reader", wires)]
        owner, reader = (cast(Peers, wire) for wire in self.wires)
        self.held: set[str] = set()
        """Sessions whose journals ``owner`` holds."""
        holds = self.held.__contains__
        self.owner = relay.Relay(NodeId("owner"), self.world.entry, owner, lambda: self.world.seen, holds)
        self.reader = relay.Relay(NodeId("reader"), self.other.entry, reader, lambda: self.world.seen, lambda _: False)

    async def read(self, generation: LiveGeneration) -> relay.Reading:
        reading = await self.reader.attach(generation.session.id, 5.0)
        assert reading is not None
        return reading


@pytest.fixture
async def two() -> AsyncIterator[Two]:
    made = Two()
    for wire in made.wires:
        await wire.start()
    yield made
    for generation in made.world.entry.sessions():
        generation.finish("cancelled")
    for wire in made.wires:
        await wire.stop()


async def take(reading: relay.Reading, count: int) -> tuple[list[Any], AsyncIterator[Any]]:
    """The first events of ``reading``, and the rest of it."""
    events = reading.__aiter__()
    async with asyncio.timeout(10.0):
        return [await anext(events) for _ in range(count)], events


async def rest(events: AsyncIterator[Any]) -> list[Any]:
    async with asyncio.timeout(10.0):
        return [event async for event in events]


async def test_a_stream_that_is_read_elsewhere_is_the_same_and_says_what_was_cached(two: Two) -> None:
    opening = asyncio.create_task(two.world.entry.open(request()))
    await asyncio.sleep(0)
    for hop, message in two.world.take(m.Open):
        two.world.say(m.Opened("s", message.epoch, message.hop, 4, 4), hop)
    generation = await opening
    reading = await two.read(generation)
    assert reading.route == generation.route != ""
    two.world.draw(generation, 20, 21)
    first, events = await take(reading, 2)
    two.world.draw(generation, STOP)
    assert [event.token for event in first] == [20, 21]
    assert (await rest(events))[-1] == EndEvent("stop")
    assert reading.cached_tokens == generation.cached_tokens == 4


async def test_a_reader_that_goes_away_is_no_fault(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    generation = await two.world.open(request(max_tokens=400))
    answer = await two.wires[1].get("owner", "/peer/sessions/s?tokens=0", {}, lasting=True)
    assert isinstance(await relay._read_frame(answer.content), relay.Facts)
    await generation.cancel("disconnected")  # whoever asked is gone, too
    assert not generation.over
    answer.close()
    async with asyncio.timeout(20.0):
        while not generation.over:
            two.world.draw(generation, 20)
            await asyncio.sleep(0.01)
    assert len(generation.session.drawn) < 400, "it ended since nobody reads it"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_who_leaves_sends_those_on_that_go_on_by_themselves_and_later_all(two: Two) -> None:
    plain = await two.world.open(request("plain", max_tokens=9))
    keen = await two.world.open(request("keen", max_tokens=9, follows=True))
    readings = [await two.read(generation) for generation in (plain, keen)]
    for generation in (plain, keen):
        two.world.draw(generation, 20)
    (_, ofplain), (_, ofkeen) = [await take(reading, 1) for reading in readings]
    two.reader.leave()
    with pytest.raises(Leaving, match="/v1/sessions/keen/events"):
        await rest(ofkeen)
    two.world.draw(plain, 21)
    assert (await anext(ofplain)).token == 21
    two.reader.leave(now=True)
    with pytest.raises(Leaving, match="session plain goes on at the others"):
        await rest(ofplain)
    assert two.reader.readers == 0


async def test_a_session_that_nobody_has_is_not_found(two: Two) -> None:
    assert await two.reader.attach("nowhere", 0.0) is None


async def test_a_session_whose_journal_is_held_is_waited_for(two: Two) -> None:
    two.held.add("s")
    attaching = asyncio.create_task(two.reader.attach("s", 0.0))
    asked = two.wires[0].asked
    async with asyncio.timeout(10.0):
        while asked["owner"] < 2:  # noqa: ASYNC110 - the first answer was that nobody owns it
            await asyncio.sleep(0.01)
        await two.world.open(request())
        reading = await attaching
    assert reading is not None


async def test_a_journal_that_nobody_adopts_from_is_not_waited_for_without_end(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "FIND_S", 0.3)
    two.held.add("s")
    async with asyncio.timeout(10.0):
        with pytest.raises(PeerUnreachable):
            await two.reader.attach("s", 0.0)
    assert two.wires[0].asked["owner"] > 1


async def test_what_not_all_have_denied_is_not_said_to_be_gone(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "FIND_S", 0.3)
    two.wires[1].silent.add("a")
    with pytest.raises(PeerUnreachable, match="not all nodes"):
        await two.reader.attach("s", 0.0)
    await two.world.open(request())
    assert await two.reader.attach("s", 0.0) is not None, "who has it has said so"


async def test_a_reader_of_a_session_that_not_all_have_denied_goes_on_looking(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = await two.world.open(request())
    reading = await two.read(generation)
    two.wires[1].silent.update({"owner", "a"})
    monkeypatch.setattr(relay, "FIND_S", 0.2)
    tokens = asyncio.create_task(take(reading, 1))
    await asyncio.sleep(0.5)  # two looks that find nobody
    two.wires[1].silent.clear()
    two.world.draw(generation, 20)
    (first,), _ = await tokens
    assert first.token == 20


async def test_a_reader_is_told_when_some_never_answer(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = await two.read(await two.world.open(request()))
    two.wires[1].silent.update({"owner", "a"})
    monkeypatch.setattr(relay, "FIND_S", 0.01)
    with pytest.raises(PeerUnreachable, match="not all nodes"):
        await take(reading, 1)


async def test_recoveries_are_told_before_the_token_that_may_be_the_last(two: Two) -> None:
    generation = await two.world.open(request())
    reading = await two.read(generation)
    two.world.draw(generation, 20)
    generation.session.recoveries.append(core.Recovery("reset", 1, "reset", 90.0, 4, "bitwise"))
    two.world.draw(generation, 21)
    _, events = await take(reading, 2)
    assert [(told.cause, told.hop) for told in reading.recoveries] == [("reset", "1")]
    two.world.draw(generation, STOP)
    await rest(events)
    assert len(reading.recoveries) == 1, "each once"
    reading._tell(NodeId("owner"), reading.recoveries, 0)  # read again, from the same owner
    assert len(reading.recoveries) == 1


async def test_an_owner_that_goes_while_it_is_asked_is_looked_for_again(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    await two.world.open(request())
    get, gone = two.wires[1].get, [PeerUnreachable("reset")]

    def reset_once(*asked: Any, **how: Any) -> Any:
        if gone:
            raise gone.pop()
        return get(*asked, **how)

    monkeypatch.setattr(two.wires[1], "get", reset_once)
    async with asyncio.timeout(10.0):
        reading = await two.reader.attach("s", 0.0)
    assert reading is not None
    assert not gone


async def test_log_probabilities_of_the_prompt_come_once_whatever_breaks_off(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader without a token is given the log from its beginning again, by this owner or the next."""
    generation = await two.world.open(request(prompt_logprobs=0))
    reading = await two.read(generation)
    two.world.scores(generation, 1, 3)
    first, events = await take(reading, 1)
    broken, read = [PeerUnreachable("reset")], two.wires[1].get

    def reset_once(*asked: Any, **how: Any) -> Any:
        if broken:
            raise broken.pop()
        return read(*asked, **how)

    monkeypatch.setattr(two.wires[1], "get", reset_once)
    for response in list(two.reader._open):
        response.close()
    two.world.scores(generation, 4, 2)
    two.world.draw(generation, 20, STOP)
    scored = [event for event in [*first, *await rest(events)] if isinstance(event, PromptEvent)]
    assert [(event.start + at, value) for event in scored for at, value in enumerate(event.logprobs)] == [
        (position, float(-position)) for position in range(1, 6)
    ]
