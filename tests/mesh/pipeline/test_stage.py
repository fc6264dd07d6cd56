"""Every transition of a hop's session: what it asks of the engine, what it sends, what it refuses to believe."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.core import Effect, Emit, Rejected, Send
from mesh.pipeline import messages as m
from mesh.pipeline import stage as s
from mesh.pipeline import work as t
from mesh.types import Hop, LayerSpan, Route, SamplingParams

OWNER, ME, STRANGER = "owner", "me", "stranger"
PLACEMENT = (1, 5)
PROMPT = (10, 11, 12, 13)
MAX_TOKENS = 60
ROW = 4

Events = list[Any]


def route(at: int, hops: int = 3) -> Route:
    """This node at hop ``at``, two layers a hop."""
    nodes = [ME if index == at else f"hop{index}" for index in range(hops)]
    return Route("toy", tuple(Hop(node, 2 * index, 2 * index + 2) for index, node in enumerate(nodes)))


def request(max_tokens: int = MAX_TOKENS, stop: tuple[int, ...] = (), scored: bool = False) -> m.SessionRequest:
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop)
    return m.SessionRequest(model="toy", prompt=PROMPT, sampling=sampling, prompt_logprobs=scored)


def opening(at: int, counter: int = 1, drawn: tuple[int, ...] = (), hops: int = 3, **more: Any) -> m.Open:
    ends = at in (0, hops - 1)
    ask = more.pop("ask", request())
    fields: dict[str, Any] = {
        "route": route(at, hops),
        "hop": at,
        "placement_id": PLACEMENT,
        "max_positions": ask.max_positions,
        "priority": "normal",
        "accepted": len(PROMPT) + len(drawn),
        "request": ask if ends else None,
        "drawn": drawn if ends else (),
    }
    return m.Open(more.pop("session", "s"), (counter, OWNER), **{**fields, **more})


def rows(start: int, n: int) -> memoryview:
    return memoryview(b"".join(bytes([position % 256]) * ROW for position in range(start, start + n)))


def sends(effects: list[Effect]) -> list[tuple[str, Any]]:
    return [(effect.to, effect.message) for effect in effects if isinstance(effect, Send)]


def events(effects: list[Effect]) -> Events:
    return [effect.event for effect in effects if isinstance(effect, Emit)]


def only(effects: list[Effect], kind: type) -> Any:
    found = [x for x in [*events(effects), *(message for _, message in sends(effects))] if isinstance(x, kind)]
    assert len(found) == 1, (kind, effects)
    return found[0]


def rejected(effects: list[Effect], sender: str) -> bool:
    """Nothing but a complaint about ``sender``."""
    return (
        [type(event) for event in events(effects)] == [Rejected]
        and not sends(effects)
        and (only(effects, Rejected).sender == sender)
    )


class Hopper:
    """One hop of one session, with an engine that has room and answers when told to."""

    def __init__(
        self,
        at: int,
        hops: int = 3,
        config: s.StageConfig | None = None,
        core: s.StageCore | None = None,
        session: str = "s",
        page_bytes: int = 0,
        **more: Any,
    ) -> None:
        self.at, self.epoch, self.session, self.page_bytes = at, (1, OWNER), session, page_bytes
        self.core = core or s.StageCore(ME, config)
        self.core.activate(PLACEMENT)
        self.core.set_spans([LayerSpan("toy", 0, 2 * hops)])
        self.work: list[t.Compute] = []
        self.before, self.behind = f"hop{(at - 1) % hops}", f"hop{(at + 1) % hops}"
        self.opened = self.open(opening(at, hops=hops, session=session, **more))

    def note(self, effects: list[Effect]) -> list[Effect]:
        for event in events(effects):
            if isinstance(event, t.Compute):
                self.work.append(event)
            elif isinstance(event, t.Truncate | s.Free):
                self.work.clear()
        return effects

    def open(self, message: m.Open, now: float = 0.0) -> list[Effect]:
        effects = self.receive(message, OWNER, now)
        self.epoch = message.epoch
        for event in events(effects):
            if isinstance(event, s.Reserve):
                self.key = event.key
                effects = [*effects, *self.note(self.core.reserved(event.key, now, self.page_bytes))]
        return effects

    def receive(self, message: Any, sender: str, now: float = 0.0) -> list[Effect]:
        return self.note(self.core.receive(message, sender, now))

    def forward(self, start: int, n: int) -> list[Effect]:
        return self.receive(m.Forward(self.session, self.epoch, start, n, rows(start, n)), self.before)

    def gap(self, expected: int) -> list[Effect]:
        return self.receive(m.Gap(self.session, self.epoch, expected), self.behind)

    def feed(self, start: int, *tokens: int) -> list[Effect]:
        return self.receive(m.Feed(self.session, self.epoch, start, tokens), self.before)

    def compute(self, token: int | None = None) -> list[Effect]:
        """The engine answers the oldest work."""
        work = self.work.pop(0)
        hidden = None if self.last else rows(work.start, work.n)
        drawn = token if work.sample else None
        return self.note(
            self.core.computed([s.Computed(work.key, work.tag, work.start, work.n, hidden, token=drawn)], 0.0)
        )

    @property
    def hop(self) -> Any:
        return self.core._sessions[self.session]

    @property
    def last(self) -> bool:
        return bool(self.hop.last)

    def standing(self) -> tuple[int, int]:
        """(handed to the engine, computed)."""
        return self.hop.submitted, self.hop.done


# -- opening -----------------------------------------------------------------------------------------------------------


def test_a_middle_hop_reserves_then_asks_for_everything() -> None:
    hopper = Hopper(1)
    assert only(hopper.opened, s.Reserve) == s.Reserve("s#1", "toy", 2, 4, 64, "normal", 3, None, (), rebuilds=0)
    assert sends(hopper.opened) == [
        (OWNER, m.Opened("s", (1, OWNER), 1, 0)),
        ("hop0", m.Gap("s", (1, OWNER), 0)),
    ]


def test_the_sampler_is_given_the_tokens_and_how_to_draw() -> None:
    reserve = only(Hopper(2, drawn=(20, 21)).opened, s.Reserve)
    assert (reserve.sampling, reserve.tokens) == (request().sampling, (*PROMPT, 20, 21))


def test_the_first_hop_computes_the_prompt_at_once() -> None:
    work = only(Hopper(0).opened, t.Compute)
    assert (work.start, work.n, work.tokens, work.hidden, work.sample) == (0, 4, PROMPT, None, False)


def test_the_first_hop_computes_drawn_tokens_too_when_a_route_is_rebuilt() -> None:
    assert only(Hopper(0, drawn=(20, 21)).opened, t.Compute).tokens == (*PROMPT, 20, 21)


@pytest.mark.parametrize(
    ("message", "sender"),
    [
        (opening(1), STRANGER),
        (opening(1, hop=3), OWNER),
        (opening(1, hop=-1), OWNER),
        (opening(1, hop=0), OWNER),
        (opening(0, request=None), OWNER),
        (opening(2, request=None), OWNER),
        (opening(0, accepted=5), OWNER),
        (opening(2, accepted=3), OWNER),
        (opening(2, drawn=(20,), accepted=4), OWNER),
        (opening(1, route=Route("toy", ())), OWNER),
    ],
)
def test_hostile_opens(message: m.Open, sender: str) -> None:
    core = s.StageCore(ME)
    core.activate(PLACEMENT)
    core.set_spans([LayerSpan("toy", 0, 6)])
    assert rejected(core.receive(message, sender, 0.0), sender)
    assert core.sessions() == []


@pytest.mark.parametrize(
    ("placement", "spans", "code"),
    [
        ((1, 4), [LayerSpan("toy", 0, 6)], "stale_placement"),
        ((0, 9), [LayerSpan("toy", 0, 6)], "stale_placement"),
        ((1, 6), [LayerSpan("toy", 0, 6)], "unknown_placement"),
        ((2, 0), [LayerSpan("toy", 0, 6)], "unknown_placement"),
        (PLACEMENT, [], "not_held"),
        (PLACEMENT, [LayerSpan("toy", 0, 3)], "not_held"),
        (PLACEMENT, [LayerSpan("other", 0, 6)], "not_held"),
        (PLACEMENT, [LayerSpan("toy", 0, 3), LayerSpan("toy", 3, 6)], "not_held"),
    ],
)
def test_what_cannot_be_served_is_refused(placement: tuple[int, int], spans: list[LayerSpan], code: str) -> None:
    core = s.StageCore(ME)
    core.activate(PLACEMENT)
    core.set_spans(spans)
    effects = core.receive(opening(1, placement_id=placement), OWNER, 0.0)
    assert [(to, x.code, x.hop) for to, x in sends(effects)] == [(OWNER, code, 1)]
    fetches = [s.FetchPlacement(OWNER, placement)] if code == "unknown_placement" else []
    assert events(effects) == fetches


def test_the_placement_never_goes_back() -> None:
    core = s.StageCore(ME)
    core.activate((1, 5))
    core.activate((1, 4))
    assert core.placement_id == (1, 5)


def test_an_open_sent_again_is_answered_and_reserves_nothing() -> None:
    hopper = Hopper(1)
    hopper.forward(0, 4)
    again = hopper.open(opening(1))
    assert sends(again) == [(OWNER, m.Opened("s", (1, OWNER), 1, 4)), ("hop0", m.Gap("s", (1, OWNER), 4))]
    assert events(again) == []


def test_an_open_of_an_older_epoch_is_answered_with_what_is_known() -> None:
    hopper = Hopper(1, counter=3)
    assert sends(hopper.receive(opening(1, counter=2), OWNER)) == [(OWNER, m.Ahead("s", (2, OWNER), (3, OWNER)))]
    assert hopper.hop.epoch == (3, OWNER)


def test_a_running_session_may_be_asked_again_under_an_old_placement() -> None:
    hopper = Hopper(1)
    hopper.core.activate((1, 6))
    assert only(hopper.open(opening(1)), m.Opened).kept == 0


def test_a_full_engine_is_said_to_the_owner_and_nothing_is_kept() -> None:
    core = s.StageCore(ME)
    core.activate(PLACEMENT)
    core.set_spans([LayerSpan("toy", 0, 6)])
    key = only(core.receive(opening(1), OWNER, 0.0), s.Reserve).key
    assert core.sessions() == []
    answer = core.refused(key, "busy", "full", 3.0)
    assert sends(answer) == [(OWNER, m.Refused("s", (1, OWNER), 1, "busy", "full", 3.0))]
    assert core.refused(key, "busy", "full", 3.0) == []
    assert events(core.reserved(key, 0.0)) == [s.Free(key)]


def asked(core: s.StageCore, message: m.Open) -> list[str]:
    """Keys that the engine is asked to reserve."""
    return [event.key for event in events(core.receive(message, OWNER, 0.0)) if isinstance(event, s.Reserve)]


def test_a_session_released_while_the_engine_is_asked_is_freed_on_its_answer() -> None:
    core = s.StageCore(ME)
    core.activate(PLACEMENT)
    core.set_spans([LayerSpan("toy", 0, 6)])
    (key,) = asked(core, opening(1))
    assert core.receive(m.Release("s", (1, OWNER)), OWNER, 0.0) == []
    assert core.reserved(key, 0.0) == [Emit(s.Free(key))]
    assert core.sessions() == []


def test_an_open_sent_again_while_the_engine_is_asked_reserves_once() -> None:
    core = s.StageCore(ME)
    core.activate(PLACEMENT)
    core.set_spans([LayerSpan("toy", 0, 6)])
    (key,) = asked(core, opening(1, counter=2))
    assert asked(core, opening(1, counter=2)) == []
    assert asked(core, opening(1, counter=1)) == []
    assert only(core.reserved(key, 0.0), m.Opened).epoch == (2, OWNER)


def test_a_newer_open_while_the_engine_is_asked_takes_the_olders_place() -> None:
    core = s.StageCore(ME)
    core.activate(PLACEMENT)
    core.set_spans([LayerSpan("toy", 0, 6)])
    (old,) = asked(core, opening(1))
    (new,) = asked(core, opening(1, counter=2))
    assert core.reserved(old, 0.0) == [Emit(s.Free(old))]
    assert only(core.reserved(new, 0.0), m.Opened).epoch == (2, OWNER)
    assert events(core.receive(m.Release("s", (2, OWNER)), OWNER, 0.0)) == [s.Free(new)]


# -- the flow of positions ---------------------------------------------------------------------------------------------


def test_hidden_states_are_computed_as_they_come() -> None:
    hopper = Hopper(1)
    work = only(hopper.forward(0, 3), t.Compute)
    assert (work.start, work.n, work.tokens, bytes(work.hidden)) == (0, 3, (), bytes(rows(0, 3)))
    assert not work.sample
    assert only(hopper.forward(3, 1), t.Compute).start == 3


def test_what_is_known_already_is_not_computed_again() -> None:
    hopper = Hopper(1)
    hopper.forward(0, 4)
    assert hopper.forward(0, 4) == []
    assert hopper.forward(1, 2) == []
    work = only(hopper.forward(2, 4), t.Compute)
    assert (work.start, work.n, bytes(work.hidden)) == (4, 2, bytes(rows(4, 2)))


def test_frames_behind_a_lost_one_ask_for_it_once() -> None:
    hopper = Hopper(1)
    hopper.forward(0, 2)
    assert sends(hopper.forward(3, 1)) == [("hop0", m.Gap("s", (1, OWNER), 2))]
    assert hopper.forward(4, 1) == []
    assert only(hopper.forward(2, 4), t.Compute).n == 4
    assert sends(hopper.forward(7, 1)) == [("hop0", m.Gap("s", (1, OWNER), 6))]


@pytest.mark.parametrize(
    ("at", "sender", "start", "n", "size"),
    [
        (1, STRANGER, 0, 1, ROW),
        (1, OWNER, 0, 1, ROW),
        (1, "hop2", 0, 1, ROW),
        (0, "hop2", 0, 1, ROW),
        (1, "hop0", 0, 0, 0),
        (1, "hop0", 0, -1, ROW),
        (1, "hop0", -1, 1, ROW),
        (1, "hop0", 0, 3, 3 * ROW + 1),
        (1, "hop0", 60, 5, 5 * ROW),
        (2, "hop1", 0, 5, 5 * ROW),
    ],
)
def test_hostile_forwards(at: int, sender: str, start: int, n: int, size: int) -> None:
    hopper = Hopper(at)
    before = hopper.standing()
    message = m.Forward("s", (1, OWNER), start, n, memoryview(bytes(size)))
    assert rejected(hopper.receive(message, sender), sender)
    assert hopper.standing() == before


def test_nothing_crosses_a_boundary_before_the_hop_behind_has_said_from_where() -> None:
    hopper = Hopper(1)
    hopper.forward(0, 4)
    assert sends(hopper.compute()) == []
    assert sends(hopper.gap(0)) == [("hop2", m.Forward("s", (1, OWNER), 0, 4, rows(0, 4)))]
    hopper.forward(4, 1)
    assert sends(hopper.compute()) == [("hop2", m.Forward("s", (1, OWNER), 4, 1, rows(4, 1)))]


def test_what_is_kept_does_not_share_the_engines_memory() -> None:
    hopper = Hopper(1)
    hopper.forward(0, 2)
    work, step = hopper.work.pop(), bytearray(rows(0, 2))
    hopper.core.computed([s.Computed(work.key, work.tag, 0, 2, memoryview(step))], 0.0)
    step[:] = bytes(len(step))
    assert bytes(only(hopper.gap(0), m.Forward).payload) == bytes(rows(0, 2))


def test_a_gap_sends_what_is_kept_from_there_on() -> None:
    hopper = Hopper(1)
    hopper.forward(0, 4)
    hopper.compute()
    hopper.gap(0)
    assert only(hopper.gap(2), m.Forward) == m.Forward("s", (1, OWNER), 2, 2, rows(2, 2))
    assert hopper.gap(4) == []


def test_a_hop_behind_that_has_more_than_is_computed_is_sent_only_what_it_lacks() -> None:
    hopper = Hopper(1)
    hopper.gap(3)
    hopper.forward(0, 2)
    assert sends(hopper.compute()) == []
    hopper.forward(2, 3)
    assert only(hopper.compute(), m.Forward) == m.Forward("s", (1, OWNER), 3, 2, rows(3, 2))


@pytest.mark.parametrize(
    ("at", "sender", "expected"), [(1, "hop0", 0), (1, STRANGER, 0), (2, "hop1", 0), (1, "hop2", -1)]
)
def test_hostile_gaps(at: int, sender: str, expected: int) -> None:
    assert rejected(Hopper(at).receive(m.Gap("s", (1, OWNER), expected), sender), sender)


# -- the budget of checkpoints, and rolling back -----------------------------------------------------------------------


def over_budget() -> Hopper:
    """A middle hop whose checkpoints [0, 4) the budget took."""
    hopper = Hopper(1, config=s.StageConfig(checkpoint_bytes=3 * ROW))
    hopper.gap(0)
    hopper.forward(0, 4)
    hopper.compute()
    assert (hopper.core.checkpoint_bytes, hopper.core.keeper.dropped_bytes) == (0, 4 * ROW)
    return hopper


def test_past_the_budget_a_session_that_runs_goes_on() -> None:
    hopper = over_budget()
    hopper.forward(4, 1)
    assert only(hopper.compute(), m.Forward).start == 4
    assert hopper.core.checkpoint_bytes == ROW


def test_a_gap_below_what_is_kept_rolls_back_and_asks_the_hop_before() -> None:
    hopper = over_budget()
    hopper.forward(4, 2)
    effects = hopper.gap(1)
    assert events(effects) == [t.Truncate(hopper.key, 1)]
    assert sends(effects) == [("hop0", m.Gap("s", (1, OWNER), 1))]
    assert hopper.standing() == (1, 1)
    work = only(hopper.forward(1, 5), t.Compute)
    assert (work.start, work.n, work.tag) == (1, 5, 1)
    assert only(hopper.compute(), m.Forward) == m.Forward("s", (1, OWNER), 1, 5, rows(1, 5))


def test_results_from_before_a_roll_back_are_void() -> None:
    hopper = over_budget()
    hopper.forward(4, 2)
    old = hopper.work[0]
    hopper.gap(1)
    assert hopper.core.computed([s.Computed(old.key, old.tag, old.start, old.n, rows(4, 2))], 0.0) == []
    assert hopper.standing() == (1, 1)


def test_the_first_hop_rolls_back_to_the_tokens() -> None:
    hopper = Hopper(0, config=s.StageConfig(checkpoint_bytes=0))
    hopper.gap(0)
    hopper.compute()
    work = only(hopper.gap(1), t.Compute)
    assert (work.start, work.tokens) == (1, PROMPT[1:])


def test_the_oldest_sessions_lose_their_checkpoints_first() -> None:
    core = s.StageCore(ME, s.StageConfig(checkpoint_bytes=3 * ROW))
    core.activate(PLACEMENT)
    core.set_spans([LayerSpan("toy", 0, 6)])
    for name in ("old", "new"):
        message = opening(1)
        core.reserved(only(core.receive(_named(message, name), OWNER, 0.0), s.Reserve).key, 0.0)
        frame = m.Forward(name, (1, OWNER), 0, 2, rows(0, 2))
        work = only(core.receive(frame, "hop0", 0.0), t.Compute)
        core.computed([s.Computed(work.key, work.tag, 0, 2, rows(0, 2))], 0.0)
    assert core.checkpoint_bytes == 2 * ROW
    assert events(core.receive(m.Gap("old", (1, OWNER), 0), "hop2", 0.0)) == [t.Truncate("old#1", 0)]
    assert only(core.receive(m.Gap("new", (1, OWNER), 0), "hop2", 0.0), m.Forward).n == 2


def _named(message: m.Open, session: str) -> m.Open:
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return m.Open(**{**fields, "session": session})


def test_checkpoints_are_counted_exactly() -> None:
    hopper = Hopper(1)
    hopper.gap(0)
    hopper.forward(0, 4)
    hopper.compute()
    assert hopper.core.checkpoint_bytes == 4 * ROW
    hopper.open(opening(1, counter=2, accepted=3))
    assert hopper.core.checkpoint_bytes == 3 * ROW
    hopper.receive(m.Release("s", (2, OWNER)), OWNER)
    assert hopper.core.checkpoint_bytes == 0


# -- rows on the disk --------------------------------------------------------------------------------------------------


class Disk:
    """Of one hop's node: notes what it is asked, and answers when told to."""

    def __init__(self, hopper: Hopper) -> None:
        self.hopper = hopper
        self.files: dict[int, bytes] = {}

    def note(self, effects: list[Effect]) -> list[Effect]:
        for event in events(effects):
            if isinstance(event, t.Spill):
                self.files[event.number] = b"".join(event.rows)
                self.note(self.hopper.core.spilled(event.number, True))
            elif isinstance(event, t.Forget):
                for number in event.numbers:
                    del self.files[number]
        return effects

    def read(self, ask: t.Unspill) -> list[Effect]:
        payload = self.files.get(ask.number)
        answer = self.hopper.core.unspilled(ask, memoryview(payload) if payload is not None else None)
        return self.note(self.hopper.note(answer))


