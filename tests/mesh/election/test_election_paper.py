"""Named cases of etcd's ``raft_paper_test.go``, by the sections of the Raft paper.

Departures are of shape, not of sense: the log has length one, so that "log up to date" reads "record at least mine",
and a candidate asks with PreVote first (dissertation, 9.6).
"""

from __future__ import annotations

import pytest

from mesh.core import Emit, Persist, Send
from mesh.election import messages as m
from mesh.election.events import BecameLeader, Committed, SteppedDown
from mesh.election.record import RecordId
from tests.mesh.election import lab
from tests.mesh.election.lab import START, Lab, core, record, sent

# ---------------------------------------------------------------- 5.1: terms


@pytest.mark.parametrize("role", ["follower", "candidate", "leader"])
def test_update_term_from_message(role: str) -> None:
    """5.1: whoever sees a larger term updates its own and becomes a follower."""
    it = {"follower": lambda: core(), "candidate": lambda: lab.candidate()[0], "leader": lambda: lab.leader()[0]}[
        role
    ]()
    it.receive(lab.append(9, record(9, 1)), "b", START + 4.0)
    assert (it.term, it.role, it.leader) == (9, "follower", "b")


def test_reject_stale_term_message() -> None:
    """5.1: a request with a stale term changes nothing; the answer tells the newer term."""
    it = core(term=5)
    effects = it.receive(lab.append(4, record(4, 7)), "b", START)
    assert it.record.id == RecordId(1, 1)
    assert it.leader is None
    assert [message.term for _, message in sent(effects, m.Appended)] == [5]


def test_start_as_follower() -> None:
    """5.2: servers begin as followers."""
    it = core()
    assert (it.role, it.leader) == ("follower", None)


# ---------------------------------------------------------------- 5.2: elections


def test_leader_bcast_beat() -> None:
    """5.2: the leader sends heartbeats to all followers at each heartbeat interval."""
    it, now = lab.leader()
    assert it.deadline is not None
    for beat in range(3):
        now = it.deadline
        effects = it.tick(now)
        assert [to for to, _ in sent(effects, m.Append)] == ["b", "c"], beat
        assert it.deadline == pytest.approx(now + 0.15)


@pytest.mark.parametrize("role", ["follower", "candidate"])
def test_nonleader_start_election(role: str) -> None:
    """5.2: FollowerStartElection, CandidateStartNewElection: silence makes a new term, after its PreVote."""
    it = core() if role == "follower" else lab.candidate()[0]
    before, now = it.term, START + 20.0
    effects = it.tick(now)
    assert {to for to, _ in sent(effects, m.AskPreVote)} == {"b", "c"}
    assert it.term == before  # R3: nothing changed yet
    effects = it.receive(lab.prevoted(before + 1), "b", now)
    assert (it.role, it.term, it.durable.voted_for) == ("candidate", before + 1, "a")
    assert {to for to, _ in sent(effects, m.AskVote)} == {"b", "c"}
    assert isinstance(effects[0], Persist)  # term and vote are durable before anyone is asked


@pytest.mark.parametrize(
    ("size", "grants", "role"),
    [
        (1, "", "leader"),
        (3, "bc", "leader"),
        (3, "b", "leader"),
        (5, "bcde", "leader"),
        (5, "bcd", "leader"),
        (5, "bc", "leader"),
        (3, "", "follower"),
        (5, "b", "follower"),
        (5, "bbb", "follower"),
        (5, "bxyz", "follower"),
        (4, "b", "follower"),
        (4, "bc", "leader"),
        (2, "", "follower"),
    ],
)
def test_leader_election_in_one_round_rpc(size: int, grants: str, role: str) -> None:
    """5.2: a candidate wins with votes of a majority of its record's voters, each counted once; refused by too many it
    has lost, and need not wait for its time-out."""
    voters = "abcde"[:size]
    it, now = lab.candidate(held=record(voters=voters)) if size > 1 else (core(held=record(voters="a")), START)
    if size == 1:
        it.tick(now)
    for voter in grants:
        it.receive(lab.voted(it.term), voter, now)
    refusers = [v for v in voters[1:] if v not in grants]
    for voter in refusers:
        it.receive(lab.voted(it.term, granted=False), voter, now)
    assert it.role == role


