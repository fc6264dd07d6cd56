"""Sessions as the API sees them: opening, streaming, ending, breaking, and what is routed where."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from mesh.core import Rejected, Send
from mesh.errors import CapacityError, Leaving, MeshError, NoRoute, RequestError, SessionLost
from mesh.pipeline import messages as m
from mesh.pipeline import session as core
from mesh.pipeline.journal import Adopt
from mesh.types import Hop, ModelId, Route, SamplingParams
from mesh.view import MemberView, MeshView
from node import entry as module
from node import generation as generations
from node.api.service import EndEvent, GenerationRequest, PromptEvent, TokenEvent
from node.entry import Entry
from node.generation import LiveGeneration
from tests.mesh.views import member, view

PROMPT = (1, 2, 3, 4, 5, 6)
STOP = 7


def request(session: str = "s", **more: Any) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=more.pop("max_tokens", 4), stop_token_ids=(STOP,))
    fields = {"request_id": "r", "model": ModelId("m"), "prompt": PROMPT, "sampling": sampling}
    return GenerationRequest(session=session, **(fields | more))


class World:
    """An entry over a view; hops answer what the test makes them answer."""

    def __init__(self, *members: MemberView) -> None:
        self.now = 100.0
        self.seen: MeshView = view(*(members or (member("a", (0, 4)), member("b", (4, 8)))))
        self.posted: list[Send] = []
        self.events: list[Any] = []
        self.recovered: list[Any] = []
        self.entry = Entry(
            "me",
            view=lambda: self.seen,
            post=self.posted.append,
            on_event=self.events.append,
            balance="latency",
            rng=random.Random(1),
            clock=lambda: self.now,
            on_recovered=lambda generation, trace: self.recovered.append(trace),
        )

    def take(self, kind: type) -> list[tuple[str, Any]]:
        """What was posted of ``kind``; forgets everything posted."""
        found = [(send.to, send.message) for send in self.posted if isinstance(send.message, kind)]
        self.posted.clear()
        return found

    def say(self, message: Any, sender: str) -> None:
        self.entry.receive(message, sender)

    def answer_opens(self) -> list[str]:
        """Every hop that was asked to open does; returns them."""
        asked = self.take(m.Open)
        for to, message in asked:
            self.say(m.Opened(message.session, message.epoch, message.hop, 0), to)
        return [to for to, _ in asked]

    def refuse(self, index: int, code: Any, why: str = "full", retry_after_s: float = 1.0) -> None:
        to, message = self.take(m.Open)[index]
        self.say(m.Refused(message.session, message.epoch, message.hop, code, why, retry_after_s), to)

    async def open(self, asked: GenerationRequest | None = None) -> LiveGeneration:
        opening = asyncio.create_task(self.entry.open(asked or request()))
        await asyncio.sleep(0)
        self.answer_opens()
        return await opening

    def draw(self, generation: LiveGeneration, *tokens: int) -> None:
        session = generation.session
        for token in tokens:
            message = m.Token(session.id, session.epoch, session.accepted, token, -0.5, ((token, -0.5),))
            self.say(message, session.route.hops[-1].node)

    def scores(self, generation: LiveGeneration, start: int, n: int) -> None:
        session = generation.session
        rows = tuple((float(-position), ((position, 0.0),)) for position in range(start, start + n))
        self.say(m.PromptLogprobs(session.id, session.epoch, start, rows), session.route.hops[-1].node)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    for generation in made.entry.sessions():
        generation.finish("cancelled")


async def rest(generation: LiveGeneration, got: list[Any] | None = None) -> list[Any]:
    """Everything up to the end; in ``got`` too, should it break."""
    got = [] if got is None else got
    async with asyncio.timeout(5.0):
        async for event in generation:
            got.append(event)
    return got


def waiting(generation: LiveGeneration) -> list[Any]:
    """Events that are there already."""
    found = []
    while generation._log:
        found.append(generation._log.pop(0))
    return found


# -- opening -----------------------------------------------------------------------------------------------------------


async def test_open_returns_when_every_hop_has_room(world: World) -> None:
    opening = asyncio.create_task(world.entry.open(request()))
    await asyncio.sleep(0)
    (first, one), (second, two) = world.take(m.Open)
    assert (first, second) == ("a", "b")
    world.say(m.Opened("s", one.epoch, 0, 0), first)
    await asyncio.sleep(0)
    assert not opening.done()
    world.say(m.Opened("s", two.epoch, 1, 0), second)
    generation = await opening
    assert generation.route == "name-a:0-4,name-b:4-8"
    assert world.entry.sessions() == [generation]


async def test_the_journal_holds_the_whole_request(world: World) -> None:
    asked = request(
        priority="batch", timeout_s=9.0, max_retries=3, balance="memory", allowed_nodes=("a", "b"), prompt_logprobs=0
    )
    opening = asyncio.create_task(world.entry.open(asked))
    await asyncio.sleep(0)
    journal = world.posted[0].message.request
    assert msgspec.msgpack.decode(journal.form, type=GenerationRequest) == asked
    assert (journal.model, journal.prompt, journal.sampling) == (asked.model, asked.prompt, asked.sampling)
    assert (journal.priority, journal.timeout_s, journal.max_retries) == ("batch", 9.0, 3)
    assert (journal.balance, journal.allowed_nodes, journal.prompt_logprobs) == ("memory", ("a", "b"), True)
    opening.cancel()
    assert not module._journal(request()).prompt_logprobs


async def test_without_a_route_nothing_is_started(world: World) -> None:
    world.seen = view(member("a", (0, 4)))
    with pytest.raises(NoRoute, match=r"\[4, 8\)|4"):
        await world.entry.open(request())
    assert world.entry.sessions() == []
    assert world.posted == []


async def test_full_hops_are_a_capacity_error_and_everything_is_released(world: World) -> None:
    opening = asyncio.create_task(world.entry.open(request(max_retries=0)))
    await asyncio.sleep(0)
    world.refuse(1, "busy", "no pages", 3.0)
    with pytest.raises(CapacityError, match="no pages") as caught:
        await opening
    assert caught.value.retry_after_s == 3.0
    assert [to for to, _ in world.take(m.Release)] == ["a", "b"]
    assert world.entry.sessions() == []


async def test_a_full_hop_is_gone_around() -> None:
    world = World(member("a", (0, 4)), member("b", (4, 8)), member("c", (4, 8), rtt_ms=50.0))
    opening = asyncio.create_task(world.entry.open(request()))
    await asyncio.sleep(0)
    world.refuse(1, "busy")
    assert world.answer_opens() == ["a", "c"]
    generation = await opening
    assert generation.route == "name-a:0-4,name-c:4-8"
    generation.finish("cancelled")


async def test_a_client_that_gives_up_while_it_opens_leaves_nothing_behind(world: World) -> None:
    opening = asyncio.create_task(world.entry.open(request()))
    await asyncio.sleep(0)
    asked = world.take(m.Open)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert [to for to, _ in world.take(m.Release)] == ["a", "b"]
    assert world.entry.sessions() == []
    # The answer that was on its way: the hop holds room for a session that nobody wants.
    world.say(m.Opened("s", asked[0][1].epoch, 0, 0), "a")
    assert world.take(m.Release) == [("a", m.Release("s", asked[0][1].epoch))]


async def test_cancelling_while_it_opens_ends_the_wait(world: World) -> None:
    opening = asyncio.create_task(world.entry.open(request()))
    await asyncio.sleep(0)
    (generation,) = world.entry.sessions()
    await generation.cancel("cancelled")
    with pytest.raises(RequestError, match="cancelled"):
        await opening
    assert world.entry.sessions() == []


async def test_a_session_that_breaks_while_it_opens_is_an_error_of_open(world: World) -> None:
    opening = asyncio.create_task(world.entry.open(request(max_retries=0)))
    await asyncio.sleep(0)
    world.entry.lost("b", "reset")
    with pytest.raises(SessionLost, match="hop 1 was lost"):
        await opening
    assert world.entry.sessions() == []


# -- streaming ---------------------------------------------------------------------------------------------------------


async def test_tokens_come_in_order_and_then_the_end(world: World) -> None:
    generation = await world.open()
    world.draw(generation, 30, 31, STOP)
    events = await rest(generation)
    assert [(e.position, e.token, e.logprob, e.top) for e in events[:-1]] == [
        (6, 30, -0.5, ((30, -0.5),)),
        (7, 31, -0.5, ((31, -0.5),)),
        (8, STOP, -0.5, ((STOP, -0.5),)),
    ]
    assert events[-1] == EndEvent("stop")
    assert [to for to, _ in world.take(m.Release)] == ["a", "b"]
    assert world.entry.sessions() == []


async def test_the_length_is_an_end_too(world: World) -> None:
    generation = await world.open(request(max_tokens=2))
    world.draw(generation, 30, 31)
    assert (await rest(generation))[-1] == EndEvent("length")


@pytest.mark.parametrize("reason", ["cancelled", "disconnected"])
async def test_cancelling_ends_the_stream_after_what_came(reason: Any, world: World) -> None:
    generation = await world.open()
    world.draw(generation, 30)
    await generation.cancel(reason)
    received = await rest(generation)
    assert [type(event) for event in received] == [TokenEvent, EndEvent]
    assert received[-1] == EndEvent("cancelled")
    assert world.entry.sessions() == []
    posted = len(world.posted)
    await generation.cancel(reason)
    generation.acknowledge(6)
    assert len(world.posted) == posted


async def test_a_stop_string_is_a_stop(world: World) -> None:
    generation = await world.open()
    world.draw(generation, 30)
    await generation.cancel("stop")
    assert (await rest(generation))[-1] == EndEvent("stop")


async def test_a_session_that_breaks_raises_after_what_came(world: World) -> None:
    generation = await world.open(request(max_retries=0))
    world.draw(generation, 30)
    world.entry.lost("a", "reset")
    got: list[Any] = []
    with pytest.raises(SessionLost, match="1 of at most 4 tokens"):
        await rest(generation, got)
    assert [event.token for event in got] == [30]
    assert world.entry.sessions() == []


async def test_the_clients_progress_reaches_the_first_hop(world: World) -> None:
    generation = await world.open(request(max_tokens=100))
    world.draw(generation, *[30] * 10)
    world.posted.clear()
    for position in range(6, 16):
        generation.acknowledge(position)
    assert world.take(m.Ack) == [("a", m.Ack("s", generation.session.epoch, 14))]


async def test_a_protocols_complaint_goes_to_the_node(world: World) -> None:
    generation = await world.open()
    world.say(m.Token("s", generation.session.epoch, 6, 30), "a")
    assert [(type(event), event.sender) for event in world.events] == [(Rejected, "a")]


async def test_what_is_said_of_sessions_that_are_not_owned_here(world: World) -> None:
    world.say(m.Refused("gone", (1, "me"), 0, "failed", "x"), "a")
    assert world.posted == []
    world.say(m.Token("gone", (1, "me"), 6, 30), "a")  # this node was restarted: whoever has the journal goes on
    assert world.take(m.Disown) == [("a", m.Disown("gone", (1, "me")))]
    generation = await world.open()
    generation.finish("cancelled")
    world.posted.clear()
    world.say(m.Held("s", (1, "me"), 6), "b")
    assert world.take(m.Release) == [("b", m.Release("s", (1, "me")))]


# -- log-probabilities of the prompt -----------------------------------------------------------------------------------


def scored(events: list[Any]) -> list[tuple[int, int]]:
    """(first position, rows) of each PromptEvent; that values fit their positions is checked here."""
    for event in events:
        assert event.logprobs == tuple(float(-(event.start + i)) for i in range(len(event.logprobs)))
        assert event.tops == tuple(((event.start + i, 0.0),) for i in range(len(event.logprobs)))
    return [(event.start, len(event.logprobs)) for event in events if isinstance(event, PromptEvent)]


@pytest.mark.parametrize(
    ("chunks", "passed"),
    [
        ([(1, 5)], [(1, 5)]),
        ([(1, 2), (3, 3)], [(1, 2), (3, 3)]),
        ([(1, 2), (1, 2), (3, 3)], [(1, 2), (3, 3)]),
        ([(1, 3), (1, 5)], [(1, 3), (4, 2)]),
        ([(1, 3), (3, 3)], [(1, 3), (4, 2)]),
        ([(2, 4), (1, 5)], [(1, 5)]),
        ([(1, 5), (1, 5)], [(1, 5)]),
        ([(1, 8)], [(1, 5)]),
        ([(1, 5), (1, 8)], [(1, 5)]),
        ([(1, 5), (6, 3)], [(1, 5)]),
        ([(0, 3)], [(1, 2)]),
        ([(-5, 3)], []),
    ],
)
async def test_each_position_of_the_prompt_is_scored_once(chunks: Any, passed: Any, world: World) -> None:
    """A substitute scores again, and it scores the tokens that were drawn too: those are not the prompt's."""
    generation = await world.open(request(prompt_logprobs=1))
    for start, n in chunks:
        world.scores(generation, start, n)
    assert scored(waiting(generation)) == passed