def on_disk(**more: Any) -> tuple[Hopper, Disk]:
    """A middle hop with rows [0, 3) and [3, 6) on the disk, and [6, 7) in memory."""
    hopper = Hopper(1, config=s.StageConfig(checkpoint_bytes=ROW, checkpoint_disk=100 * ROW, page=2), **more)
    disk = Disk(hopper)
    hopper.gap(0)
    for start, n in ((0, 3), (3, 3), (6, 1)):
        hopper.forward(start, n)
        disk.note(hopper.compute())
    assert {number: len(rows) // ROW for number, rows in disk.files.items()} == {1: 3, 2: 3}
    return hopper, disk


def forwards(effects: list[Effect]) -> list[tuple[int, bytes]]:
    return [(x.start, bytes(x.payload)) for _, x in sends(effects) if isinstance(x, m.Forward)]


def test_a_replay_reads_the_disk_piece_by_piece_and_then_memory() -> None:
    hopper, disk = on_disk()
    ask = only(hopper.gap(1), t.Unspill)
    assert ask == t.Unspill(1, "s")
    assert hopper.gap(1) == [], "it is being read"
    effects = disk.read(ask)
    assert forwards(effects) == [(1, bytes(rows(1, 2)))]
    hopper.forward(7, 1)
    assert forwards(disk.note(hopper.compute())) == [], "in its turn"
    effects = disk.read(only(effects, t.Unspill))
    assert forwards(effects) == [(3, bytes(rows(3, 3)))]
    hopper.forward(8, 1)
    assert forwards(disk.note(hopper.compute())) == [], "in its turn"
    last = only(effects, t.Unspill)
    assert forwards(disk.read(last)) == [(6, bytes(rows(6, 2))), (8, bytes(rows(8, 1)))]
    assert hopper.core.checkpoint_bytes == ROW, "what was read is sent and not kept"


def test_an_answer_that_is_not_what_is_wanted_any_more_is_of_no_use() -> None:
    hopper, disk = on_disk()
    first = only(hopper.gap(1), t.Unspill)
    second = only(hopper.gap(4), t.Unspill)
    assert (first.number, second.number) == (1, 2)
    assert disk.read(first) == []
    assert forwards(disk.read(second)) == [(4, bytes(rows(4, 2))), (6, bytes(rows(6, 1)))]


def test_an_answer_from_before_a_new_route_serves_it_too() -> None:
    hopper, disk = on_disk()
    ask = only(hopper.gap(0), t.Unspill)
    disk.note(hopper.open(opening(1, counter=2, drawn=(20, 21, 22))))
    assert hopper.gap(2) == []
    assert forwards(disk.read(ask))[0] == (2, bytes(rows(2, 1)))


def test_what_is_rolled_back_on_the_disk_is_not_sent() -> None:
    hopper, disk = on_disk()
    disk.note(hopper.open(opening(1, counter=2)))  # four tokens are accepted
    assert disk.files.keys() == {1, 2}
    effects = disk.read(only(hopper.gap(0), t.Unspill))
    effects = disk.read(only(effects, t.Unspill))
    assert forwards(effects) == [(3, bytes(rows(3, 1)))]
    hopper.open(opening(1, counter=3, accepted=3))
    disk.note(hopper.core.tick(1.0))
    assert only(hopper.gap(0), t.Unspill).number == 1


@pytest.mark.parametrize("when", ["spill", "unspill"])
def test_a_disk_that_fails_costs_the_copy_and_not_the_session(when: str) -> None:
    hopper, disk = on_disk()
    if when == "spill":
        assert only(disk.note(hopper.core.spilled(2, False)), t.Forget) == t.Forget((1, 2))
        effects = hopper.gap(0)
    else:
        ask = only(hopper.gap(0), t.Unspill)
        effects = disk.note(hopper.note(hopper.core.unspilled(ask, None)))
    assert ("hop0", m.Gap("s", (1, OWNER), 0)) in sends(effects)
    assert (hopper.standing(), disk.files) == ((0, 0), {})
    assert hopper.core.keeper.dropped_bytes == 7 * ROW
    hopper.forward(0, 7)
    assert forwards(hopper.compute()) == [(0, bytes(rows(0, 7)))]


def test_rows_that_are_given_up_while_they_are_read_are_computed_again() -> None:
    hopper, disk = on_disk()
    ask = only(hopper.gap(0), t.Unspill)
    disk.note(hopper.core.spilled(2, False))
    effects = hopper.note(hopper.core.unspilled(ask, rows(0, 3)))
    assert (forwards(effects), ("hop0", m.Gap("s", (1, OWNER), 0)) in sends(effects)) == ([], True)


@pytest.mark.parametrize("end", ["release", "lease", "elsewhere"])
def test_the_disk_forgets_a_session_that_is_over(end: str) -> None:
    hopper, disk = on_disk()
    if end == "release":
        effects = hopper.receive(m.Release("s", (1, OWNER)), OWNER)
    elif end == "lease":
        effects = hopper.core.tick(1000.0)
    else:
        effects = hopper.receive(opening(2, counter=2, session="s"), OWNER)
    disk.note(effects)
    assert (disk.files, hopper.core.keeper.ledger.disk) == ({}, 0)
    assert hopper.core.unspilled(t.Unspill(1, "s"), rows(0, 3)) == []


def test_a_parked_session_keeps_what_is_on_the_disk() -> None:
    hopper, disk = on_disk()
    disk.note(park(hopper))
    disk.note(hopper.open(opening(1, 2, drawn=(20, 21, 22))))
    assert forwards(disk.read(only(hopper.gap(0), t.Unspill)))[0] == (0, bytes(rows(0, 3)))


def test_a_successor_is_shipped_the_rows_that_are_on_the_disk() -> None:
    hopper, disk = on_disk()
    effects = hopper.receive(m.Fetch("s", (1, OWNER), (2, 4), 1), "heir")
    effects = disk.read(only(effects, t.Unspill))
    ask = only(effects, t.Export)
    assert (ask.start, ask.end) == (1, 3), "as far as the piece goes"
    pages = only(hopper.core.exported(ask, 1, memoryview(b"kv")), m.Pages)
    assert (pages.start, pages.n, pages.done, bytes(pages.rows)) == (1, 1, 7, bytes(rows(1, 1)))
    (ask,) = events(hopper.receive(m.Fetch("s", (1, OWNER), (2, 4), 6), "heir"))
    hopper.forward(7, 1)
    disk.note(hopper.compute())  # [6, 7) goes to the disk while the pages are read
    again = only(hopper.core.exported(ask, 1, memoryview(b"kv")), t.Unspill)
    assert (again.number, again.then.start, again.then.end) == (3, 6, 8)


def test_rows_that_cannot_be_read_are_not_shipped() -> None:
    hopper, _ = on_disk()
    asked = only(hopper.receive(m.Fetch("s", (1, OWNER), (2, 4), 1), "heir"), t.Unspill)
    ask = only(hopper.core.unspilled(asked, None), t.Export)
    assert bytes(only(hopper.core.exported(ask, 2, memoryview(b"kv")), m.Pages).rows) == b""


def test_pages_are_not_named_without_rows_in_memory() -> None:
    hopper, disk = on_disk(page_bytes=10)
    effects = disk.note(hopper.receive(m.Release("s", (1, OWNER), (*CHAIN, b"c")), OWNER))
    assert [event for event in events(effects) if isinstance(event, t.KeepPages)] == []


# -- shared pages ------------------------------------------------------------------------------------------------------

PAGED = s.StageConfig(page=2)
CHAIN = (b"a", b"b")


def sharing(at: int, **more: Any) -> tuple[Hopper, Hopper]:
    """A session that computed its prompt at hop ``at``, and one with the same prompt, of the same node, after it."""
    ask = more.pop("ask", request())
    one = Hopper(at, config=PAGED, chain=CHAIN, page_bytes=10)
    one.gap(0)
    if at:
        one.forward(0, 4)
    one.compute(token=20)
    other = Hopper(at, core=one.core, session="t", chain=CHAIN, page_bytes=10, ask=ask, **more)
    return one, other


def test_whole_pages_are_kept_as_they_are_computed() -> None:
    hopper = Hopper(1, config=PAGED, chain=CHAIN, page_bytes=10)
    hopper.gap(0)
    hopper.forward(0, 3)
    assert only(hopper.compute(), t.KeepPages) == t.KeepPages(hopper.key, 2, ((0, 1),))
    hopper.forward(3, 1)
    assert only(hopper.compute(), t.KeepPages) == t.KeepPages(hopper.key, 2, ((2, 2),))
    assert (hopper.core.checkpoint_bytes, hopper.core.held_bytes) == (4 * ROW, 8 * ROW)


def test_a_hop_begins_behind_the_pages_and_has_their_rows_for_the_hop_behind() -> None:
    _, other = sharing(1)
    assert only(other.opened, t.TakePages) == t.TakePages("t#2", 2, (1, 2))
    assert only(other.opened, m.Opened) == m.Opened("t", (1, OWNER), 1, 4, 4)
    assert only(other.opened, m.Gap).expected == 4
    assert only(other.gap(1), m.Forward) == m.Forward("t", (1, OWNER), 1, 3, rows(1, 3))
    assert other.forward(2, 2) == []  # it has them


def test_a_hop_that_has_more_pages_than_the_hop_behind_wants_sends_what_lacks() -> None:
    _, other = sharing(1)
    assert other.gap(6) == []
    other.forward(4, 4)
    assert only(other.compute(), m.Forward) == m.Forward("t", (1, OWNER), 6, 2, rows(6, 2))


def test_pages_that_the_engine_cannot_begin_behind_are_kept_anew() -> None:
    """Else whoever begins so would be told the same, for good."""
    _, other = sharing(1)
    effects = other.note(other.core.computed([s.Computed(other.key, 0, 0, 0, rewound=True)], 0.0))
    assert [type(event) for event in events(effects)] == [t.DropPages, t.Truncate]
    assert sorted(only(effects, t.DropPages).pages) == [1, 2]
    assert only(effects, m.Gap).expected == 0
    other.forward(0, 4)
    assert only(other.compute(), t.KeepPages) == t.KeepPages("t#2", 2, ((0, 3), (2, 4)))
    effects = other.note(other.core.computed([s.Computed(other.key, 0, 0, 0, rewound=True)], 0.0))
    assert [type(event) for event in events(effects)] == [t.Truncate], "a cut that goes too far says nothing of pages"


def test_the_first_hop_computes_what_follows_the_pages() -> None:
    _, other = sharing(0, drawn=(20,), max_positions=64)
    assert only(other.opened, t.Compute).start == 4


def test_the_sampler_begins_before_the_last_token() -> None:
    _, other = sharing(2)
    assert only(other.opened, m.Gap).expected == 2
    assert only(other.forward(2, 2), t.Compute).sample


def test_a_sampler_that_is_to_score_the_prompt_computes_all_of_it() -> None:
    _, other = sharing(2, ask=request(scored=True))
    assert only(other.opened, m.Gap).expected == 0


def test_a_release_names_the_pages_of_the_answer() -> None:
    hopper = Hopper(1, config=PAGED, chain=CHAIN, page_bytes=10)
    hopper.gap(0)
    hopper.forward(0, 4)
    hopper.compute()
    hopper.forward(4, 3)
    hopper.compute()
    effects = hopper.receive(m.Release("s", (1, OWNER), (*CHAIN, b"c")), OWNER)
    assert events(effects) == [t.KeepPages(hopper.key, 2, ((4, 3),)), s.Free(hopper.key)]
    assert (hopper.core.checkpoint_bytes, len(hopper.core.pages)) == (0, 3)


def test_past_the_budget_of_checkpoints_pages_go_before_sessions_lose_theirs() -> None:
    hopper = Hopper(1, config=s.StageConfig(page=2, checkpoint_bytes=5 * ROW), chain=CHAIN, page_bytes=10)
    hopper.gap(0)
    hopper.forward(0, 4)
    assert only(hopper.compute(), t.DropPages) == t.DropPages((2, 1))
    assert (hopper.core.held_bytes, hopper.core.keeper.dropped_bytes) == (4 * ROW, 0)


def test_a_span_that_is_given_up_takes_its_pages_with_it() -> None:
    one, _ = sharing(1)
    assert one.core.set_spans([LayerSpan("toy", 2, 4)]) == []
    assert events(one.core.set_spans([LayerSpan("toy", 3, 6)])) == [t.DropPages((2, 1))]


def test_more_names_than_tokens_are_rejected() -> None:
    core = s.StageCore(ME, PAGED)
    core.activate(PLACEMENT)
    assert rejected(core.receive(opening(1, chain=(*CHAIN, b"c")), OWNER, 0.0), OWNER)


def test_a_sequence_that_could_not_go_back_is_computed_anew_and_sent_from_where_it_was_not() -> None:
    hopper = Hopper(1)
    hopper.gap(0)
    hopper.forward(0, 4)
    hopper.compute()
    hopper.open(opening(1, counter=2, accepted=3))
    hopper.gap(3)
    effects = hopper.note(hopper.core.computed([s.Computed(hopper.key, 0, 0, 0, rewound=True)], 0.0))
    assert events(effects) == [t.Truncate(hopper.key, 0)]
    assert only(effects, m.Gap).expected == 0
    hopper.forward(0, 5)
    assert only(hopper.compute(), m.Forward) == m.Forward("s", (2, OWNER), 3, 2, rows(3, 2))


# -- the sampler -------------------------------------------------------------------------------------------------------


def test_the_sampler_draws_at_the_frontier_only() -> None:
    hopper = Hopper(2, drawn=(20, 21))
    assert not only(hopper.forward(0, 5), t.Compute).sample
    assert only(hopper.forward(5, 1), t.Compute).sample


def test_a_drawn_token_goes_to_the_owner_and_to_the_first_hop() -> None:
    hopper = Hopper(2)
    hopper.forward(0, 4)
    assert sends(hopper.compute(token=30)) == [
        (OWNER, m.Token("s", (1, OWNER), 4, 30)),
        ("hop0", m.Feed("s", (1, OWNER), 4, (30,))),
    ]


@pytest.mark.parametrize("ask", [request(stop=(30,)), request(max_tokens=1)])
def test_the_last_token_is_fed_for_the_journal_and_computed_by_nobody(ask: m.SessionRequest) -> None:
    sampler, first = Hopper(2, ask=ask), Hopper(0, ask=ask)
    sampler.forward(0, 4)
    (_, token), (_, feed) = sends(sampler.compute(token=30))
    assert (token, feed) == (m.Token("s", (1, OWNER), 4, 30), m.Feed("s", (1, OWNER), 4, (30,)))
    assert first.receive(feed, "hop2") == []
    assert first.hop.tokens == [*PROMPT, 30]


def test_the_sampler_tells_the_first_hop_what_it_lacks() -> None:
    hopper = Hopper(2, drawn=(20, 21, 22))
    assert sends(hopper.gap(5)) == [("hop0", m.Feed("s", (1, OWNER), 5, (21, 22)))]
    assert hopper.gap(7) == []


def test_prompt_logprobs_go_to_the_owner() -> None:
    hopper = Hopper(2, ask=request(scored=True))
    work = only(hopper.forward(0, 3), t.Compute)
    assert work.prompt_logprobs
    scores = ((-1.0, ()), (-2.0, ()))
    result = s.Computed(work.key, work.tag, 0, 2, prompt_logprobs=scores)
    assert sends(hopper.core.computed([result], 0.0)) == [(OWNER, m.PromptLogprobs("s", (1, OWNER), 1, scores))]


def test_a_route_of_one_hop_feeds_itself() -> None:
    hopper = Hopper(0, hops=1)
    assert only(hopper.opened, t.Compute).sample
    effects = hopper.compute(token=30)
    assert sends(effects) == [(OWNER, m.Token("s", (1, OWNER), 4, 30))]
    work = only(effects, t.Compute)
    assert (work.start, work.tokens, work.sample) == (4, (30,), True)


# -- the first hop -----------------------------------------------------------------------------------------------------


def test_fed_tokens_are_computed_each_once() -> None:
    hopper = Hopper(0)
    assert only(hopper.feed(4, 30), t.Compute).tokens == (30,)
    assert hopper.feed(4, 30) == []
    assert only(hopper.feed(4, 30, 31, 32), t.Compute).tokens == (31, 32)


def test_a_feed_past_a_lost_one_asks_for_it() -> None:
    assert sends(Hopper(0).feed(6, 30)) == [("hop2", m.Gap("s", (1, OWNER), 4))]


@pytest.mark.parametrize(
    ("at", "sender", "start", "n"),
    [
        (0, STRANGER, 4, 1),
        (0, "hop1", 4, 1),
        (1, "hop0", 4, 1),
        (0, "hop2", -1, 6),
        (0, "hop2", 4, 61),
        (0, "hop2", 64, 1),
    ],
)
def test_hostile_feeds(at: int, sender: str, start: int, n: int) -> None:
    hopper = Hopper(at)
    assert rejected(hopper.receive(m.Feed("s", (1, OWNER), start, (30,) * n), sender), sender)


def test_the_last_token_may_be_fed() -> None:
    hopper = Hopper(0)
    assert not any(isinstance(event, Rejected) for event in events(hopper.feed(4, *[30] * MAX_TOKENS)))


def test_the_first_hop_runs_a_bounded_number_of_tokens_past_the_owner() -> None:
    hopper = Hopper(0)
    hopper.feed(4, *[30] * 50)
    assert hopper.hop.submitted == len(PROMPT) + m.RUN_AHEAD
    assert hopper.feed(54, 30) == []
    effects = hopper.receive(m.Ack("s", (1, OWNER), 6), OWNER)
    assert only(effects, t.Compute).n == 2
    assert hopper.receive(m.Ack("s", (1, OWNER), 5), OWNER) == []
    assert hopper.hop.submitted == 6 + m.RUN_AHEAD


def test_an_acknowledgement_that_comes_late_takes_nothing_back() -> None:
    hopper = Hopper(0)
    hopper.feed(4, *[30] * 26)
    for accepted in (30, 5):
        assert hopper.receive(m.Ack("s", (1, OWNER), accepted), OWNER) == []
    hopper.feed(30, *[30] * 30)
    assert hopper.hop.submitted == 60


def test_only_the_owner_acknowledges() -> None:
    hopper = Hopper(0)
    hopper.feed(4, *[30] * 50)
    assert rejected(hopper.receive(m.Ack("s", (1, OWNER), 50), "hop1"), "hop1")
    assert hopper.hop.submitted == len(PROMPT) + m.RUN_AHEAD


# -- epochs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        m.Forward("s", (1, OWNER), 0, 1, rows(0, 1)),
        m.Gap("s", (1, OWNER), 0),
        m.Ack("s", (1, OWNER), 5),
        m.Progress("s", (1, OWNER), 5),
        m.Release("s", (1, OWNER)),
    ],
)
def test_an_older_epoch_is_ignored(message: Any) -> None:
    hopper = Hopper(1, counter=2)
    sender = OWNER if isinstance(message, m.Release | m.Ack | m.Progress) else "hop0"
    assert hopper.receive(message, sender) == []
    assert hopper.standing() == (0, 0)
    assert len(hopper.core.sessions()) == 1


