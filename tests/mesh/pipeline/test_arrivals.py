"""A session on its way to its next hop: what is reserved, fetched, written, opened and freed."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.pipeline import messages as m
from mesh.pipeline import work as t
from mesh.pipeline.arrivals import ArrivalsConfig
from mesh.pipeline.stage import StageCore
from mesh.types import LayerSpan
from tests.mesh.pipeline.test_stage import (
    ME,
    OWNER,
    PLACEMENT,
    PROMPT,
    ROW,
    Hopper,
    events,
    only,
    opening,
    rejected,
    rows,
    sends,
)
from tests.mesh.pipeline.test_stage import route as route_at

EPOCH = (1, OWNER)


class Successor:
    """Hop ``at`` is to come here, from the node ``old``."""

    def __init__(self, at: int = 1) -> None:
        self.at, self.now = at, 0.0
        self.core = StageCore(ME)
        self.core.activate(PLACEMENT)
        self.core.set_spans([LayerSpan("toy", 0, 6)])
        self.asked = self.prepare()

    def prepare(self, counter: int = 1, **more: Any) -> Any:
        room = {"placement_id": PLACEMENT, "max_positions": 64, "priority": "normal", "source": "old"} | more
        message = m.Prepare("s", (counter, OWNER), route=route_at(self.at), hop=self.at, **room)
        effects = self.core.receive(message, OWNER, self.now)
        for event in events(effects):
            if isinstance(event, t.Reserve):
                self.key = event.key
                effects += self.core.reserved(event.key, self.now)
        return effects

    def pages(self, start: int, n: int, done: int, counter: int = 1, sender: str = "old") -> Any:
        kept = rows(start, n) if self.at < 2 else memoryview(b"")
        message = m.Pages("s", (counter, OWNER), start, n, done, memoryview(bytes(n)), kept)
        return self.core.receive(message, sender, self.now)

    def open(self, shipped: Any, counter: int = 2, drawn: tuple[int, ...] = (5, 6)) -> tuple[t.Reserve, Any]:
        effects = self.core.receive(opening(self.at, counter, drawn, shipped=shipped), OWNER, self.now)
        ask = only(effects, t.Reserve)
        return ask, [*effects, *self.core.reserved(ask.key, self.now)]


def test_room_is_reserved_first_and_then_pages_are_fetched_piece_by_piece() -> None:
    new = Successor()
    ask = only(new.asked, t.Reserve)
    assert (ask.start, ask.end, ask.max_positions, ask.sampling, ask.base) == (2, 4, 64, None, "")
    assert sends(new.asked) == [("old", m.Fetch("s", EPOCH, (2, 4), 0))]
    first = new.pages(0, 3, done=5)
    written = only(first, t.Import)
    assert (written.key, written.start, written.n) == (ask.key, 0, 3)
    assert sends(first) == [(OWNER, m.Arrived("s", EPOCH, 1, 3, False)), ("old", m.Fetch("s", EPOCH, (2, 4), 3))]
    assert sends(new.pages(3, 2, done=5)) == [(OWNER, m.Arrived("s", EPOCH, 1, 5, True))]


def test_having_caught_up_it_keeps_up() -> None:
    new = Successor()
    new.pages(0, 4, done=4)
    assert new.core.deadline == pytest.approx(ArrivalsConfig().follow_s)
    assert sends(new.core.tick(ArrivalsConfig().follow_s)) == [("old", m.Fetch("s", EPOCH, (2, 4), 4))]


def test_a_lost_piece_is_asked_for_again_and_a_repeated_one_changes_nothing() -> None:
    new = Successor()
    assert sends(new.core.tick(ArrivalsConfig().again_s)) == [("old", m.Fetch("s", EPOCH, (2, 4), 0))]
    new.pages(0, 3, done=9)
    assert new.pages(0, 3, done=9) == []
    assert new.pages(4, 2, done=9) == []


def test_the_open_goes_on_from_what_was_shipped_and_accepted() -> None:
    new = Successor()
    new.pages(0, 8, done=8)
    ask, effects = new.open(((1, OWNER), len(PROMPT) + 1))
    assert (ask.base, ask.kept) == (new.key, len(PROMPT) + 1)
    opened = only(effects, m.Opened)
    assert opened.kept == len(PROMPT) + 1
    assert only(effects, m.Gap).expected == len(PROMPT) + 1
    assert new.core.checkpoint_bytes == opened.kept * ROW
    behind = new.core.receive(m.Gap("s", (2, OWNER), 2), "hop2", 0.0)
    assert bytes(only(behind, m.Forward).payload) == bytes(rows(2, opened.kept - 2)), "its checkpoints came along"


def test_a_sampler_computes_its_last_position_again() -> None:
    new = Successor(at=2)
    new.pages(0, 8, done=8)
    ask, effects = new.open(((1, OWNER), len(PROMPT) + 2))
    assert (ask.kept, only(effects, m.Opened).kept) == (len(PROMPT) + 1,) * 2
    assert ask.tokens == (*PROMPT, 5, 6)


@pytest.mark.parametrize("shipped", [None, ((7, OWNER), 6), ((1, "another"), 6)])
def test_pages_of_an_epoch_that_the_open_does_not_name_are_freed(shipped: Any) -> None:
    new = Successor()
    new.pages(0, 6, done=6)
    effects = new.core.receive(opening(1, 2, (5, 6), shipped=shipped), OWNER, 0.0)
    assert only(effects, t.Free).key == new.key
    assert only(effects, t.Reserve).base == ""
    assert len(new.core.arrivals) == 0


def test_a_newer_move_begins_anew_and_an_older_one_is_ignored() -> None:
    new = Successor()
    new.pages(0, 3, done=9)
    old = new.key
    again = new.prepare(counter=3)
    assert only(again, t.Free).key == old
    assert new.prepare(counter=2) == []
    assert new.pages(0, 3, done=9, counter=1) == []


def test_what_cannot_be_shipped_is_replayed() -> None:
    new = Successor()
    assert sends(new.pages(0, 0, done=9)) == [(OWNER, m.Arrived("s", EPOCH, 1, 0, True))]
    ask, effects = new.open(((1, OWNER), 6))
    assert (ask.base, only(effects, m.Opened).kept) == ("", 0)


def test_rows_that_are_missing_leave_the_boundary_without_checkpoints() -> None:
    new = Successor()
    new.core.receive(m.Pages("s", EPOCH, 0, 4, 6, memoryview(b"kv"), memoryview(b"")), "old", 0.0)
    new.pages(4, 2, done=6)
    _, effects = new.open(((1, OWNER), 6))
    assert only(effects, m.Opened).kept == 6
    assert new.core.checkpoint_bytes == 2 * ROW


def test_pages_that_were_not_asked_for_are_rejected() -> None:
    new = Successor()
    assert rejected(new.pages(0, 3, done=9, sender="stranger"), "stranger")
    assert rejected(new.pages(0, 65, done=99), "old")
    uneven = m.Pages("s", EPOCH, 0, 3, 9, memoryview(b""), memoryview(b"1234"))
    assert rejected(new.core.receive(uneven, "old", 0.0), "old")


def test_pages_that_cannot_be_written_are_a_refusal() -> None:
    new = Successor()
    effects = new.core.spoiled(only(new.pages(0, 3, done=9), t.Import).key)
    assert only(effects, t.Free).key == new.key
    assert only(effects, m.Refused).code == "failed"


def test_it_is_freed_by_a_release_by_a_refusal_and_by_time() -> None:
    new = Successor()
    assert only(new.core.receive(m.Release("s", EPOCH), OWNER, 0.0), t.Free).key == new.key
    new = Successor()
    assert only(new.core.tick(ArrivalsConfig().lease_s), t.Free).key == new.key
    new = Successor()
    new.prepare(counter=2)
    full = new.core.arrivals.refused(new.key, "busy", "full", 0.5)
    assert full is not None
    assert only(full, m.Refused).epoch == (2, OWNER)
    assert len(new.core.arrivals) == 0


def test_another_placement_and_layers_that_are_not_here_are_refused() -> None:
    new = Successor()
    assert only(new.prepare(counter=2, placement_id=(1, 6)), m.Refused).code == "unknown_placement"
    new.core.set_spans([LayerSpan("toy", 0, 2)])
    assert only(new.prepare(counter=2), m.Refused).code == "not_held"


def test_a_session_that_is_open_here_is_not_prepared() -> None:
    hop = Hopper(1)
    room = {"placement_id": PLACEMENT, "max_positions": 64, "priority": "normal", "source": "old"}
    prepare = m.Prepare("s", (2, OWNER), route=route_at(1), hop=1, **room)  # type: ignore[arg-type]
    assert hop.receive(prepare, OWNER) == []
    assert rejected(hop.receive(prepare, "stranger"), "stranger")


def test_so_many_pieces_are_in_flight_at_once() -> None:
    new = Successor()
    limit = ArrivalsConfig().fetching
    room = {"placement_id": PLACEMENT, "max_positions": 64, "priority": "normal", "source": "old"}
    fetched = 1
    for number in range(2 * limit):
        message = m.Prepare(f"s{number}", EPOCH, route=route_at(1), hop=1, **room)  # type: ignore[arg-type]
        effects = new.core.receive(message, OWNER, 0.0)
        fetched += len(sends(new.core.reserved(only(effects, t.Reserve).key, 0.0)))
    assert fetched == limit
    assert len(sends(new.core.tick(ArrivalsConfig().follow_s))) == 0
    assert ("old", m.Fetch("s3", EPOCH, (2, 4), 0)) in sends(new.pages(0, 3, done=3))