# -- recovering --------------------------------------------------------------------------------------------------------


async def test_a_lost_hop_is_replaced_and_the_stream_goes_on() -> None:
    world = World(member("a", (0, 4)), member("b", (4, 8)), member("c", (4, 8), rtt_ms=50.0))
    generation = await world.open()
    world.draw(generation, 30)
    world.entry.lost("b", "reset")
    assert generation.recoveries == ()
    assert world.answer_opens() == ["a", "c"]
    world.now += 0.25
    world.draw(generation, 31, STOP)
    assert [e.token for e in (await rest(generation))[:-1]] == [30, 31, STOP]
    (shown,) = generation.recoveries
    assert (shown.cause, shown.hop, shown.detected_by, shown.pause_ms) == ("reset", "1", "reset", 250.0)
    assert [trace.cause for trace in world.recovered] == ["reset"]


async def test_a_lost_node_is_news_to_all_sessions_on_it() -> None:
    world = World(member("a", (0, 8)), member("b", (0, 8), rtt_ms=50.0))
    one, two = await world.open(request("s1")), await world.open(request("s2"))
    world.entry.lost("z", "dead")
    assert world.take(m.Open) == []
    world.entry.lost("a", "dead")
    assert sorted(message.session for _, message in world.take(m.Open)) == ["s1", "s2"]
    for generation in (one, two):
        generation.finish("cancelled")