def test_frames_of_a_newer_epoch_wait_for_its_open() -> None:
    hopper = Hopper(1)
    assert hopper.receive(m.Forward("s", (2, OWNER), 0, 2, rows(0, 2)), "hop0") == []
    effects = hopper.open(opening(1, counter=2))
    assert only(effects, t.Compute).n == 2
    assert hopper.open(opening(1, counter=2)) != []
    assert hopper.core._early.frames == hopper.core._early.bytes == 0


def test_held_frames_are_judged_like_any_other_when_their_open_comes() -> None:
    core = Hopper(1).core
    core.receive(m.Forward("s", (2, OWNER), 0, 2, rows(0, 2)), STRANGER, 0.0)
    core.receive(m.Gap("s", (3, OWNER), 0), "hop2", 0.0)
    effects = core.receive(opening(1, counter=2), OWNER, 0.0)
    assert [event.sender for event in events(effects) if isinstance(event, Rejected)] == [STRANGER]
    assert core._early.frames == 1  # that of epoch 3 waits on


@pytest.mark.parametrize(
    ("config", "message", "kept"),
    [
        (s.StageConfig(held_frames=3), m.Gap("x", (1, OWNER), 0), 3),
        (s.StageConfig(held_bytes=1000), m.Forward("x", (1, OWNER), 0, 1, memoryview(bytes(436))), 2),
        (s.StageConfig(held_bytes=1000), m.Feed("x", (1, OWNER), 0, (1,) * 50), 2),
        (s.StageConfig(held_bytes=1000), m.Feed("x", (1, OWNER), 0, (1,) * 1000), 0),
        (s.StageConfig(held_bytes=1000), m.Gap("x", (1, OWNER), 0), 15),
    ],
)
def test_what_waits_for_an_open_is_bounded(config: s.StageConfig, message: Any, kept: int) -> None:
    core = s.StageCore(ME, config)
    for _ in range(20):
        assert core.receive(message, STRANGER, 0.0) == []
    assert core._early.frames == kept
    assert core._early.bytes <= config.held_bytes


