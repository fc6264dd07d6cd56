"""The stage between its core and the engine: what is asked, what is answered, and whose credit waits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mesh.core import Rejected, Send
from mesh.errors import CapacityError, ConfigError
from mesh.pipeline import messages as m
from mesh.pipeline.prefix import Pages
from mesh.pipeline.stage import StageConfig
from mesh.types import Hop, LayerSpan, Route, SamplingParams
from node import stage
from node.engine.sequence import Result, Sampled, SequenceSpec, Work
from node.stage import StageService

ME, OWNER, PLACEMENT = "me", "owner", (1, 5)
PROMPT = (10, 11, 12, 13)
ROW = 4


class FakeEngine:
    """Notes its verbs; ``refuses`` is raised by the next ``open``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.refuses: Exception | None = None
        self.on_results: Any = None
        self.excess = 0

    def page_bytes(self, key: str, size: int) -> int:
        return 10 * size

    def keep_pages(self, key: str, size: int, pages: Any) -> None:
        self.calls.append(("keep", (key, size, pages)))

    def take_pages(self, key: str, size: int, pages: Any) -> None:
        self.calls.append(("take", (key, size, pages)))

    def drop_pages(self, pages: Any) -> None:
        self.calls.append(("drop", pages))

    def open(self, spec: SequenceSpec) -> int:
        if self.refuses:
            raise self.refuses
        self.calls.append(("open", spec))
        return spec.max_positions

    def submit(self, work: Work) -> None:
        self.calls.append(("submit", work))

    def truncate(self, key: str, length: int) -> None:
        self.calls.append(("truncate", (key, length)))

    def close(self, key: str) -> None:
        self.calls.append(("close", key))


class Frame:
    """A received frame whose credit is owed."""

    def __init__(self) -> None:
        self.given = 0

    def done(self) -> None:
        self.given += 1


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.engine = FakeEngine()
        self.sent: list[Send] = []
        self.events: list[Any] = []
        self.service = StageService(ME, self.engine, self.sent.append, self.events.append, clock=lambda: self.now)
        self.service.activate(PLACEMENT)
        self.service.set_spans([LayerSpan("toy", 0, 6)])

    def open(self, at: int, hops: int = 3, session: str = "s", counter: int = 1, chain: tuple[bytes, ...] = ()) -> None:
        nodes = [ME if index == at else f"hop{index}" for index in range(hops)]
        request = m.SessionRequest(model="toy", prompt=PROMPT, sampling=SamplingParams(max_tokens=8))
        message = m.Open(
            session,
            (counter, OWNER),
            route=Route("toy", tuple(Hop(node, 2 * i, 2 * i + 2) for i, node in enumerate(nodes))),
            hop=at,
            placement_id=PLACEMENT,
            max_positions=12,
            priority="batch",
            accepted=4,
            request=request if at in (0, hops - 1) else None,
            chain=chain,
        )
        self.service.receive(message, OWNER)

    def forward(self, start: int, n: int, session: str = "s", counter: int = 1) -> None:
        payload = memoryview(bytes(n * ROW))
        self.service.receive(m.Forward(session, (counter, OWNER), start, n, payload), "hop0")

    def result(self, start: int, n: int, **more: Any) -> Result:
        fields = {"hidden": memoryview(bytes(n * ROW))} | more
        return Result("s#1", more.pop("tag", 0), start, n, **{k: v for k, v in fields.items() if k != "tag"})

    def take(self) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
        """What the engine was told and what was sent since the last time."""
        told, sent = self.engine.calls, [(send.to, send.message) for send in self.sent]
        self.engine.calls = []
        self.sent.clear()
        return told, sent


@pytest.fixture
async def world() -> Any:
    made = World()
    yield made
    made.service.stop()


async def test_opening_reserves_and_answers(world: World) -> None:
    world.open(1)
    spec = SequenceSpec("s#1", "toy", 2, 4, 12, "batch", 3)
    answers = [(OWNER, m.Opened("s", (1, OWNER), 1, 0)), ("hop0", m.Gap("s", (1, OWNER), 0))]
    assert world.take() == ([("open", spec)], answers)