async def test_the_sessions_deadline_rings(world: World) -> None:
    generation = await world.open(request(timeout_s=0.01))
    world.now += 1.0
    with pytest.raises(SessionLost, match=r"deadline of 0\.01 s"):
        await rest(generation)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("busy", CapacityError),
        ("no_route", NoRoute),
        ("session_lost", SessionLost),
        ("timeout", SessionLost),
        ("dead_end", RequestError),
    ],
)
def test_each_failure_is_an_error_of_the_tree(code: Any, kind: type[MeshError]) -> None:
    error = generations._last_of(core.Failed(code, "why", 7.0))
    assert (type(error), str(error)) == (kind, "why")
    assert isinstance(error, MeshError)
    assert error.code == {"busy": "rate_limit_exceeded", "dead_end": "grammar_dead_end"}.get(code, code)
    assert not isinstance(error, CapacityError) or error.retry_after_s == 7.0


# -- finding, leases ---------------------------------------------------------------------------------------------------


async def test_leases_are_renewed_one_message_a_peer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = await world.open(request("s1")), await world.open(request("s2"))
    turns: list[float] = []

    async def sleep(seconds: float) -> None:
        turns.append(seconds)
        if len(turns) == 2:
            raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(module.asyncio, "sleep", sleep)
        with pytest.raises(asyncio.CancelledError):
            await world.entry.renew_leases()
    held = (("s1", one.session.epoch), ("s2", two.session.epoch))
    assert world.take(m.Lease) == [("a", m.Lease(held)), ("b", m.Lease(held))]
    assert turns == [module.LEASE_EVERY_S] * 2