def test_frames_whose_open_never_comes_are_forgotten() -> None:
    core = s.StageCore(ME)
    core.receive(m.Gap("x", (1, OWNER), 0), "hop2", 0.0)
    now = 0.0
    while core.deadline is not None:
        assert now <= core.config.held_s + core.config.sweep_s, "still held"
        now = core.deadline
        assert core.tick(now) == []
    assert now > core.config.held_s
    assert (core._early._waiting, core._early.frames, core._early.bytes) == ({}, 0, 0)


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accepted", "kept"), [(6, 4), (4, 4), (3, 3), (0, 0)])
def test_a_surviving_middle_hop_keeps_what_was_accepted(accepted: int, kept: int) -> None:
    hopper = Hopper(1)
    hopper.forward(0, 4)
    hopper.compute()
    effects = hopper.open(opening(1, counter=2, accepted=accepted))
    assert events(effects) == [t.Truncate(hopper.key, kept)]
    assert sends(effects) == [(OWNER, m.Opened("s", (2, OWNER), 1, kept)), ("hop0", m.Gap("s", (2, OWNER), kept))]


def test_work_under_way_is_void_when_the_route_changes() -> None:
    hopper = Hopper(1)
    hopper.forward(0, 4)
    old = hopper.work[0]
    assert only(hopper.open(opening(1, counter=2)), m.Opened).kept == 0
    assert hopper.core.computed([s.Computed(old.key, old.tag, 0, 4, rows(0, 4))], 0.0) == []