@pytest.mark.parametrize(
    ("voted_for", "asker", "granted"),
    [(None, "b", True), (None, "c", True), ("b", "b", True), ("c", "c", True), ("b", "c", False), ("c", "b", False)],
)
def test_follower_vote(voted_for: str | None, asker: str, granted: bool) -> None:
    """5.2: at most one candidate in a term, first come first served."""
    it = core(term=2, voted_for=voted_for)
    effects = it.receive(lab.ask_vote(2), asker, START)
    assert [message.granted for _, message in sent(effects, m.Voted)] == [granted]


def test_a_vote_is_durable_before_it_is_given() -> None:
    effects = core().receive(lab.ask_vote(2), "b", START)
    assert [type(effect) for effect in effects] == [Persist, Send]
    assert lab.persisted(effects)[0].voted_for == "b"
    assert lab.persisted(effects)[0].term == 2


@pytest.mark.parametrize("ahead", [0, 1])
def test_candidate_fallback(ahead: int) -> None:
    """5.2: a candidate that hears a leader of its term, or a later one, follows."""
    it, now = lab.candidate()
    term = it.term + ahead
    it.receive(lab.append(term, record(term, 1)), "c", now)
    assert (it.role, it.term, it.leader) == ("follower", term, "c")


@pytest.mark.parametrize("role", ["follower", "candidate"])
def test_election_timeout_randomized(role: str) -> None:
    """5.2: time-outs are spread over [min, max), here [1, 2) s for followers, shorter for a repeated question."""
    waits = set()
    for seed in range(200):
        if role == "follower":
            it = core(seed=seed)
            waits.add(round((it.deadline or 0.0) - START, 1))
        else:
            it, now = lab.candidate(seed=seed)
            waits.add(round(it._round_ends - now, 1))
    expected = {round(1.0 + k / 10, 1) for k in range(11)} if role == "follower" else {0.3, 0.4, 0.5, 0.6}
    assert waits == expected


def test_election_timeout_nonconflict() -> None:
    """5.2: in most cases one server times out well before the others."""
    conflicts, held = 0, record(voters="abcde")
    for seed in range(500):
        waits = sorted((core(name, seed=seed * 10 + k, held=held).deadline or 0.0) for k, name in enumerate("abcde"))
        conflicts += waits[1] - waits[0] < 0.010
    assert conflicts / 500 < 0.1


# ---------------------------------------------------------------- 5.3, 5.4: the record


def test_leader_start_replication_and_commit_entry() -> None:
    """5.3: a proposal goes to all voters whole; a majority's acknowledgement commits it, and the next Append tells."""
    it, now = lab.leader()
    before = it.record.id
    effects = it.propose(now, lab.Content(placement=b"x"))
    assert it.record.id == RecordId(before.term, before.version + 1)
    assert all(message.record == it.record for _, message in sent(effects, m.Append))
    assert it.committed.id == before
    effects = it.receive(lab.appended(it.term, (2, 2), now), "c", now)
    assert [event.record.id for event in lab.events(effects, Committed)] == [RecordId(2, 2)]
    assert {message.committed for _, message in sent(effects, m.Append)} == {RecordId(2, 2)}


@pytest.mark.parametrize(
    ("size", "acks", "committed"),
    [(1, "", True), (3, "", False), (3, "b", True), (5, "", False), (5, "b", False), (5, "bb", False), (5, "be", True)],
)
def test_leader_acknowledge_commit(size: int, acks: str, committed: bool) -> None:
    """5.3: committed once a majority of the record's voters holds it."""
    it, now = lab.leader(held=record(voters="abcde"[:size])) if size > 1 else (core(held=record(voters="a")), START)
    if size == 1:
        it.tick(now)
    it.propose(now, lab.Content(placement=b"x"))
    for voter in acks:
        it.receive(lab.appended(2, (2, 2), now), voter, now)
    assert (it.committed.id == RecordId(2, 2)) is committed