# -- routes ------------------------------------------------------------------------------------------------------------


async def test_the_requests_wishes_reach_the_router() -> None:
    world = World(member("a", (0, 8)), member("b", (0, 8), rtt_ms=50.0), member("c", (0, 8), rtt_ms=90.0))
    for asked, nodes in (
        (request("s1"), ["a"]),
        (request("s2", allowed_nodes=("name-c",)), ["c"]),
        (request("s3", max_layers=4), ["a", "b"]),
    ):
        opening = asyncio.create_task(world.entry.open(asked))
        await asyncio.sleep(0)
        assert sorted(to for to, _ in world.take(m.Open)) == nodes
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)


async def test_round_robin_takes_turns_and_own_sessions_count_as_load() -> None:
    world = World(member("a", (0, 8)), member("b", (0, 8)))
    for policy in ("round_robin", "least_connections"):
        routes = [(await world.open(request(f"{policy}{i}", balance=policy))).route for i in range(4)]
        assert sorted(routes) == ["name-a:0-8"] * 2 + ["name-b:0-8"] * 2
        for generation in world.entry.sessions():
            generation.finish("cancelled")


@pytest.mark.parametrize(
    ("hardware", "exact", "promise"),
    [
        (("x", "x"), (True, True), "bitwise"),
        (("x", "y"), (True, True), "tokens"),
        (("x", "x"), (True, False), "tokens"),
        (("x", "x"), (False, False), "tokens"),
    ],
)
async def test_what_a_route_promises(hardware: Any, exact: Any, promise: str) -> None:
    spans = {"a": (0, 4), "b": (4, 8)}
    made = [
        member(name, spans[name], hardware=kind, exact=passed)
        for name, kind, passed in zip(("a", "b"), hardware, exact, strict=True)
    ]
    world = World(*made)
    generation = await world.open()
    assert world.entry.exactness(generation.session.route) == promise
    world.seen = view(made[0])
    assert world.entry.exactness(generation.session.route) == "tokens", "a node that is not known promises nothing"
    assert generation.route == "name-a:0-4,b:4-8"
    generation.finish("cancelled")