def test_a_surviving_sampler_draws_the_last_position_again() -> None:
    hopper = Hopper(2)
    hopper.forward(0, 4)
    hopper.compute(token=30)
    hopper.forward(4, 1)
    hopper.compute(token=31)  # the owner did not get this one
    effects = hopper.open(opening(2, counter=2, drawn=(30,)))
    assert only(effects, m.Opened).kept == 4
    assert only(hopper.forward(4, 1), t.Compute).sample
    assert only(hopper.compute(token=31), m.Token).position == 5


def test_a_survivor_sends_nothing_on_before_it_is_asked_again() -> None:
    hopper = Hopper(1)
    hopper.gap(0)
    hopper.forward(0, 4)
    hopper.compute()
    hopper.open(opening(1, counter=2, accepted=6))
    hopper.forward(4, 1)
    assert sends(hopper.compute()) == []
    assert only(hopper.gap(3), m.Forward).start == 3


@pytest.mark.parametrize(("at", "hops"), [(0, 3), (1, 2), (2, 4)])
def test_another_place_on_the_route_starts_anew(at: int, hops: int) -> None:
    hopper = Hopper(1)
    key = hopper.key
    effects = hopper.open(opening(at, counter=2, hops=hops))
    assert events(effects)[0] == s.Free(key)
    assert only(effects, s.Reserve).key != key
    assert only(effects, m.Opened).kept == 0


