"""Planned moves at the owner, and the hop that is to go: what is asked, of whom, and what gives a move up."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.core import Emit, Rejected, Send
from mesh.pipeline import events as e
from mesh.pipeline import messages as m
from mesh.pipeline import work as t
from mesh.pipeline.journal import GIVEN, Adopt, JournalConfig, Journals, disclaim
from mesh.pipeline.moves import Move, sources
from mesh.types import Hop, LayerSpan, Route
from tests.mesh.pipeline.test_session import OTHER, ROUTE, Owner, events, need, opens, released, sends
from tests.mesh.pipeline.test_stage import OWNER, Hopper, only, rejected


class Moving(Owner):
    """Running, and hop 1 has said that it is to go."""

    def __init__(self, route: Route = OTHER) -> None:
        super().__init__()
        self.open()
        self.token()
        self.asked = self.vacate(1)
        self.prepared = self.core.prepare(route, (1, 5), self.now)

    def vacate(self, index: int) -> Any:
        assert self.core.route is not None
        return self.hear(m.Vacate("s", self.core.epoch, index), self.core.route.hops[index].node)

    def arrived(self, have: int, ready: bool, sender: str = "b2") -> Any:
        return self.hear(m.Arrived("s", self.core.epoch, 1, have, ready), sender)


def test_a_hop_that_is_to_go_is_replaced_by_one_that_prepares_first() -> None:
    owner = Moving()
    assert events(owner.asked) == [e.NeedMove((ROUTE.hops[0], ROUTE.hops[2]), ("b",))]
    ((to, ask),) = sends(owner.prepared)
    assert (to, ask.route, ask.hop, ask.source, ask.epoch) == ("b2", OTHER, 1, "b", (1, "me"))
    assert owner.arrived(2, ready=False) == []
    assert owner.core.state is e.State.RUNNING, "it serves on meanwhile"
    assert need(owner.arrived(3, ready=True)).keep == OTHER.hops
    effects = owner.follow(OTHER)
    assert opens(effects) == ["a", "b2", "c"]
    assert {message.shipped for _, message in sends(effects) if isinstance(message, m.Open)} == {((1, "me"), 4)}
    assert released(effects) == ["b"]
    for index, kept in enumerate((4, 3, 3)):
        owner.opened(index, kept)
    (told,) = [x.recovery for x in events(owner.token()) if isinstance(x, e.Recovered)]
    assert (told.cause, told.hop, told.positions_replayed) == ("moved", 1, 0)


def test_what_was_shipped_counts_until_all_hops_are_open() -> None:
    owner = Moving()
    owner.arrived(3, ready=True)
    owner.follow(OTHER)
    owner.refused(0, "stale_placement")
    owner.wait()
    again = owner.follow(OTHER)
    assert {x.shipped for _, x in sends(again) if isinstance(x, m.Open)} == {((1, "me"), 4)}
    for index in range(3):
        owner.opened(index)
    later = owner.core.lost("c", "reset", owner.now)
    assert need(later).keep == OTHER.hops[:2]
    assert {x.shipped for _, x in sends(owner.follow(OTHER)) if isinstance(x, m.Open)} == {None}


def test_a_leaver_that_dies_is_replaced_by_its_successor() -> None:
    owner = Moving()
    owner.arrived(2, ready=False)
    assert need(owner.core.lost("b", "reset", owner.now)).keep == OTHER.hops
    assert {x.shipped for _, x in sends(owner.follow(OTHER)) if isinstance(x, m.Open)} == {((1, "me"), 4)}


def test_another_hop_that_dies_is_replaced_beside_the_leaver() -> None:
    owner = Moving()
    assert need(owner.core.lost("c", "reset", owner.now)).keep == ROUTE.hops[:2]


@pytest.mark.parametrize("what", ["refused", "lost"])
def test_a_move_that_does_not_come_on_is_given_up_and_tried_again(what: str) -> None:
    owner = Moving()
    if what == "refused":
        effects = owner.hear(m.Refused("s", owner.core.epoch, 1, "busy", "full"), "b2")
    else:
        effects = owner.core.lost("b2", "reset", owner.now)
    assert released(effects) == ["b2"]
    assert owner.core.state is e.State.RUNNING
    assert [type(x) for x in events(owner.vacate(1))] == [e.NeedMove]


def test_patience_begins_anew_with_every_piece_and_with_nothing_else() -> None:
    move = Move(ROUTE, OTHER, {"b2": sends(Moving().prepared)[0][1]}, now=0.0, patience_s=5.0)
    move.arrived("b2", m.Arrived("s", (1, "me"), 1, 3, False), now=2.0)
    move.arrived("b2", m.Arrived("s", (1, "me"), 1, 3, False), now=4.0)
    assert (move.until, move.ready, move.gone) == (7.0, False, ["b"])


def test_prepare_is_said_again_until_it_is_heard() -> None:
    owner = Moving()
    owner.now += 0.5
    assert [type(x) for _, x in sends(owner.core.tick(owner.now))].count(m.Prepare) == 1


def test_strangers_neither_arrive_nor_vacate() -> None:
    owner = Moving()
    for message in (m.Arrived("s", (1, "me"), 1, 3, True), m.Vacate("s", (1, "me"), 1)):
        (event,) = events(owner.hear(message, "stranger"))
        assert isinstance(event, Rejected)
    (event,) = events(owner.hear(m.Arrived("s", (1, "me"), 0, 3, True), "a"))
    assert isinstance(event, Rejected), "a hop of the route does not arrive"


def test_sources_compute_all_layers_of_a_new_hop() -> None:
    two = Route("toy", (Hop("a", 0, 2), Hop("x", 2, 3), Hop("y", 3, 6)))
    assert sources(ROUTE, two) == [(1, Hop("x", 2, 3), "b"), (2, Hop("y", 3, 6), "")]


# -- giving a session away ---------------------------------------------------------------------------------------------


def test_an_owner_that_leaves_gives_the_session_to_a_holder_of_its_journal() -> None:
    owner = Owner().open()
    owner.token(token=30)
    effects = owner.core.give_away({"c"})
    assert sends(effects) == [
        ("c", m.Disown("s", (1, "me"), "a", ())),
        ("a", m.Disown("s", (1, "me"), "a", (30,))),
    ]
    assert events(effects) == [e.Moved("a")]
    assert owner.core.state is e.State.ENDED


def test_where_no_holder_stays_the_owner_keeps_the_session() -> None:
    owner = Owner().open()
    assert owner.core.give_away({"a", "c"}) == []
    assert owner.core.state is e.State.RUNNING


def heard(me: str, heir: str) -> tuple[list[Any], float | None]:
    hopper = Hopper(2)
    journals = Journals(me, JournalConfig(), lambda session: [])
    journals.follow(hopper.core._sessions["s"].open, 0.0)
    effects = journals.disowned(m.Disown("s", (1, OWNER), heir, (7, 8)), OWNER, 0.0)
    return [x.event for x in effects if isinstance(x, Emit)], journals.next_due


def test_the_heir_adopts_at_once_with_all_tokens_and_the_others_after_a_while() -> None:
    ((adopt,), _) = heard("me", "me")
    assert isinstance(adopt, Adopt)
    assert (adopt.given, adopt.detected_by, adopt.drawn) == (True, GIVEN, (7, 8))
    nothing, due = heard("me", "hop0")
    assert (nothing, due) == ([], JournalConfig().adopt_step_s)


def test_a_session_just_given_away_is_not_freed_by_its_old_owner() -> None:
    message = m.Held("s", (1, "me"), 5)
    assert disclaim(message, "c", True, "a") == []
    assert disclaim(message, "a", True, "a") == [Send("a", m.Disown("s", (1, "me"), "a"))]


# -- the hop that is to go ---------------------------------------------------------------------------------------------


def test_a_hop_that_is_to_go_tells_the_owners_of_what_runs_over_its_layers() -> None:
    hop = Hopper(1)
    assert sends(hop.core.vacate()) == [(OWNER, m.Vacate("s", hop.epoch, 1))]
    assert hop.core.vacate(LayerSpan("toy", 3, 5)) == hop.core.vacate()
    assert hop.core.vacate(LayerSpan("toy", 4, 6)) == []


def test_pages_are_read_and_sent_with_the_checkpoints_of_the_same_positions() -> None:
    hop = Hopper(1)
    hop.forward(0, 4)
    hop.compute()
    ask = only(hop.receive(m.Fetch("s", hop.epoch, (2, 4), 1), "new"), t.Export)
    assert (ask.to, ask.layers, ask.start, ask.end) == ("new", (2, 4), 1, 4)
    pages = only(hop.core.exported(ask, 2, memoryview(b"kv")), m.Pages)
    assert (pages.start, pages.n, pages.done, bytes(pages.payload)) == (1, 2, 4, b"kv")
    assert bytes(pages.rows) == bytes(hop.core._sessions["s"].checkpoints.rows(1, 3)) != b""
    part = only(hop.receive(m.Fetch("s", hop.epoch, (2, 3), 1), "new"), t.Export)
    assert not only(hop.core.exported(part, 2, memoryview(b"kv")), m.Pages).rows, "another boundary"


def test_what_was_cut_while_it_was_read_is_not_sent() -> None:
    hop = Hopper(1)
    hop.forward(0, 4)
    hop.compute()
    ask = only(hop.receive(m.Fetch("s", hop.epoch, (2, 4), 0), "new"), t.Export)
    hop.gap(0)
    hop.core._sessions["s"].cut(0)
    assert hop.core.exported(ask, 4, memoryview(b"kv")) == []


def test_layers_that_are_not_computed_here_are_not_fetched() -> None:
    hop = Hopper(1)
    for layers in ((0, 4), (2, 5), (3, 3), (4, 2)):
        assert rejected(hop.receive(m.Fetch("s", hop.epoch, layers, 0), "new"), "new")
    assert rejected(hop.receive(m.Fetch("s", hop.epoch, (2, 4), -1), "new"), "new")