async def test_a_substitute_of_the_survivors_hardware_is_preferred() -> None:
    def made(name: str, span: tuple[int, int], hardware: str, rtt_ms: float = 0.0) -> MemberView:
        return member(name, span, hardware=hardware, exact=True, rtt_ms=rtt_ms)

    nearer = made("c", (4, 8), "y", 10.0)
    world = World(made("a", (0, 4), "x"), made("b", (4, 8), "x"), nearer, made("d", (4, 8), "x", 50.0))
    generation = await world.open()
    world.draw(generation, 30)
    world.entry.lost("b", "reset")
    assert [to for to, _ in world.take(m.Open)] == ["a", "d"]
    generation.finish("cancelled")


# -- adoption ----------------------------------------------------------------------------------------------------------


def adoption(session: str = "s", drawn: tuple[int, ...] = (30, 31), **more: Any) -> Adopt:
    asked = module._journal(request(session, **more))
    return Adopt(session, (2, "gone"), Route("m", (Hop("a", 0, 4), Hop("b", 4, 8))), asked, drawn, 100.0, "reset")


async def test_an_adopted_session_is_read_from_its_first_token_on(world: World) -> None:
    world.entry.adopt(adoption())
    world.answer_opens()
    (generation,) = world.entry.sessions()
    generation.attach()
    world.draw(generation, 32, STOP)
    events = await rest(generation)
    assert [event.token for event in events[:-1]] == [30, 31, 32, STOP]
    assert events[-1] == EndEvent("stop")
    assert [(r.cause, r.hop) for r in generation.recoveries] == [("owner lost", "owner")]
    assert [event.token for event in await rest(generation) if isinstance(event, TokenEvent)] == [30, 31, 32, STOP]