async def test_the_sampler_learns_how_to_draw(world: World) -> None:
    world.open(2)
    ((_, spec),), _ = world.take()
    assert (spec.sampling, spec.tokens, spec.hops) == (SamplingParams(max_tokens=8), PROMPT, 3)


async def test_the_engines_answer_comes_before_what_is_left(world: World) -> None:
    """Reserve, its answer, then the work that the answer asks for: in this order."""
    world.open(0)
    told, sent = world.take()
    assert [verb for verb, _ in told] == ["open", "submit"]
    assert told[1][1] == Work("s#1", 0, 0, 4, PROMPT)
    assert [type(message) for _, message in sent] == [m.Opened]


async def test_shared_pages_are_kept_and_taken_and_go_when_the_engine_needs_their_room(world: World) -> None:
    world.service.core.config = StageConfig(page=2)
    world.service.core.pages = Pages(2)
    world.open(1, chain=(b"a", b"b"))
    world.forward(0, 4)
    world.take()
    world.service.on_results([world.result(0, 4)])
    assert world.take()[0] == [("keep", ("s#1", 2, ((0, 1), (2, 2))))]
    assert world.service.kept()["memory_bytes"] == world.service.core.pages.row_bytes == 4 * ROW, "the session's own"
    world.open(1, session="t", chain=(b"a", b"b"))
    assert [told for told in world.take()[0] if told[0] != "open"] == [("take", ("t#2", 2, (1, 2)))]
    world.engine.excess = 21
    world.open(1, session="u")
    assert [told for told in world.take()[0] if told[0] != "open"] == [("drop", (2, 1))]


@pytest.mark.parametrize(
    ("error", "code", "retry_after_s"),
    [(CapacityError("full", 4.0), "busy", 4.0), (ConfigError("layers are gone"), "not_held", 0.5)],
)
async def test_what_the_engine_refuses(error: Exception, code: str, retry_after_s: float, world: World) -> None:
    world.engine.refuses = error
    world.open(1)
    assert world.take() == ([], [(OWNER, m.Refused("s", (1, OWNER), 1, code, str(error), retry_after_s))])
    assert world.service.core.sessions() == []


async def test_a_bug_of_the_engine_is_not_a_refusal(world: World) -> None:
    world.engine.refuses = AssertionError("a bug")
    with pytest.raises(AssertionError):
        world.open(1)


async def test_hidden_states_go_to_the_engine_and_results_on(world: World) -> None:
    world.open(1)
    world.service.receive(m.Gap("s", (1, OWNER), 0), "hop2")
    world.take()
    world.forward(0, 3)
    assert world.take() == ([("submit", Work("s#1", 0, 0, 3, (), memoryview(bytes(12))))], [])
    world.engine.on_results([world.result(0, 2), world.result(2, 1)])
    _, sent = world.take()
    assert [(to, x.start, x.n) for to, x in sent] == [("hop2", 0, 2), ("hop2", 2, 1)]


async def test_a_drawn_token_keeps_its_scores(world: World) -> None:
    world.open(2)
    world.service.receive(m.Forward("s", (1, OWNER), 0, 4, memoryview(bytes(4 * ROW))), "hop1")
    world.take()
    scores = ((-0.5, ()),)
    world.engine.on_results(
        [world.result(0, 4, hidden=None, sampled=Sampled(4, 30, -0.25, ((30, -0.25),)), prompt_logprobs=scores)]
    )
    _, sent = world.take()
    assert sent == [
        (OWNER, m.PromptLogprobs("s", (1, OWNER), 1, scores)),
        (OWNER, m.Token("s", (1, OWNER), 4, 30, -0.25, ((30, -0.25),))),
        ("hop0", m.Feed("s", (1, OWNER), 4, (30,))),
    ]