# -- ending ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counter", [1, 2])
def test_a_release_frees(counter: int) -> None:
    hopper = Hopper(1)
    assert events(hopper.receive(m.Release("s", (counter, OWNER)), OWNER)) == [s.Free(hopper.key)]
    assert hopper.core.sessions() == []
    assert hopper.receive(m.Release("s", (counter, OWNER)), OWNER) == []


def test_a_release_frees_what_waits_too() -> None:
    hopper = Hopper(1)
    hopper.receive(m.Forward("s", (2, OWNER), 0, 2, rows(0, 2)), "hop0")
    hopper.receive(m.Release("s", (2, OWNER)), OWNER)
    assert (hopper.core._early._waiting, hopper.core._early.frames, hopper.core._early.bytes) == ({}, 0, 0)


def test_a_release_by_another_is_refused() -> None:
    hopper = Hopper(1)
    assert rejected(hopper.receive(m.Release("s", (1, OWNER)), "hop0"), "hop0")
    assert len(hopper.core.sessions()) == 1


@pytest.mark.parametrize(("final", "code"), [(False, "failed"), (True, "dead_end")])
def test_an_engines_error_ends_the_session_here(final: bool, code: Any) -> None:
    hopper = Hopper(1)
    hopper.forward(0, 1)
    work = hopper.work[0]
    effects = hopper.core.computed([s.Computed(work.key, work.tag, 0, 1, error="bad rows", final=final)], 0.0)
    assert sends(effects) == [(OWNER, m.Refused("s", (1, OWNER), 1, code, "bad rows"))]
    assert events(effects) == [s.Free(hopper.key)]
    assert hopper.core.computed([s.Computed(work.key, work.tag, 0, 1, error="bad rows")], 0.0) == []