async def test_a_resubmitted_session_begins_after_the_tokens_it_brings(world: World) -> None:
    opening = asyncio.create_task(world.entry.open(request(resume=(30, 31))))
    await asyncio.sleep(0)
    asked = [send.message for send in world.posted]
    assert [(x.accepted, x.drawn, x.left_s) for x in asked] == [(len(PROMPT) + 2, (30, 31), 600.0)] * 2
    kept = msgspec.msgpack.decode(asked[0].request.form, type=GenerationRequest)
    assert kept == request(), "the journal has them among its tokens, not twice"
    world.answer_opens()
    generation = await opening
    world.draw(generation, 32, 33)
    events = await rest(generation)
    assert [(event.position, event.token) for event in events[:-1]] == [(6, 30), (7, 31), (8, 32), (9, 33)]
    assert events[-1] == EndEvent("length"), "they count towards max_tokens"
    assert [(r.cause, r.hop, r.detected_by) for r in generation.recoveries] == [("resubmitted", "owner", "client")]


async def test_one_that_is_run_again_whole_is_told_as_a_recovery_too(world: World) -> None:
    """Of several choices, say, whose tokens a client does not have one by one."""
    generation = await world.open(request(rerun=True))
    world.draw(generation, 30, STOP)
    assert [event.token for event in (await rest(generation))[:-1]] == [30, STOP]
    assert [(r.cause, r.detected_by) for r in generation.recoveries] == [("resubmitted", "client")]
    kept = msgspec.msgpack.decode(generation.session.request.form, type=GenerationRequest)
    assert kept == request(), "who adopts it goes on, and runs nothing again"


async def test_a_resubmitted_session_that_lacks_nothing_ends_at_once(world: World) -> None:
    for name, drawn, reason in (("s", (30, STOP), "stop"), ("t", (30, 31, 32, 33), "length")):
        generation = await world.open(request(name, resume=drawn))
        events = await rest(generation)
        assert [event.token for event in events[:-1]] == list(drawn)
        assert events[-1] == EndEvent(reason)


@pytest.mark.parametrize("how", [{"resume": (30,)}, {"rerun": True}])
async def test_a_resubmitted_session_waits_for_layers_that_nobody_holds_yet(world: World, how: Any) -> None:
    whole, world.seen = world.seen, view(member("a", (0, 4)))
    opening = asyncio.create_task(world.entry.open(request(**how)))
    await asyncio.sleep(0)
    (waiting_one,) = world.entry.sessions()
    assert not opening.done()
    assert world.posted == []
    world.seen, world.now = whole, world.now + 5.0
    waiting_one.step(waiting_one.session.tick(world.now))
    assert world.answer_opens() == ["a", "b"]
    assert (await opening) is waiting_one


async def test_what_is_owned_here_is_not_adopted_again(world: World) -> None:
    generation = await world.open()
    world.entry.adopt(adoption())
    assert world.entry.sessions() == [generation]


async def test_an_adopted_session_waits_for_a_reader_and_then_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "ORPHAN_S", 0.01)
    world.entry.adopt(adoption())
    world.entry.adopt(adoption("batch", priority="batch"))
    async with asyncio.timeout(5.0):
        while len(world.entry.sessions()) > 1:  # noqa: ASYNC110  it ends by a timer of the loop
            await asyncio.sleep(0.01)
    assert [generation.request.priority for generation in world.entry.sessions()] == ["batch"]


