"""The owner's end when owners change: adopting, yielding, and showing only what another node holds."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mesh.core import Effect, Emit, Send
from mesh.pipeline import events as e
from mesh.pipeline import messages as m
from mesh.pipeline.journal import Adopt
from mesh.pipeline.session import Session
from mesh.types import Hop, Route, SamplingParams

PROMPT = (1, 2, 3)


def route(*nodes: str) -> Route:
    return Route("toy", tuple(Hop(node, 2 * at, 2 * at + 2) for at, node in enumerate(nodes)))


def request(max_tokens: int = 8) -> m.SessionRequest:
    return m.SessionRequest(model="toy", prompt=PROMPT, sampling=SamplingParams(max_tokens=max_tokens))


class Owner:
    """A session at ``me``; its parties answer what the test makes them answer."""

    def __init__(self, session: Session, way: Route, witness: str | None = None) -> None:
        self.now, self.core = 0.0, session
        self.started = session.start(self.now)
        self.followed = session.follow(way, (0, 0), self.now, witness=witness)

    def hear(self, message: Any, sender: str) -> list[Effect]:
        self.now += 0.01
        return self.core.receive(message, sender, self.now)

    def open_all(self) -> list[Effect]:
        effects: list[Effect] = []
        for index, node in enumerate(self.core.parties):
            effects += self.hear(m.Opened("s", self.core.epoch, index, 0), node)
        return effects

    def token(self, token: int) -> list[Effect]:
        assert self.core.route is not None
        message = m.Token("s", self.core.epoch, self.core.accepted, token)
        return self.hear(message, self.core.route.hops[-1].node)

    def held(self, tokens: int, node: str) -> list[Effect]:
        return self.hear(m.Held("s", self.core.epoch, tokens), node)


def fresh(way: Route, witness: str | None = None, max_tokens: int = 8) -> Owner:
    owner = Owner(Session("s", "me", request(max_tokens), random.Random(1), 0.0), way, witness)
    owner.open_all()
    return owner


def adopter(drawn: tuple[int, ...] = (20, 21), way: Route | None = None, max_tokens: int = 8) -> Owner:
    old = route("a", "b", "me")
    found = Adopt("s", (4, "gone"), old, request(max_tokens), drawn, 100.0, "reset")
    return Owner(Session.adopt(found, "me", random.Random(1), 0.0), way or old)


def shown(effects: list[Effect]) -> list[tuple[int, int]]:
    return [
        (x.event.position, x.event.token) for x in effects if isinstance(x, Emit) and isinstance(x.event, e.Accepted)
    ]


def last(effects: list[Effect], kind: type) -> Any:
    return next((x.event for x in effects if isinstance(x, Emit) and isinstance(x.event, kind)), None)


def sent(effects: list[Effect], kind: type) -> list[tuple[str, Any]]:
    return [(x.to, x.message) for x in effects if isinstance(x, Send) and isinstance(x.message, kind)]


# -- what is shown, and when -------------------------------------------------------------------------------------------


def test_a_token_of_another_nodes_sampler_is_shown_at_once() -> None:
    assert shown(fresh(route("me", "b")).token(20)) == [(3, 20)]


def test_an_owner_that_samples_waits_for_the_first_hop() -> None:
    owner = fresh(route("a", "b", "me"))
    assert shown(owner.token(20)) == shown(owner.token(21)) == []
    assert shown(owner.held(4, "b")) == []
    assert shown(owner.held(4, "a")) == [(3, 20)]
    assert shown(owner.held(5, "a")) == [(4, 21)]


def test_an_owner_that_is_all_hops_feeds_and_awaits_its_witness() -> None:
    owner = fresh(route("me"), witness="w")
    effects = owner.token(20)
    assert (shown(effects), sent(effects, m.Feed)) == ([], [("w", m.Feed("s", (1, "me"), 3, (20,)))])
    assert shown(owner.held(4, "w")) == [(3, 20)]


def test_a_mesh_of_one_node_shows_what_it_has() -> None:
    assert shown(fresh(route("me")).token(20)) == [(3, 20)]


def test_no_witness_is_taken_where_none_is_needed() -> None:
    assert fresh(route("a", "me"), witness="w").core.parties == ["a", "me"]


def test_the_end_comes_after_the_last_token_is_held() -> None:
    owner = fresh(route("a", "me"), max_tokens=1)
    assert last(owner.token(20), e.Ended) is None
    effects = owner.held(4, "a")
    assert (shown(effects), last(effects, e.Ended)) == ([(3, 20)], e.Ended("length"))


def test_after_a_change_of_holder_nothing_is_shown_until_the_new_one_has_it() -> None:
    owner = fresh(route("a", "me"))
    owner.token(20)
    owner.core.lost("a", "reset", owner.now)
    owner.core.follow(route("x", "me"), (0, 0), owner.now)
    assert shown(owner.held(4, "a")) == []
    assert shown(owner.open_all()) == [(3, 20)]


def test_a_silent_witness_is_replaced() -> None:
    owner = fresh(route("me"), witness="w")
    owner.token(20)
    effects: list[Effect] = []
    while last(effects, e.NeedRoute) is None:
        assert owner.core.deadline is not None
        owner.now = owner.core.deadline
        effects = owner.core.tick(owner.now)
        if sent(effects, m.Progress):
            assert ("w", m.Feed("s", (1, "me"), 3, (20,))) in sent(effects, m.Feed), "what it lacks is sent again"
            owner.hear(m.Progressing("s", (1, "me"), 0, 3, 3, 4), "me")
    assert last(effects, e.NeedRoute).exclude == ("w",)


def test_a_holder_that_asks_is_told_that_the_owner_lives() -> None:
    owner = fresh(route("me", "b"))
    assert owner.held(3, "b") == [Send("b", m.Lease((("s", (1, "me")),)))]
    assert owner.hear(m.Held("s", (0, "x"), 3), "stranger") == [Send("stranger", m.Release("s", (1, "me")))]


# -- adopting ----------------------------------------------------------------------------------------------------------


def test_an_adopter_keeps_the_survivors_and_opens_a_higher_epoch() -> None:
    owner = adopter()
    assert owner.started == [Emit(e.NeedRoute(route("a", "b", "me").hops, ("gone",)))]
    opens = sent(owner.followed, m.Open)
    assert [(to, o.epoch, o.accepted, o.left_s) for to, o in opens] == [
        (node, (5, "me"), 5, 100.0) for node in ("a", "b", "me")
    ]
    assert opens[0][1].drawn == (20, 21)


def test_inherited_tokens_are_shown_once_others_hold_them_too() -> None:
    owner = adopter()
    assert shown(owner.open_all()) == [(3, 20), (4, 21)]
    assert shown(owner.token(22)) == []
    effects = owner.held(6, "a")
    assert shown(effects) == [(5, 22)]


def test_the_adoption_is_told_as_a_recovery() -> None:
    owner = adopter(way=route("a", "b", "c"))
    owner.open_all()
    told = last(owner.token(22), e.Recovered).recovery
    assert (told.cause, told.hop, told.detected_by) == ("owner lost", -1, "reset")


def test_a_complete_journal_ends_as_soon_as_it_is_held_twice() -> None:
    owner = adopter(drawn=(20, 21), max_tokens=2)
    effects = owner.open_all()
    assert (shown(effects), last(effects, e.Ended)) == ([(3, 20), (4, 21)], e.Ended("length"))
    assert last(effects, e.Recovered) is not None
    assert ("me", m.Release("s", (5, "me"))) in sent(effects, m.Release)


@pytest.mark.parametrize("how", ["not opened yet", "claims again"])
def test_an_end_before_it_was_opened_frees_all_that_knew_it(how: str) -> None:
    """Cancelled, or at its deadline, while no route is found: a hop heeds the owner of an epoch alone, and who is not
    told would adopt it in its turn."""
    old = route("a", "b", "me")
    owner = Session.adopt(Adopt("s", (4, "gone"), old, request(), (), 100.0, "reset"), "me", random.Random(1), 0.0)
    owner.start(0.0)
    newest = 4
    if how == "claims again":
        owner.follow(old, (0, 0), 0.0)
        owner.receive(m.Ahead("s", (5, "me"), (7, "gone"), ()), "b", 0.1)
        newest = 7
    told = sent(owner.finish("cancelled", 0.2), m.Release)
    assert told == [(node, m.Release("s", (newest + 1, "me"))) for node in ("a", "b", "me")]


def test_the_longest_journal_wins() -> None:
    owner = adopter()
    effects = owner.hear(m.Ahead("s", (5, "me"), (4, "gone"), (20, 21, 22, 23)), "a")
    assert last(effects, e.NeedRoute) is not None
    opens = sent(owner.core.follow(route("a", "b", "me"), (0, 0), owner.now), m.Open)
    assert {(o.epoch, o.accepted) for _, o in opens} == {((6, "me"), 7)}
    assert shown(owner.open_all()) == [(3, 20), (4, 21), (5, 22), (6, 23)]


def test_whoever_meets_a_newer_living_owner_yields() -> None:
    owner = adopter()
    effects = owner.hear(m.Ahead("s", (5, "me"), (5, "z")), "b")
    assert effects == [Emit(e.Moved("z"))]
    assert owner.core.state is e.State.ENDED


def test_a_frozen_owner_yields_and_shows_nothing_more() -> None:
    owner = fresh(route("a", "me"))
    owner.token(20)
    assert last(owner.hear(m.Ahead("s", (1, "me"), (2, "a"), (20, 21)), "a"), e.Moved) == e.Moved("a")
    assert owner.held(4, "a") == []


def test_nobody_yields_to_an_owner_that_is_lost_itself() -> None:
    owner = adopter()
    effects = owner.hear(m.Ahead("s", (5, "me"), (7, "gone"), (20, 21, 22)), "b")
    assert last(effects, e.NeedRoute) is not None
    owner.core.follow(route("a", "b", "me"), (0, 0), owner.now)
    assert (owner.core.epoch, owner.core.drawn) == ((8, "me"), [20, 21, 22])


def test_a_loser_that_is_no_hop_frees_its_own_journal() -> None:
    owner = adopter(way=route("a", "b", "c"))
    effects = owner.hear(m.Ahead("s", (5, "me"), (5, "z")), "b")
    assert effects == [Send("me", m.Release("s", (5, "me"))), Emit(e.Moved("z"))]


def test_claims_that_are_refused_without_end_are_given_up() -> None:
    owner = adopter()
    for counter in range(20):
        effects = owner.hear(m.Ahead("s", owner.core.epoch, (owner.core.epoch[0] + 1, "gone")), "b")
        if last(effects, e.Failed) is not None:
            assert counter == request().max_retries
            return
        owner.core.follow(route("a", "b", "me"), (0, 0), owner.now)
    pytest.fail("it goes on for ever")


def test_the_session_keeps_its_deadline_through_an_adoption() -> None:
    owner = adopter()
    owner.now = 100.5
    assert last(owner.core.tick(owner.now), e.Failed).code == "timeout"


def test_lost_tokens_are_asked_for_once_not_by_each_that_follows() -> None:
    owner = fresh(route("a", "b"))
    asked = [len(sent(owner.hear(m.Token("s", (1, "me"), position, 9), "b"), m.Progress)) for position in (4, 5, 6)]
    assert asked == [1, 0, 0]