def run_sweeps(core: s.StageCore, until: float) -> Events:
    """Tick at every deadline up to ``until``."""
    found: Events = []
    while core.deadline is not None and core.deadline <= until:
        found += events(core.tick(core.deadline))
    return found


def test_a_session_that_nobody_renews_is_freed() -> None:
    hopper = Hopper(1)
    assert run_sweeps(hopper.core, 60.0) == []
    assert run_sweeps(hopper.core, 70.0) == [s.Free(hopper.key)]
    assert run_sweeps(hopper.core, 80.0) == []
    assert hopper.core.deadline is None


@pytest.mark.parametrize(("sender", "frees"), [(OWNER, False), (STRANGER, True)])
def test_only_the_owner_renews(sender: str, frees: bool) -> None:
    hopper = Hopper(1)
    assert hopper.receive(m.Lease((("s", (1, OWNER)),)), sender, now=50.0) == []
    assert (run_sweeps(hopper.core, 70.0) == [s.Free(hopper.key)]) is frees


def test_a_renewal_of_what_is_not_held_is_answered() -> None:
    hopper = Hopper(1)
    answer = hopper.receive(m.Lease((("s", (1, OWNER)), ("gone", (4, OWNER)))), OWNER)
    ((to, refused),) = sends(answer)
    assert (to, refused.session, refused.epoch, refused.hop, refused.code) == (
        OWNER, "gone", (4, OWNER), -1, "unknown_session",
    )  # fmt: skip


@pytest.mark.parametrize("now", [0.0, 1.0, 4.9])
def test_an_early_tick_does_nothing(now: float) -> None:
    core = Hopper(1).core
    due = core.deadline
    assert (core.tick(now), core.deadline) == ([], due)


# -- how far are you? --------------------------------------------------------------------------------------------------


def test_an_idle_middle_hop_says_where_it_stands_and_asks_again() -> None:
    hopper = Hopper(1)
    hopper.forward(0, 4)
    busy = hopper.receive(m.Progress("s", (1, OWNER), 4), OWNER)
    assert sends(busy) == [(OWNER, m.Progressing("s", (1, OWNER), 1, 4, 0, 0))]
    hopper.compute()
    idle = hopper.receive(m.Progress("s", (1, OWNER), 4), OWNER)
    assert sends(idle) == [
        (OWNER, m.Progressing("s", (1, OWNER), 1, 4, 4, 0)),
        ("hop0", m.Gap("s", (1, OWNER), 4)),
    ]


def test_the_sampler_repeats_the_tokens_that_the_owner_lacks() -> None:
    """With their scores; what it was opened with, the owner has."""
    hopper = Hopper(2, drawn=(20,))
    hopper.forward(0, 5)
    work = hopper.work.pop(0)
    result = s.Computed(work.key, work.tag, 0, 5, token=21, logprob=-0.5, top=((21, -0.5),))
    hopper.note(hopper.core.computed([result], 0.0))
    effects = hopper.receive(m.Progress("s", (1, OWNER), 4), OWNER)
    assert [x for _, x in sends(effects) if isinstance(x, m.Token)] == [
        m.Token("s", (1, OWNER), 5, 21, -0.5, ((21, -0.5),))
    ]
    later = hopper.receive(m.Progress("s", (1, OWNER), 6), OWNER)
    assert not [x for _, x in sends(later) if isinstance(x, m.Token)]