async def test_a_keyed_session_outlives_its_reader_and_another_does_not(world: World) -> None:
    kept, ended = await world.open(request("kept", idempotency_key="k")), await world.open(request("ended"))
    await kept.cancel("disconnected")
    await ended.cancel("disconnected")
    assert world.entry.sessions() == [kept]


async def test_an_owner_that_yields_lets_its_readers_go_on_elsewhere(world: World) -> None:
    generation = await world.open()
    world.draw(generation, 30)
    world.say(m.Ahead("s", generation.session.epoch, (9, "x")), "b")
    assert [event.token async for event in generation] == [30], "no end: there is more at the new owner"
    assert (generation.moved, world.entry.get("s")) == (True, None)


# -- nodes that leave --------------------------------------------------------------------------------------------------


def leave(world: World, *names: str) -> None:
    """Gossip says that these are to go."""
    world.seen = msgspec.structs.replace(
        world.seen,
        members=tuple(
            msgspec.structs.replace(each, profile=msgspec.structs.replace(each.profile, draining=each.id in names))
            for each in world.seen.members
        ),
    )


@pytest.mark.parametrize(("leavers", "heir"), [((), "b"), (("b",), "a"), (("c",), "b")])
async def test_an_owner_that_leaves_gives_its_sessions_to_a_holder_that_stays(
    leavers: tuple[str, ...], heir: str, world: World
) -> None:
    generation = await world.open()
    world.draw(generation, 30)
    world.posted.clear()
    leave(world, *leavers)
    world.entry.give_away()
    told = dict(world.take(m.Disown))
    assert {to: (message.heir, message.drawn) for to, message in told.items()} == {
        to: (heir, (30,) if to == heir else ()) for to in ("a", "b")
    }
    assert (generation.moved, generation.heir, world.entry.sessions()) == (True, heir, [])
    assert [event.token async for event in generation] == [30], "the rest is at the new owner"
    # The heir may not have heard, and is told again; the others need not be, until it must have.
    ask = m.Held("s", generation.session.epoch, len(PROMPT) + 1)
    for to in ("a", "b"):
        world.say(ask, to)
    assert [(to, message.heir) for to, message in world.take(m.Disown)] == [(heir, heir)]
    world.now += module.HEIR_S
    world.say(ask, heir)
    assert [to for to, _ in world.take(m.Release)] == [heir]


async def test_what_nobody_else_holds_is_given_away_later(world: World) -> None:
    generation = await world.open()
    leave(world, "a", "b")
    world.entry.give_away()
    assert (generation.moved, world.take(m.Disown)) == (False, [])
    leave(world, "a")
    world.entry.give_away()
    assert generation.heir == "b"


async def test_the_last_node_with_the_layers_takes_a_lost_hop_over_but_is_not_moved_for_one_that_leaves() -> None:
    world = World(member("a", (0, 8)))
    ask = core.NeedRoute((Hop("a", 4, 8),), ("b",))
    assert world.entry.find_route(request(), ask).hops == (Hop("a", 0, 8),)
    with pytest.raises(NoRoute):
        world.entry.find_route(request(), ask, strict=True)


async def test_a_node_that_stops_ends_only_what_nobody_else_can_go_on_with(world: World) -> None:
    running = await world.open()
    opening = asyncio.create_task(world.entry.open(request("young")))
    await asyncio.sleep(0)
    world.posted.clear()
    world.entry.stop()
    released = {message.session for send in world.posted if isinstance(message := send.message, m.Release)}
    assert (running.heir, running.over, released) == ("b", True, {"young"})
    with pytest.raises(Leaving):
        await opening
    assert world.entry.sessions() == []


