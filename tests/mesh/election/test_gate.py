"""Hostile and foreign messages: they are rejected, change nothing, and never raise (I11, I12)."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from mesh.core import Emit, Rejected, Send
from mesh.election import messages as m
from mesh.election.record import MAX_TERM, Content, RecordId, make_epoch, restamp
from tests.mesh.election import lab
from tests.mesh.election.lab import EPOCH, MESH, START, Lab, core, disk, record

GOOD = record(9, 9)


def rejected(effects: list[Any]) -> list[str]:
    return [event.why for event in lab.events(effects, Rejected)]


def samples(mesh: str = MESH, epoch: int = EPOCH, term: int = 9) -> list[m.Message]:
    """One message of every kind."""
    head, rid = (mesh, epoch, term), RecordId(9, 9)
    return [
        m.AskPreVote(*head, record=rid),
        m.PreVoted(*head, campaign=2, granted=True),
        m.AskVote(*head, record=rid),
        m.Voted(*head, granted=True),
        m.Append(*head, record_id=rid, record_hash=GOOD.hash, committed=rid, sent_at=0.0, record=GOOD),
        m.Appended(*head, record_id=rid, sent_at=0.0),
        m.Announce(*head, record=GOOD, leader="b"),
        m.Notice(*head, record_id=rid, leader="b"),
        m.Announced(*head, record_id=rid),
        m.Fetch(*head, record_id=rid),
        m.TimeoutNow(*head),
        m.Leaving(*head),
        m.Relayed(*head, origin="b", to="a", payload=b"", signature=b""),
    ]


@pytest.mark.parametrize("message", samples(mesh="22" * 16), ids=lambda it: type(it).__name__)
def test_a_message_of_another_mesh_changes_nothing(message: m.Message) -> None:
    """I12."""
    it = core()
    before = it.durable
    effects = it.receive(message, "b", START)
    assert rejected(effects) == ["another mesh"]
    assert len(effects) == 1
    assert it.durable is before


@pytest.mark.parametrize("message", samples(), ids=lambda it: type(it).__name__)
def test_a_revoked_member_is_not_heard(message: m.Message) -> None:
    """I11."""
    it = core(held=record(content=Content(tombstones=("b",)), voters="ac"))
    assert rejected(it.receive(message, "b", START)) == ["a revoked member"]


@pytest.mark.parametrize("message", samples(epoch=make_epoch(0, 5)), ids=lambda it: type(it).__name__)
def test_an_older_epoch_is_answered_with_the_newer_record(message: m.Message) -> None:
    it = core()
    before = it.durable
    effects = it.receive(message, "b", START)
    assert it.durable is before
    if not isinstance(message, m.Relayed | m.Append | m.Announce):  # those are flawed in themselves
        assert [msg.record for _, msg in lab.sent(effects, m.Announce)] == [it.committed]


@pytest.mark.parametrize("message", samples(epoch=make_epoch(2, 5)), ids=lambda it: type(it).__name__)
def test_a_newer_epoch_is_asked_for_its_record_first(message: m.Message) -> None:
    it = core()
    before = it.durable
    effects = it.receive(message, "b", START)
    assert it.durable is before
    if not isinstance(message, m.Relayed | m.Append | m.Announce):
        assert len(lab.sent(effects, m.Fetch)) == 1


@pytest.mark.parametrize(
    "message",
    [
        lab.ask_vote(MAX_TERM + 1),
        lab.ask_vote(-1),
        msgspec.structs.replace(lab.append(9, GOOD), record_id=RecordId(9, 8)),
        msgspec.structs.replace(lab.append(9, GOOD), record_hash=b"x"),
        lab.append(8, GOOD),  # of a later term than its leader's
        lab.append(9, record(9, 9, "ac")),  # its sender is no voter
        lab.append(9, msgspec.structs.replace(GOOD, content=Content(placement=b"x"))),
        m.Announce(MESH, EPOCH, 9, record=msgspec.structs.replace(GOOD, voters=()), leader=None),
        m.Announce(MESH, EPOCH, 9, record=msgspec.structs.replace(GOOD, epoch=5), leader=None),
    ],
)
def test_what_no_honest_node_sends_is_rejected(message: m.Message) -> None:
    it = core()
    before = it.durable
    assert rejected(it.receive(message, "b", START)) != []
    assert it.durable is before


def test_a_second_leader_of_the_own_term_is_a_lie() -> None:
    it, now = lab.leader()
    effects = it.receive(lab.append(2, record(2, 5)), "b", now)
    assert "which this node leads" in rejected(effects)[0]
    assert it.role == "leader"


def test_any_message_in_any_state_raises_nothing() -> None:
    """A thousand messages with random fields at cores in all states; whatever is sent can be encoded and decoded."""
    rng = random.Random(5)
    for _ in range(1000):
        it = rng.choice([lambda: core(), lambda: lab.candidate()[0], lambda: lab.leader()[0]])()
        for _ in range(5):
            message = rng.choice(samples(term=rng.randint(0, 12)))
            effects = it.receive(message, rng.choice("bcdx"), START + rng.uniform(0.0, 9.0))
            effects += it.tick(START + rng.uniform(0.0, 20.0))
            for effect in effects:
                assert not isinstance(effect, Send) or m.decode(m.encode(effect.message)) == effect.message


@pytest.mark.parametrize("message", samples(), ids=lambda it: type(it).__name__)
def test_every_message_survives_its_encoding(message: m.Message) -> None:
    assert m.decode(m.encode(message)) == message


# ---------------------------------------------------------------- relays


def test_a_relayed_request_is_answered_both_ways() -> None:
    mesh = Lab()
    effects = mesh.cores["a"].receive(lab.relayed(lab.ask_vote(2)), "b", mesh.now)
    assert [to for to, _ in lab.sent(effects, m.Voted)] == ["c"]
    assert [(to, msg.to) for to, msg in lab.sent(effects, m.Relayed)] == [("b", "c")]


def test_a_carrier_passes_on_once_and_only_for_its_origin() -> None:
    mesh = Lab()
    packed = lab.relayed(lab.ask_vote(2), to="b")
    assert lab.sent(mesh.cores["a"].receive(packed, "c", mesh.now)) == [("b", packed)]
    assert mesh.cores["a"].receive(packed, "b", mesh.now) == []


@pytest.mark.parametrize(
    "packed",
    [
        lab.relayed(lab.ask_vote(2), signature=b"forged"),
        lab.relayed(msgspec.structs.replace(lab.ask_vote(2), mesh="22" * 16)),
        lab.relayed(lab.relayed(lab.ask_vote(2))),
        lab.relayed(m.Announce(MESH, EPOCH, 9, record=GOOD, leader=None)),
        msgspec.structs.replace(lab.relayed(lab.ask_vote(2)), payload=b"\xc1garbage"),
    ],
)
def test_forged_foreign_nested_and_garbled_relays_are_rejected(packed: m.Relayed) -> None:
    mesh = Lab()
    before = mesh.cores["a"].durable
    assert rejected(mesh.cores["a"].receive(packed, "b", mesh.now)) != []
    assert mesh.cores["a"].durable is before


def test_without_keys_nothing_is_relayed() -> None:
    it = core()
    effects = [e for k in range(20) for e in it.tick(START + 3.0 + k)]
    assert lab.sent(effects, m.AskPreVote) != []
    assert lab.sent(effects, m.Relayed) == []


# ---------------------------------------------------------------- the fence


@pytest.mark.parametrize(
    ("counter", "verdict"), [(4, "stale"), (5, "ok"), (6, "fetch")], ids=["older", "active", "newer"]
)
def test_may_open(counter: int, verdict: str) -> None:
    """I7: the active placement only; a newer one is fetched first."""
    it = core(held=record(content=Content(placement_counter=5)))
    answer, effects = it.may_open((EPOCH, counter), "b")
    assert (answer.verdict, answer.newer) == (verdict, (EPOCH, 5))
    assert [to for to, _ in lab.sent(effects, m.Fetch)] == (["b"] if verdict == "fetch" else [])


@pytest.mark.parametrize(
    ("epoch", "term", "verdict"),
    [(1, 3, "stale"), (1, 4, "ok"), (1, 5, "ok"), (0, 9, "stale"), (2, 1, "fetch"), (1, MAX_TERM + 1, "stale")],
)
def test_obey(epoch: int, term: int, verdict: str) -> None:
    it = core(term=4)
    answer, effects = it.obey(make_epoch(epoch, 7), term, "b", START)
    assert answer.verdict == verdict
    assert it.term == (5 if term == 5 else 4)
    assert [state.term for state in lab.persisted(effects)] == ([5] if term == 5 else [])


def test_an_obeyed_newer_term_deposes() -> None:
    it, now = lab.leader()
    it.obey(EPOCH, 7, "b", now)
    assert it.role == "follower"
    assert it.obey(EPOCH, 6, "b", now)[0].verdict == "stale"


def test_restamps_and_voter_steps_leave_the_placement_id_alone() -> None:
    it, now = lab.leader(held=record(content=Content(placement_counter=5, placement=b"p")))
    ids = [it.durable.active_placement]
    for change in ({"voters": ["a", "b"]}, {"content": Content(placement_counter=99, placement=b"p", models=(b"m",))}):
        it.propose(now, **change)
        it.receive(lab.appended(2, (2, it.record.id.version), now), "b", now)
        ids.append(it.durable.active_placement)
    it.propose(now, Content(placement=b"q"))
    it.receive(lab.appended(2, (2, it.record.id.version), now), "b", now)
    assert ids == [(EPOCH, 5)] * 3
    assert it.durable.active_placement == (EPOCH, 6)


# ---------------------------------------------------------------- committed records, wherever they come from


def test_a_voter_takes_committed_records_from_anyone_and_uncommitted_from_its_leader() -> None:
    """R9, as this project reads it."""
    it = core(term=3)
    newer = record(2, 4)
    it.receive(m.Announce(MESH, EPOCH, 2, record=newer, leader=None), "x", START)
    assert (it.committed, it.term) == (newer, 3)
    it.receive(lab.append(2, record(2, 5)), "b", START)  # of a deposed leader
    assert it.record == newer


def test_an_uncommitted_record_outlives_the_news_of_an_older_commit() -> None:
    held = record(2, 5)
    it = core(term=2, held=held, committed=record(1, 1))
    it.receive(m.Announce(MESH, EPOCH, 2, record=record(2, 4), leader=None), "x", START)
    assert (it.record, it.committed.id) == (held, RecordId(2, 4))


def test_taking_a_record_of_a_later_term_raises_the_term() -> None:
    it = core(term=1)
    it.receive(m.Announce(MESH, EPOCH, 1, record=restamp(record(), RecordId(7, 1)), leader=None), "x", START)
    assert (it.term, it.durable.voted_for) == (7, None)


def test_a_restart_remembers_term_vote_record_and_placement() -> None:
    it = core()
    state = lab.persisted(it.receive(lab.ask_vote(6), "b", START))[-1]
    assert (state.term, state.voted_for) == (6, "b")
    again = core(term=state.term, voted_for=state.voted_for)
    effects = again.receive(lab.ask_vote(6), "c", START)
    assert [msg.granted for _, msg in lab.sent(effects, m.Voted)] == [False]
    assert disk().active_placement == (EPOCH, 0)


def test_rejections_are_events_not_errors() -> None:
    effects = core().receive(lab.ask_vote(-5), "b", START)
    assert [type(effect) for effect in effects] == [Emit]