def test_the_first_hop_asks_the_sampler_for_tokens() -> None:
    effects = Hopper(0).receive(m.Progress("s", (1, OWNER), 4), OWNER)
    assert ("hop2", m.Gap("s", (1, OWNER), 4)) in sends(effects)


def test_progress_acknowledges() -> None:
    hopper = Hopper(0)
    hopper.feed(4, *[30] * 50)
    assert only(hopper.receive(m.Progress("s", (1, OWNER), 9), OWNER), t.Compute).n == 5


def test_only_the_owner_is_told() -> None:
    hopper = Hopper(2, drawn=(20,))
    assert rejected(hopper.receive(m.Progress("s", (1, OWNER), 0), STRANGER), STRANGER)


@pytest.mark.parametrize(
    ("span", "used"),
    [(LayerSpan("toy", 2, 4), True), (LayerSpan("toy", 3, 9), True), (LayerSpan("toy", 0, 2), False),
     (LayerSpan("toy", 4, 6), False), (LayerSpan("other", 2, 4), False)],
)  # fmt: skip
def test_layers_in_use(span: LayerSpan, used: bool) -> None:
    assert Hopper(1).core.in_use(span) is used


# -- parking -----------------------------------------------------------------------------------------------------------


def park(hopper: Hopper) -> list[Effect]:
    return hopper.receive(m.Park("s", hopper.epoch), OWNER)


def freed(effects: list[Effect]) -> list[str]:
    return [event.key for event in events(effects) if isinstance(event, s.Free)]


def test_a_parked_hop_frees_its_room_and_keeps_its_checkpoints() -> None:
    hopper = Hopper(1)
    hopper.forward(0, 4)
    hopper.compute()
    assert freed(park(hopper)) == ["s#1"]
    assert (hopper.core.checkpoint_bytes, hopper.core.in_use(LayerSpan("toy", 2, 4))) == (4 * ROW, False)
    assert (freed(park(hopper)), hopper.forward(4, 1), hopper.gap(0)) == ([], [], [])


def test_opened_again_it_passes_on_at_once_what_it_kept() -> None:
    hopper = Hopper(1)
    hopper.forward(0, 4)
    hopper.compute()
    park(hopper)
    effects = hopper.open(opening(1, 2))
    assert (OWNER, m.Opened("s", (2, OWNER), 1, 0)) in sends(effects)
    assert ("hop0", m.Gap("s", (2, OWNER), 0)) in sends(effects), "its keys and values are made anew"
    (passed,) = [x for _, x in sends(hopper.gap(0)) if isinstance(x, m.Forward)]
    assert (passed.start, passed.n) == (0, 4)
    hopper.forward(0, 5)
    (passed,) = [x for _, x in sends(hopper.compute()) if isinstance(x, m.Forward)]
    assert (passed.start, passed.n) == (4, 1), "the rest follows once it is computed"
    assert hopper.core.checkpoint_bytes == 5 * ROW


def test_checkpoints_past_the_accepted_tokens_do_not_outlive_parking() -> None:
    hopper = Hopper(1, drawn=(20, 21))
    hopper.forward(0, 6)
    hopper.compute()
    park(hopper)
    hopper.open(opening(1, 2, drawn=(20,)))
    assert hopper.core.checkpoint_bytes == 5 * ROW


def test_a_gap_below_what_a_parked_hop_kept_is_filled_from_further_upstream() -> None:
    """Its checkpoints were given up to the budget, and it computed nothing yet since it was opened again."""
    hopper = Hopper(1, config=s.StageConfig(checkpoint_bytes=0))
    hopper.forward(0, 4)
    hopper.compute()
    park(hopper)
    hopper.open(opening(1, 2))
    effects = hopper.gap(2)
    assert ("hop0", m.Gap("s", (2, OWNER), 0)) in sends(effects)
    hopper.forward(0, 4)
    (passed,) = [x for _, x in sends(hopper.compute()) if isinstance(x, m.Forward)]
    assert (passed.start, passed.n) == (2, 2)


def test_only_the_owner_parks() -> None:
    hopper = Hopper(1)
    assert rejected(hopper.receive(m.Park("s", (1, OWNER)), STRANGER), STRANGER)


def test_a_parked_hop_still_ends_with_its_release_and_its_lease() -> None:
    for end in (lambda h: h.receive(m.Release("s", (1, OWNER)), OWNER), lambda h: h.core.tick(1000.0)):
        hopper = Hopper(1)
        hopper.forward(0, 4)
        hopper.compute()
        park(hopper)
        end(hopper)
        assert (hopper.core.sessions(), hopper.core.checkpoint_bytes) == ([], 0)


def test_a_parked_sampler_keeps_its_journal() -> None:
    hopper = Hopper(2, drawn=(20,))
    park(hopper)
    journal = hopper.core.journals.get("s")
    assert journal is not None
    assert journal.drawn == (20,)


class Full(Hopper):
    """A hop at an engine with room for two sessions, of which ``s`` holds one."""

    def other(self, session: str, priority: Any, lacking: int = 8) -> list[Effect]:
        """Another session is opened; the engine lacks so many bytes."""
        message = opening(1, priority=priority)
        message = m.Open(session, *[getattr(message, name) for name in m.Open.__struct_fields__[1:]])
        reserve = only(self.core.receive(message, OWNER, 0.0), s.Reserve)
        return self.core.refused(reserve.key, "busy", "full", 1.0, lacking)


def test_a_higher_class_gets_the_room_of_a_lower_one() -> None:
    hopper = Full(1, priority="batch")
    hopper.hop.room = 8
    effects = hopper.other("t", "interactive")
    kinds = [type(x.event if isinstance(x, Emit) else x.message) for x in effects]
    assert kinds == [s.Free, m.Refused, s.Reserve], "it is freed before the engine is asked again"
    assert only(effects, m.Refused).code == "paused"
    opened = hopper.core.reserved(only(effects, s.Reserve).key, 0.0, 8)
    assert only(opened, m.Opened).session == "t"
    assert hopper.core.preemptions == 1
    told = hopper.core.receive(m.Progress("s", (1, OWNER), 4), OWNER, 0.0)
    assert only(told, m.Refused).code == "paused", "who did not hear is told again"
    told = hopper.core.receive(opening(1), OWNER, 0.0)
    assert only(told, m.Refused).code == "paused"


@pytest.mark.parametrize(("priority", "lacking"), [("batch", 8), ("interactive", 9), ("interactive", 0)])
def test_nobody_gives_way_to_its_own_class_or_in_vain(priority: str, lacking: int) -> None:
    hopper = Full(1, priority="batch")
    hopper.hop.room = 8
    effects = hopper.other("t", priority, lacking)
    assert [type(x) for x in effects] == [Send]
    assert only(effects, m.Refused).code == "busy"
    assert not hopper.hop.parked