async def test_a_hop_that_is_to_go_is_moved_to_a_node_that_stays() -> None:
    world = World(
        member("a", (0, 4)), member("b", (4, 8)), member("c", (4, 8), rtt_ms=50.0), member("d", (4, 8), rtt_ms=90.0)
    )
    generation = await world.open()
    world.draw(generation, 30)
    world.posted.clear()
    vacate = m.Vacate("s", generation.session.epoch, 1)
    leave(world, "b", "c", "d")
    world.say(vacate, "b")
    assert (world.take(m.Prepare), world.take(m.Open)) == ([], []), "it stays where it is as long as it can"
    leave(world, "b", "c")
    world.say(vacate, "b")
    ((to, asked),) = world.take(m.Prepare)
    assert (to, asked.source, [hop.node for hop in asked.route.hops]) == ("d", "b", ["a", "d"])
    world.say(m.Arrived("s", asked.epoch, 1, len(PROMPT), True), "d")
    assert world.answer_opens() == ["a", "d"]
    world.draw(generation, STOP)
    await rest(generation)
    assert [(trace.cause, trace.detected_by) for trace in generation.recoveries] == [("moved", "planned")]


async def test_results_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESULT_BYTES", (len(PROMPT) + 4) * generations.TOKEN_BYTES + 2 * generations.TOP_BYTES)
    for name in ("one", "two", "three"):
        world.draw(await world.open(request(name)), 30, STOP)
    assert [world.entry.get(name) is not None for name in ("one", "two", "three")] == [False, False, True]
    world.now += module.RESULT_S + 1.0
    world.draw(await world.open(request("four")), STOP)
    assert world.entry.get("three") is None


async def test_log_probabilities_count_among_what_results_take(world: World) -> None:
    generation = await world.open()
    before = generation.bytes
    top = tuple((token, -1.0) for token in range(20))
    world.say(m.Token("s", generation.session.epoch, generation.session.accepted, 30, -1.0, top), "b")
    assert generation.bytes - before == generations.TOKEN_BYTES + 20 * generations.TOP_BYTES


async def test_a_prompt_that_no_frame_can_carry_is_refused_before_anything_begins(world: World) -> None:
    """It goes to both ends of the route with every token, twice: in its form, too."""
    prompt = tuple(range(100_000, 600_000))
    with pytest.raises(RequestError, match="500000 tokens in the prompt") as refused:
        await world.entry.open(request(prompt=prompt))
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert (world.entry.sessions(), world.posted) == ([], [])


async def test_a_form_of_another_version_is_rejected_and_costs_nobody_else_anything(world: World) -> None:
    found = adoption()
    world.entry.adopt(msgspec.structs.replace(found, request=msgspec.structs.replace(found.request, form=b"")))
    assert world.entry.sessions() == []
    assert [type(event) for event in world.events] == [Rejected]


async def test_a_repeat_while_the_first_still_opens_reads_the_same_session(world: World) -> None:
    first = asyncio.create_task(world.entry.open(request()))
    await asyncio.sleep(0)
    second = asyncio.create_task(world.entry.open(request()))
    third = asyncio.create_task(world.entry.open(request()))
    await asyncio.sleep(0)
    third.cancel()
    await asyncio.wait({third})
    world.answer_opens()
    assert await first is await second
    world.draw(await first, STOP)
    assert await rest(await second) == await rest(await first)


async def test_a_refusal_is_no_answer_to_keep_under_the_key(world: World) -> None:
    opening = asyncio.create_task(world.entry.open(request()))
    await asyncio.sleep(0)
    for _ in range(request().max_retries + 1):
        if world.entry.get("s") is not None and any(isinstance(send.message, m.Open) for send in world.posted):
            world.refuse(0, "busy")
    with pytest.raises(MeshError):
        await opening
    assert world.entry.get("s") is None
    generation = await world.open()
    world.draw(generation, STOP)
    assert world.entry.get("s") is generation


async def test_the_witness_is_a_node_that_the_request_allows() -> None:
    world = World(member("me", (0, 8)), *(member(name, (0, 8)) for name in ("a", "b", "c")))
    alone = Route("m", (Hop("me", 0, 8),))
    for number in range(8):
        asked = request(f"s{number}", allowed_nodes=("me", "b"))
        assert world.entry.witness(asked, alone, ()) == "b"
        assert world.entry.witness(asked, alone, ("b",)) is None
