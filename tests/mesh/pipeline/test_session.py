"""Every transition of a session at its owner, on a clock that the test holds."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mesh.core import Effect, Emit, Rejected, Send
from mesh.pipeline import messages as m
from mesh.pipeline import session as s
from mesh.types import Hop, Route, SamplingParams

PROMPT = (10, 11, 12)
ROUTE = Route("toy", (Hop("a", 0, 2), Hop("b", 2, 4), Hop("c", 4, 6)))
OTHER = Route("toy", (Hop("a", 0, 2), Hop("b2", 2, 4), Hop("c", 4, 6)))
STOP = 7
CONFIG = s.SessionConfig()


def request(**more: Any) -> m.SessionRequest:
    sampling = SamplingParams(max_tokens=more.pop("max_tokens", 100), stop_token_ids=(STOP,))
    return m.SessionRequest(model="toy", prompt=PROMPT, sampling=sampling, **more)


def sends(effects: list[Effect]) -> list[tuple[str, Any]]:
    return [(effect.to, effect.message) for effect in effects if isinstance(effect, Send)]


def opens(effects: list[Effect]) -> list[str]:
    return [to for to, message in sends(effects) if isinstance(message, m.Open)]


def released(effects: list[Effect]) -> list[str]:
    return [to for to, message in sends(effects) if isinstance(message, m.Release)]


def events(effects: list[Effect]) -> list[Any]:
    return [effect.event for effect in effects if isinstance(effect, Emit)]


class Owner:
    """One session and the clock; hops say what the test makes them say."""

    def __init__(self, **more: Any) -> None:
        self.now = 100.0
        self.core = s.Session("s", "me", request(**more), random.Random(1), self.now)
        self.started = self.core.start(self.now)

    def follow(self, route: Route = ROUTE) -> list[Effect]:
        return self.core.follow(route, (1, 5), self.now)

    def open(self, route: Route = ROUTE) -> Owner:
        """Running on ``route``."""
        self.follow(route)
        for index in range(len(route.hops)):
            self.opened(index)
        assert self.core.state is s.State.RUNNING
        return self

    def hear(self, message: Any, sender: str) -> list[Effect]:
        return self.core.receive(message, sender, self.now)

    def opened(self, index: int, kept: int = 0) -> list[Effect]:
        assert self.core.route is not None
        return self.hear(m.Opened("s", self.core.epoch, index, kept), self.core.route.hops[index].node)

    def refused(self, index: int, code: Any, retry_after_s: float = 1.0) -> list[Effect]:
        assert self.core.route is not None
        message = m.Refused("s", self.core.epoch, index, code, f"it is {code}", retry_after_s)
        return self.hear(message, self.core.route.hops[index].node)

    def token(self, position: int | None = None, token: int = 30, after: float = 0.1) -> list[Effect]:
        self.now += after
        position = self.core.accepted if position is None else position
        return self.hear(m.Token("s", self.core.epoch, position, token), self.core.route.hops[-1].node)

    def standing(self, *at: tuple[int, int]) -> list[Effect]:
        """Every hop answers Progress with (submitted, done)."""
        effects = []
        for index, (submitted, done) in enumerate(at):
            node = self.core.route.hops[index].node
            effects += self.hear(m.Progressing("s", self.core.epoch, index, submitted, done, 0), node)
        return effects

    def wait(self) -> list[Effect]:
        """To the deadline, and tick."""
        assert self.core.deadline is not None
        assert self.core.deadline >= self.now
        self.now = self.core.deadline
        return self.core.tick(self.now)

    def wait_for_stall(self) -> list[Effect]:
        effects = self.wait()
        assert [type(message) for _, message in sends(effects)] == [m.Progress] * 3
        return effects


def need(effects: list[Effect]) -> s.NeedRoute:
    (event,) = [event for event in events(effects) if isinstance(event, s.NeedRoute)]
    return event


def failed(effects: list[Effect]) -> s.Failed:
    (event,) = events(effects)
    assert isinstance(event, s.Failed)
    return event


# -- opening -----------------------------------------------------------------------------------------------------------


def test_it_begins_with_a_question_for_a_route() -> None:
    owner = Owner()
    assert owner.started == [Emit(s.NeedRoute((), ()))]
    assert owner.core.state is s.State.ROUTING


def test_every_hop_is_opened_and_both_ends_hold_the_whole_request() -> None:
    effects = Owner().follow()
    assert opens(effects) == ["a", "b", "c"]
    first, middle, last = (message for _, message in sends(effects))
    assert (first.hop, middle.hop, last.hop) == (0, 1, 2)
    assert (first.request, middle.request, last.request) == (request(), None, request())
    assert (first.accepted, first.max_positions, first.placement_id) == (3, 103, (1, 5))
    assert first.epoch == (1, "me")


def test_a_question_that_the_driver_did_not_answer_is_asked_again() -> None:
    owner = Owner()
    assert owner.wait() == owner.started


def test_only_hops_that_did_not_answer_are_opened_again() -> None:
    owner = Owner()
    owner.follow()
    owner.opened(1)
    assert opens(owner.wait()) == ["a", "c"]
    assert owner.now == 100.0 + CONFIG.resend_s


def test_it_runs_when_every_hop_has_opened() -> None:
    owner = Owner()
    owner.follow()
    for index in (2, 0):
        owner.opened(index)
        owner.opened(index)
        assert owner.core.state is s.State.OPENING
    owner.opened(1)
    assert owner.core.state is s.State.RUNNING


def test_a_hop_that_does_not_open_is_replaced() -> None:
    owner = Owner()
    owner.follow()
    owner.opened(0)
    owner.opened(2)
    effects = owner.wait()
    while not events(effects):
        assert opens(effects) == ["b"]
        effects = owner.wait()
    assert owner.now == 100.0 + CONFIG.open_timeout_s
    assert need(effects) == s.NeedRoute((ROUTE.hops[0], ROUTE.hops[2]), ("b",))


def test_a_new_route_has_a_new_epoch_and_releases_who_is_no_longer_on_it() -> None:
    owner = Owner().open()
    owner.core.lost("b", "reset", owner.now)
    effects = owner.follow(OTHER)
    assert released(effects) == ["b"]
    assert opens(effects) == ["a", "b2", "c"]
    assert {message.epoch for _, message in sends(effects)} == {(2, "me")}


def test_a_full_hop_at_the_start_is_gone_around() -> None:
    owner = Owner()
    owner.follow()
    owner.opened(0)
    effects = owner.refused(1, "busy", 3.0)
    assert released(effects) == ["a", "b", "c"]
    assert need(effects).exclude == ("b",)
    assert opens(owner.follow(OTHER)) == ["a", "b2", "c"]
    assert owner.core.recoveries == []


def test_where_every_hop_is_full_the_request_is_refused_as_busy() -> None:
    owner = Owner(max_retries=2)
    for _ in range(2):
        owner.follow()
        need(owner.refused(1, "busy", 0.0))
    owner.follow()
    end = failed(effects := owner.refused(1, "busy", 4.0))
    assert (end.code, end.why, end.retry_after_s) == ("busy", "it is busy", 4.0)
    assert released(effects) == ["a", "b", "c"]


def test_a_full_hop_may_be_asked_again_when_it_said() -> None:
    owner = Owner()
    owner.follow()
    owner.refused(1, "busy", 1.5)
    owner.now += 1.6
    owner.follow(OTHER)
    assert need(owner.refused(0, "busy")).exclude == ("a",)


@pytest.mark.parametrize("code", ["stale_placement", "unknown_placement"])
def test_another_placement_is_no_fault_of_the_hop(code: str) -> None:
    owner = Owner()
    owner.follow()
    assert owner.refused(1, code, 0.3) == []
    assert owner.core.deadline == pytest.approx(owner.now + 0.3)
    assert need(owner.wait()) == s.NeedRoute(ROUTE.hops, ())


def test_a_hop_cannot_make_the_owner_wait_for_ever() -> None:
    owner = Owner()
    owner.follow()
    owner.refused(1, "stale_placement", 1e9)
    assert owner.core.deadline <= owner.now + CONFIG.backoff_max_s


def test_placements_that_never_agree_end_it() -> None:
    owner = Owner(max_retries=2)
    for _ in range(2):
        owner.follow()
        assert owner.refused(1, "stale_placement") == []
        owner.wait()
    owner.follow()
    assert failed(owner.refused(1, "stale_placement")).code == "no_route"


@pytest.mark.parametrize("code", ["not_held", "unknown_session", "failed"])
def test_any_other_refusal_loses_the_hop(code: str) -> None:
    owner = Owner().open()
    assert need(owner.refused(2, code)) == s.NeedRoute(ROUTE.hops[:2], ("c",))


def test_what_no_sampler_can_draw_ends_the_session_and_only_the_sampler_may_say_so() -> None:
    owner = Owner().open()
    owner.token()
    assert need(owner.refused(0, "dead_end")).exclude == ("a",)
    owner = Owner().open()
    owner.token()
    end = failed(effects := owner.refused(2, "dead_end"))
    assert (end.code, end.why.split(";")[0]) == ("dead_end", "it is dead_end")
    assert released(effects) == ["a", "b", "c"]


def test_a_hop_that_is_full_later_is_lost() -> None:
    owner = Owner().open()
    owner.token()
    owner.core.lost("b", "reset", owner.now)
    owner.follow(OTHER)
    effects = owner.refused(1, "busy")
    assert released(effects) == []
    assert need(effects).exclude == ("b", "b2")


def test_a_refusal_without_a_hop_is_that_of_its_sender() -> None:
    owner = Owner().open()
    refusal = m.Refused("s", owner.core.epoch, -1, "unknown_session", "gone")
    assert need(owner.hear(refusal, "b")).exclude == ("b",)
    owner.follow(OTHER)
    refusal = m.Refused("s", owner.core.epoch, -1, "unknown_session", "gone")
    assert [type(event) for event in events(owner.hear(refusal, "stranger"))] == [Rejected]


# -- no route ----------------------------------------------------------------------------------------------------------


def test_without_a_route_a_request_is_refused_before_it_began() -> None:
    owner = Owner()
    effects = owner.core.unroutable("no live node holds layer 2", owner.now)
    assert (failed(effects).code, failed(effects).why) == ("no_route", "no live node holds layer 2")
    assert owner.core.deadline is None


def test_a_session_that_has_begun_waits_for_a_route() -> None:
    owner = Owner().open()
    owner.token()
    owner.core.lost("b", "reset", owner.now)
    for _ in range(20):
        assert owner.core.unroutable("none", owner.now) == []
        assert owner.now < owner.core.deadline <= owner.now + CONFIG.backoff_max_s
        assert need(owner.wait()).keep == (ROUTE.hops[0], ROUTE.hops[2])
    owner.open(OTHER)
    owner.token()
    assert len(owner.core.recoveries) == 1


def test_where_nobody_else_holds_its_layers_a_lost_hop_is_tried_again_soon() -> None:
    owner = Owner().open()
    owner.token()
    lost_at = owner.now
    ask = need(owner.core.lost("b", "reset", owner.now))
    while ask.exclude:
        assert owner.core.unroutable("none", owner.now) == []
        ask = need(owner.wait())
    assert CONFIG.forgive_s <= owner.now - lost_at <= CONFIG.forgive_s + 2 * CONFIG.backoff_max_s
    assert ask.keep == ROUTE.hops


def test_a_session_that_lost_a_hop_while_it_opened_waits_too() -> None:
    owner = Owner()
    owner.follow()
    owner.core.lost("b", "reset", owner.now)
    assert owner.core.unroutable("none", owner.now) == []


def test_an_answer_that_comes_too_late_does_nothing() -> None:
    owner = Owner().open()
    assert owner.core.unroutable("none", owner.now) == []
    owner.core.finish("cancelled", owner.now)
    assert owner.follow() == []


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_each_token_is_accepted_once_and_in_order() -> None:
    owner = Owner().open()
    assert events(owner.token(3, 30)) == [s.Accepted(3, 30, 0.0, ())]
    assert owner.token(3, 31) == []
    assert events(owner.token(4, 32)) == [s.Accepted(4, 32, 0.0, ())]
    assert owner.core.drawn == [30, 32]


def test_a_token_past_a_lost_one_asks_for_it() -> None:
    owner = Owner().open()
    assert owner.token(4) == [Send("c", m.Progress("s", (1, "me"), 3))]
    assert owner.core.drawn == []


def test_tokens_may_come_while_a_slower_hop_still_opens() -> None:
    owner = Owner()
    owner.follow()
    owner.opened(0)
    owner.opened(2)
    assert events(owner.token()) == []  # what it says is not sure to be held by all who must
    assert events(owner.opened(1)) == [s.Accepted(3, 30, 0.0, ())]
    assert owner.core.state is s.State.RUNNING


@pytest.mark.parametrize(
    ("message", "sender"),
    [
        (m.Token("s", (1, "me"), 3, 30), "a"),
        (m.Token("s", (1, "me"), 3, 30), "stranger"),
        (m.Opened("s", (1, "me"), 0, 0), "b"),
        (m.Opened("s", (1, "me"), 3, 0), "c"),
        (m.Opened("s", (1, "me"), -2, 0), "b"),
        (m.Refused("s", (1, "me"), 1, "failed", "x"), "a"),
        (m.Progressing("s", (1, "me"), 9, 0, 0, 0), "a"),
        (m.PromptLogprobs("s", (1, "me"), 1, ()), "b"),
    ],
)
def test_hostile_messages(message: Any, sender: str) -> None:
    owner = Owner().open()
    deadline = owner.core.deadline
    (event,) = events(effects := owner.hear(message, sender))
    assert (type(event), event.sender, sends(effects)) == (Rejected, sender, [])
    assert (owner.core.state, owner.core.drawn, owner.core.deadline) == (s.State.RUNNING, [], deadline)


@pytest.mark.parametrize("epoch", [(0, "me"), (2, "me"), (1, "you")])
@pytest.mark.parametrize("session", ["s", "t"])
def test_other_epochs_and_sessions_are_ignored(epoch: m.Epoch, session: str) -> None:
    owner = Owner().open()
    owner.token()
    assert owner.hear(m.Token(session, epoch, 4, 30), "c") == []
    assert owner.hear(m.Refused(session, epoch, 1, "failed", "x"), "b") == []


@pytest.mark.parametrize(("tokens", "reason"), [([30, STOP], "stop"), ([30, 31, 32], "length")])
def test_it_ends_with_the_last_token(tokens: list[int], reason: str) -> None:
    owner = Owner(max_tokens=3).open()
    for token in tokens:
        assert owner.core.state is s.State.RUNNING
        effects = owner.token(token=token)
    assert events(effects) == [s.Accepted(2 + len(tokens), tokens[-1], 0.0, ()), s.Ended(reason)]
    assert released(effects) == ["a", "b", "c"]
    assert (owner.core.state, owner.core.deadline) == (s.State.ENDED, None)
    assert owner.core.tick(owner.now + 1e6) == owner.token() == []


def test_finishing_tells_every_node_that_ever_was_on_a_route() -> None:
    owner = Owner().open()
    owner.core.lost("b", "reset", owner.now)
    owner.open(OTHER)
    effects = owner.core.finish("cancelled", owner.now)
    assert released(effects) == ["a", "b", "c", "b2"]
    assert events(effects) == [s.Ended("cancelled")]
    assert owner.core.finish("cancelled", owner.now) == []


def test_scores_of_the_prompt_are_passed_on() -> None:
    rows = ((-1.0, ((5, -0.5),)),)
    effects = Owner().open().hear(m.PromptLogprobs("s", (1, "me"), 1, rows), "c")
    assert events(effects) == [s.PromptScored(1, rows)]


# -- acknowledging -----------------------------------------------------------------------------------------------------


def test_the_first_hop_hears_every_few_tokens_what_the_client_has_taken() -> None:
    owner = Owner().open()
    acks = []
    for _ in range(20):
        owner.token()
        acks += sends(owner.core.acknowledge(owner.core.accepted, owner.now))
    every = CONFIG.ack_every
    assert acks == [("a", m.Ack("s", (1, "me"), 3 + every)), ("a", m.Ack("s", (1, "me"), 3 + 2 * every))]
    assert owner.core.acknowledge(0, owner.now) == []


def test_opening_anew_acknowledges_what_was_accepted() -> None:
    owner = Owner().open()
    for _ in range(10):
        owner.token()
    owner.core.acknowledge(owner.core.accepted, owner.now)
    owner.token()
    owner.core.lost("b", "reset", owner.now)
    owner.open(OTHER)
    acks = []
    for _ in range(CONFIG.ack_every):
        owner.token()
        acks.append(sends(owner.core.acknowledge(owner.core.accepted, owner.now)))
    assert acks == [[]] * (CONFIG.ack_every - 1) + [[("a", m.Ack("s", (2, "me"), owner.core.accepted))]]


def test_a_slow_client_is_no_stall() -> None:
    owner = Owner().open()
    for _ in range(m.RUN_AHEAD):
        owner.token()
    for _ in range(10):
        assert owner.wait() == []
    assert sends(owner.core.acknowledge(owner.core.accepted, owner.now)) == [("a", m.Ack("s", (1, "me"), 35))]
    owner.wait_for_stall()


def test_a_client_that_takes_up_again_gives_the_route_time() -> None:
    owner = Owner().open()
    for _ in range(m.RUN_AHEAD):
        owner.token()
    owner.now = owner.core.deadline - 0.01
    owner.core.acknowledge(owner.core.accepted, owner.now)
    assert owner.core.deadline >= owner.now + CONFIG.stall_min_s


# -- stalls ------------------------------------------------------------------------------------------------------------


def test_the_first_token_has_its_own_deadline() -> None:
    owner = Owner().open()
    owner.wait_for_stall()
    assert owner.now == 100.0 + CONFIG.first_token_s


def test_later_tokens_may_be_some_times_as_late_as_the_latest() -> None:
    owner = Owner().open()
    for after in (0.1, 0.2, 0.1):
        owner.token(after=after)
    last = owner.now
    owner.wait_for_stall()
    assert owner.now == pytest.approx(last + 0.2 * CONFIG.stall_factor)


def test_a_hop_that_is_silent_is_replaced() -> None:
    owner = Owner().open()
    owner.token()
    owner.wait_for_stall()
    asked = owner.now
    for index in (0, 2):
        owner.hear(m.Progressing("s", owner.core.epoch, index, 4, 4, 4), owner.core.route.hops[index].node)
    assert need(owner.wait()) == s.NeedRoute((ROUTE.hops[0], ROUTE.hops[2]), ("b",))
    assert owner.now == pytest.approx(asked + CONFIG.silent_s)


@pytest.mark.parametrize(
    ("standing", "stuck"),
    [
        (((4, 3), (3, 3), (3, 3)), "a"),
        (((4, 4), (4, 3), (3, 3)), "b"),
        (((4, 4), (4, 4), (4, 3)), "c"),
        (((4, 4), (3, 3), (3, 3)), "b"),
        (((4, 4), (4, 4), (3, 3)), "c"),
        (((4, 4), (4, 4), (4, 4)), "c"),
    ],
)
def test_where_nothing_moves_the_first_stuck_hop_is_replaced(standing: Any, stuck: str) -> None:
    owner = Owner().open()
    owner.token()
    for _ in range(CONFIG.stuck_rounds):
        owner.wait_for_stall()
        assert owner.standing(*standing) == []
    owner.wait_for_stall()
    assert need(owner.standing(*standing)).exclude == (stuck,)


def test_a_route_that_moves_is_given_longer_and_never_replaced() -> None:
    owner = Owner(timeout_s=1e6).open()
    pauses = []
    for done in range(12):
        since = owner.now
        owner.wait_for_stall()
        pauses.append(owner.now - since)
        assert owner.standing((100, done), (done, done), (done, done)) == []
    assert pauses[1] < pauses[2] < pauses[3]
    assert max(pauses) <= CONFIG.stall_max_s


def test_lateness_of_the_own_loop_is_no_stall_of_the_route() -> None:
    owner = Owner().open()
    owner.now = owner.core.deadline + 5.0
    assert owner.core.tick(owner.now) == []
    assert owner.core.deadline == pytest.approx(owner.now + 5.0)


def test_lateness_of_the_own_loop_is_no_silence() -> None:
    owner = Owner().open()
    owner.wait_for_stall()
    owner.now = owner.core.deadline + 5.0
    assert owner.core.tick(owner.now) == []
    assert owner.standing((3, 3), (3, 3), (3, 3)) == []


def test_a_token_ends_the_alarm() -> None:
    owner = Owner().open()
    owner.wait_for_stall()
    owner.token()
    owner.wait_for_stall()


# -- losing hops -------------------------------------------------------------------------------------------------------


def test_a_lost_node_is_replaced_and_kept_out_for_a_while() -> None:
    owner = Owner().open()
    assert need(owner.core.lost("a", "dead", owner.now)) == s.NeedRoute(ROUTE.hops[1:], ("a",))
    owner.open(Route("toy", (Hop("a2", 0, 2), *ROUTE.hops[1:])))
    owner.now += CONFIG.suspect_s + 0.1
    assert need(owner.core.lost("c", "dead", owner.now)).exclude == ("c",)


def test_a_node_that_is_not_on_the_route_may_go() -> None:
    owner = Owner().open()
    assert owner.core.lost("z", "dead", owner.now) == []
    assert owner.core.state is s.State.RUNNING
    owner.core.finish("cancelled", owner.now)
    assert owner.core.lost("a", "dead", owner.now) == []


def test_a_second_loss_while_a_route_is_sought_is_remembered() -> None:
    owner = Owner().open()
    owner.token()
    owner.core.lost("a", "dead", owner.now)
    owner.core.unroutable("none", owner.now)
    assert owner.core.lost("c", "dead", owner.now) == []
    assert need(owner.wait()) == s.NeedRoute((ROUTE.hops[1],), ("a", "c"))


def test_the_trace_of_a_recovery() -> None:
    owner = Owner().open()
    for _ in range(5):
        owner.token()
    owner.core.lost("b", "reset", owner.now)
    owner.core.follow(OTHER, (1, 5), owner.now, "tokens")
    for index, kept in ((0, 8), (1, 0), (2, 7)):
        owner.opened(index, kept)
    effects = owner.token(after=0.25)
    (told,) = [event for event in events(effects) if isinstance(event, s.Recovered)]
    assert told.recovery == owner.core.recoveries[0]
    assert (told.recovery.cause, told.recovery.hop, told.recovery.detected_by) == ("reset", 1, "reset")
    assert told.recovery.pause_ms == pytest.approx(250.0)
    assert (told.recovery.positions_replayed, told.recovery.exact) == (7, "tokens")


def test_recoveries_without_progress_are_counted() -> None:
    owner = Owner(max_retries=2).open()
    owner.token()
    for _ in range(2):
        need(owner.core.lost("b", "reset", owner.now))
        owner.open()
    end = failed(effects := owner.core.lost("b", "reset", owner.now))
    assert (end.code, "1 of at most 100 tokens" in end.why) == ("session_lost", True)
    assert released(effects) == ["a", "b", "c"]


def test_progress_gives_the_retries_back() -> None:
    owner = Owner(max_retries=1).open()
    for _ in range(5):
        need(owner.core.lost("b", "reset", owner.now))
        owner.open()
        owner.token()
    assert len(owner.core.recoveries) == 5


def test_max_retries_of_none_means_that_the_first_loss_ends_it() -> None:
    owner = Owner(max_retries=0).open()
    assert failed(owner.core.lost("b", "reset", owner.now)).why == "hop 1 was lost (reset)"


# -- the session's own deadline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["routing", "opening", "running"])
def test_the_sessions_deadline(stage: str) -> None:
    owner = Owner(timeout_s=30.0)
    if stage == "opening":
        owner.follow()
    if stage == "running":
        owner.open()
    end = failed(effects := owner.core.tick(130.0))
    assert (end.code, end.why) == ("timeout", "the session's deadline of 30 s passed")
    assert released(effects) == ([] if stage == "routing" else ["a", "b", "c"])


def test_the_deadline_is_never_past_the_sessions_end() -> None:
    owner = Owner(timeout_s=0.2).open()
    assert owner.core.deadline == pytest.approx(100.2)
    assert failed(owner.wait()).code == "timeout"


@pytest.mark.parametrize("early", [0.0, 0.1, 1.9])
def test_an_early_tick_does_nothing(early: float) -> None:
    owner = Owner().open()
    due = owner.core.deadline
    assert owner.core.tick(100.0 + early) == []
    assert owner.core.deadline == due


# -- no room -----------------------------------------------------------------------------------------------------------


def parked(effects: list[Effect]) -> list[str]:
    return [to for to, message in sends(effects) if isinstance(message, m.Park)]


@pytest.mark.parametrize("code", ["busy", "paused"])
def test_a_hop_that_took_its_room_back_is_gone_around(code: str) -> None:
    owner = Owner().open()
    owner.token()
    effects = owner.refused(1, code)
    assert (need(effects).exclude, parked(effects)) == (("b",), [])
    assert opens(owner.follow(OTHER)) == ["a", "b2", "c"]


def test_without_room_anywhere_every_hop_gives_its_room_up_and_it_waits() -> None:
    owner = Owner(max_retries=1).open()
    owner.token()
    for _ in range(5):  # more often than there are retries
        owner.refused(1, "paused")
        effects = owner.core.unroutable("nobody else holds layers [2, 4)", owner.now)
        assert (parked(effects), owner.core.state) == (["a", "b", "c"], s.State.PAUSED)
        assert owner.core.waits_for == "it is paused"
        assert owner.hear(m.Token("s", owner.core.epoch, owner.core.accepted, 31), "c") == [], "nothing of this epoch"
        assert need(owner.wait()).keep == ROUTE.hops
        owner.open()
    owner.token()
    (told,) = owner.core.recoveries
    assert (told.cause, told.detected_by, owner.core.waits_for) == ("paused", "refusal", "")


def test_each_pause_in_a_row_is_longer_up_to_a_bound() -> None:
    owner = Owner().open()
    owner.token()
    waits = []
    for _ in range(8):
        owner.refused(1, "busy")
        owner.core.unroutable("full", owner.now)
        began = owner.now
        owner.wait()
        waits.append(owner.now - began)
        owner.follow()
    for number, wait in enumerate(waits):
        most = min(CONFIG.pause_max_s, CONFIG.pause_s * 2**number)
        assert most / 2 <= wait <= most


def test_a_paused_session_ends_at_its_deadline_and_frees_everything() -> None:
    owner = Owner(timeout_s=5.0).open()
    owner.token()
    owner.refused(1, "paused")
    owner.core.unroutable("full", owner.now)
    owner.now = 105.0
    effects = owner.core.tick(owner.now)
    assert released(effects) == ["a", "b", "c"]
    assert [event.code for event in events(effects)] == ["timeout"]


def test_refusals_before_it_began_are_no_recoveries() -> None:
    owner = Owner(max_retries=2)
    for _ in range(2):
        owner.follow()
        owner.refused(1, "busy", 0.0)
    owner.open()
    assert need(owner.core.lost("a", "reset", owner.now)).exclude == ("b", "a")