async def test_an_engines_error_reaches_the_owner_and_closes_the_sequence(world: World) -> None:
    world.open(1)
    world.forward(0, 1)
    world.take()
    world.engine.on_results([world.result(0, 1, error="bad rows")])
    assert world.take() == ([("close", "s#1")], [(OWNER, m.Refused("s", (1, OWNER), 1, "failed", "bad rows"))])


async def test_resuming_truncates_and_releasing_closes(world: World) -> None:
    world.open(1)
    world.forward(0, 3)
    world.engine.on_results([world.result(0, 3)])
    world.take()
    world.open(1, counter=2)
    assert world.take()[0] == [("truncate", ("s#1", 3))]
    world.service.receive(m.Release("s", (2, OWNER)), OWNER)
    assert world.take()[0] == [("close", "s#1")]


async def test_what_is_no_business_of_the_engine_goes_to_the_node(world: World) -> None:
    world.open(1)
    world.service.receive(m.Gap("s", (1, OWNER), 0), "stranger")
    assert [(type(event), event.sender) for event in world.events] == [(Rejected, "stranger")]


async def test_the_lease_is_watched(world: World) -> None:
    """The alarm rings by the loop's timers, the core counts by its clock."""
    world.open(1)
    core = world.service.core
    assert world.service._alarm._handle is not None
    world.now += core.config.lease_s + core.config.sweep_s + 1.0
    freed = asyncio.Event()
    world.engine.close = lambda key: freed.set()  # type: ignore[method-assign]
    world.service._alarm.stop()
    world.service._alarm.update()
    await asyncio.wait_for(freed.wait(), 5.0)


# -- credit ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows may wait in the engine's queue."""
    monkeypatch.setattr(stage, "PENDING_BYTES", 4 * ROW)


def credit(world: World) -> Frame:
    frame = Frame()
    world.service.credit(frame)  # type: ignore[arg-type]
    return frame


@pytest.mark.usefixtures("small")
async def test_a_sender_gets_credit_when_the_engine_has_caught_up(world: World) -> None:
    world.open(1)
    world.forward(0, 4)
    assert credit(world).given == 1
    world.forward(4, 3)
    first, second = credit(world), credit(world)
    assert (world.service.pending_bytes, first.given, second.given) == (7 * ROW, 0, 0)
    world.engine.on_results([world.result(0, 2)])
    assert (world.service.pending_bytes, first.given) == (5 * ROW, 0)
    world.engine.on_results([world.result(2, 2)])
    assert (world.service.pending_bytes, first.given, second.given) == (3 * ROW, 1, 1)
    world.engine.on_results([world.result(4, 3)])
    assert world.service.pending_bytes == 0


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("end", ["release", "resume", "error"])
async def test_credit_does_not_wait_for_work_that_is_void(end: str, world: World) -> None:
    world.open(1)
    world.forward(0, 8)
    frame = credit(world)
    if end == "release":
        world.service.receive(m.Release("s", (1, OWNER)), OWNER)
    elif end == "resume":
        world.open(1, counter=2)
    else:
        world.engine.on_results([world.result(0, 8, error="bad rows")])
    assert world.service.pending_bytes == 0
    world.engine.on_results([])
    assert frame.given == 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("end", ["release", "resume"])
async def test_credit_is_given_though_the_engine_has_nothing_left_to_do(end: str, world: World) -> None:
    """No result will come for what was given up: the sender must not wait for one."""
    world.open(1)
    world.forward(0, 8)
    frame = credit(world)
    if end == "release":
        world.service.receive(m.Release("s", (1, OWNER)), OWNER)
    else:
        world.open(1, counter=2)
    assert frame.given == 1


@pytest.mark.usefixtures("small")
async def test_results_of_another_life_do_not_count(world: World) -> None:
    world.open(1)
    world.forward(0, 8)
    world.open(1, counter=2)
    world.forward(0, 3, counter=2)
    world.engine.on_results([world.result(0, 8)])
    assert world.service.pending_bytes == 3 * ROW