def test_follower_commit_entry() -> None:
    """5.3: a follower learns of the commit from the leader, and only of exactly the record that it holds."""
    it, new = core(), record(2, 2)
    it.receive(lab.append(2, new, committed=(2, 1)), "b", START)
    assert it.committed.id == RecordId(1, 1)
    effects = it.receive(lab.append(2, new, committed=(2, 2), whole=False), "b", START)
    assert [event.record for event in lab.events(effects, Committed)] == [new]
    assert isinstance(effects[0], Persist)
    assert isinstance(effects[1], Emit)


@pytest.mark.parametrize(
    ("mine", "theirs", "granted"),
    [
        ((1, 1), (1, 1), True),
        ((1, 1), (1, 2), True),
        ((1, 2), (1, 1), False),
        ((1, 1), (2, 1), True),
        ((1, 9), (2, 1), True),  # R1: the term counts first
        ((2, 1), (1, 1), False),
        ((2, 1), (1, 9), False),
        ((2, 2), (2, 2), True),
    ],
)
def test_voter(mine: tuple[int, int], theirs: tuple[int, int], granted: bool) -> None:
    """5.4.1: a vote is refused to a candidate whose record is older; so is a pre-vote."""
    it = core(term=3, held=record(*mine))
    effects = it.receive(lab.ask_prevote(4, theirs), "b", START)
    assert [message.granted for _, message in sent(effects, m.PreVoted)] == [granted]
    effects = it.receive(lab.ask_vote(4, theirs), "b", START)
    assert [message.granted for _, message in sent(effects, m.Voted)] == [granted]
    assert it.term == 4  # the term is seen in any case


def test_leader_only_commits_from_current_term() -> None:
    """5.4.2: what an earlier term left is committed only by the restamped record of this one (R4, R5)."""
    it, now = lab.leader(commit=False, held=record(1, 2), committed=record(1, 1))
    assert it.record.id == RecordId(2, 2)
    it.receive(lab.appended(2, (1, 2), now), "b", now)
    it.receive(lab.appended(2, (1, 2), now), "c", now)
    assert it.committed.id == RecordId(1, 1)
    it.receive(lab.appended(2, (2, 2), now), "b", now)
    assert it.committed.id == RecordId(2, 2)


def test_vote_request() -> None:
    """5.4.1: the request carries the candidate's record."""
    it, now = lab.candidate(held=record(1, 7))
    effects = it.tick(now + 0.2)
    assert {(to, message.record) for to, message in sent(effects, m.AskVote)} == {
        ("b", RecordId(1, 7)),
        ("c", RecordId(1, 7)),
    }


def test_leader_sync_follower_log() -> None:
    """5.3: the leader makes followers hold its record: by restamp where the content is the same, else whole."""
    same, other = Lab(), Lab()
    lost = record(1, 2, content=lab.Content(placement=b"lost"))
    other.cores["c"].receive(lab.append(1, lost), "b", other.now)  # c took what b never committed
    for it in (same, other):
        it.drop = lambda sender, to, message: isinstance(message, m.AskVote) and to == "c"
    for mesh, whole in ((same, 0), (other, 1)):
        mesh.isolate("c")
        mesh.elect("a")
        mesh.heal()
        mesh.carried.clear()
        mesh.run(1.0)
        assert mesh.cores["c"].record == mesh.cores["a"].record
        carried = [message for _, to, message in mesh.carried if to == "c" and isinstance(message, m.Append)]
        assert sum(message.record is not None for message in carried) == whole


def test_leader_steps_down_and_says_why() -> None:
    it, now = lab.leader()
    effects = it.receive(lab.appended(9, (1, 1), now), "b", now)
    assert lab.events(effects, SteppedDown) == [SteppedDown(2, "a newer term")]
    assert (it.role, it.term) == ("follower", 9)


def test_winning_is_told_once() -> None:
    it, now = lab.candidate()
    effects = it.receive(lab.voted(it.term), "b", now)
    effects += it.receive(lab.voted(it.term), "c", now)
    assert lab.events(effects, BecameLeader) == [BecameLeader(2)]
