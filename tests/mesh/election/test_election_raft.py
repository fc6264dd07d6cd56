"""Named cases of etcd's ``raft_test.go``, hashicorp/raft and MicroRaft, with the same lessons."""

from __future__ import annotations

import msgspec
import pytest

from mesh.election import messages as m
from mesh.election.config import lan
from mesh.election.events import BecameLeader, Busy, LeaderLost, NotLeader, Refused, Released, SteppedDown
from mesh.election.record import Content, RecordId
from mesh.election.voters import MemberInfo
from tests.mesh.election import lab
from tests.mesh.election.lab import LAN, START, Lab, core, record, sent

# ---------------------------------------------------------------- etcd: elections


def test_leader_cycle() -> None:
    """Each node can campaign and win in turn."""
    mesh = Lab()
    for name in "abc":
        mesh.elect(name)
        assert mesh.leaders() == [name]
        assert {it.term for it in mesh.cores.values()} == {mesh.cores[name].term}


def test_single_node_candidate_and_commit() -> None:
    """The only voter wins at once, without a message, and commits alone."""
    it = core(held=record(voters="a"))
    assert it.deadline == START
    effects = it.tick(START)
    assert lab.events(effects, BecameLeader) == [BecameLeader(2)]
    effects = it.propose(START, Content(placement=b"x"))
    assert it.committed.id == RecordId(2, 2)
    assert sent(effects, m.Append) == []


def test_dueling_candidates() -> None:
    """A candidate that was cut off and lost comes back, disturbs nobody, and follows."""
    mesh = Lab()
    mesh.cut("a", "c")
    mesh.drop = lambda sender, to, message: isinstance(message, m.Relayed)  # or b would carry what a has to say
    mesh.elect("a")
    mesh.run(4.0)  # c asks b, which hears a
    assert (mesh.cores["c"].role, mesh.cores["c"].term) == ("precandidate", 2)  # refused, but told what is committed
    assert mesh.cores["c"].committed == mesh.cores["a"].committed
    mesh.heal()
    mesh.run(1.0)
    assert mesh.roles() == {"a": "leader", "b": "follower", "c": "follower"}


def test_dueling_precandidates() -> None:
    """Two that ask at once: PreVotes bind nobody, a vote does; one wins."""
    mesh = Lab()
    mesh.now += 3.0
    for name in "ac":
        mesh.perform(name, mesh.cores[name].tick(mesh.now))
    mesh.flow()
    mesh.run(3.0)
    assert len(mesh.leaders()) == 1


def test_old_messages() -> None:
    """A late Append of an earlier leader changes nothing."""
    mesh = Lab()
    mesh.elect("a")
    old = next(msg for _, to, msg in mesh.carried if to == "c" and isinstance(msg, m.Append))
    mesh.elect("b")
    mesh.elect("a")
    before = mesh.cores["c"].durable
    mesh.cores["c"].receive(old, "a", mesh.now)
    assert mesh.cores["c"].durable == before


def test_leader_stepdown_when_quorum_lost() -> None:
    """R7: no answers from a majority for one election time-out."""
    it, now = lab.leader()
    while it.role == "leader":
        now = it.deadline or 0.0
        effects = it.tick(now)
    assert lab.events(effects, SteppedDown) == [SteppedDown(2, "no majority answers")]
    assert 1.0 <= now - (START + 3.0) <= 1.2  # Q12


def test_leader_stepdown_when_quorum_active() -> None:
    """The same with answers: it stays."""
    it, now = lab.leader()
    for _ in range(40):
        now = it.deadline or 0.0
        it.tick(now)
        it.receive(lab.appended(2, (2, 1), now), "b", now)
    assert it.role == "leader"


def test_late_answers_do_not_keep_a_leader() -> None:
    """An answer counts from when it was asked for: a slow link cannot make a dead majority look alive."""
    it, now = lab.leader()
    for _ in range(12):
        if it.role == "leader":
            now = it.deadline or 0.0
            it.tick(now)
            it.receive(lab.appended(2, (2, 1), START + 3.0), "b", now)
    assert it.role == "follower"


def test_leader_superseding_with_check_quorum() -> None:
    """A voter hears a leader: no PreVote from it; once the leader is silent for long enough it grants."""
    mesh = Lab()
    mesh.elect("a")
    mesh.now += 0.5
    effects = mesh.cores["b"].receive(lab.ask_prevote(3, (2, 1)), "c", mesh.now)
    assert [msg.granted for _, msg in sent(effects, m.PreVoted)] == [False]
    effects = mesh.cores["b"].receive(lab.ask_prevote(3, (2, 1)), "c", mesh.now + 0.6)
    assert [msg.granted for _, msg in sent(effects, m.PreVoted)] == [True]


def test_leader_election_with_check_quorum_a_leader_refuses_prevotes() -> None:
    it, now = lab.leader()
    effects = it.receive(lab.ask_prevote(9, (9, 9)), "b", now)
    assert [msg.granted for _, msg in sent(effects, m.PreVoted)] == [False]


def test_free_stuck_candidate_with_check_quorum() -> None:
    """A voter with a higher term cannot follow; its answer makes the leader step down and start a higher one."""
    mesh = Lab()
    mesh.elect("a")
    mesh.disks["c"] = msgspec.structs.replace(mesh.disks["c"], term=9)
    mesh.boot("c")
    mesh.run(5.0)
    assert len(mesh.leaders()) == 1
    assert {it.term for it in mesh.cores.values()} == {mesh.cores[mesh.leaders()[0]].term}
    assert mesh.cores["c"].term > 9


def test_disruptive_follower_with_prevote() -> None:
    """A follower with a slow link times out again and again; nobody's term rises."""
    mesh = Lab()
    mesh.elect("a")
    mesh.drop = lambda sender, to, message: to == "c" and sender == "a"
    mesh.cuts = {("b", "c")}  # nothing reaches c at all
    mesh.run(20.0)
    mesh.cuts, mesh.drop = set(), lambda sender, to, message: False
    mesh.run(1.0)
    assert mesh.leaders() == ["a"]
    assert mesh.cores["a"].term == 2


def test_prevote_with_split_vote() -> None:
    """Two candidates of one term split the votes; the next round ends it."""
    mesh = Lab()
    mesh.elect("a")
    del mesh.cores["a"]
    for name, other in ("bc", "cb"):
        it = mesh.cores[name]
        it.note_lost("a", mesh.now)
        it.tick(it.deadline or 0.0)
        mesh.perform(name, it.receive(lab.prevoted(3), other, mesh.now))
    assert mesh.roles() == {"b": "candidate", "c": "candidate"}
    mesh.flow()
    assert mesh.leaders() == []
    mesh.run(0.7)
    assert len(mesh.leaders()) == 1


def test_who_was_refused_by_a_majority_asks_again_at_once() -> None:
    it, now = lab.candidate(held=record(voters="abcde"))
    for voter in "bcd":
        it.receive(lab.voted(it.term, granted=False), voter, now)
    assert it.role == "follower"
    assert (it.deadline or 0.0) - now <= LAN.heartbeat_s
    it.tick(it.deadline or 0.0)
    assert it.role == "precandidate"


def test_two_that_ask_at_once_do_not_split_the_vote() -> None:
    """Rank decides between them: the lower one gives way, and takes part as a voter."""
    mesh = Lab("abcde", "abcde")
    mesh.elect("e")
    del mesh.cores["e"]
    for name in "abcd":
        mesh.cores[name].note_lost("e", mesh.now)
    for name in "dcb":
        mesh.perform(name, mesh.cores[name].tick(mesh.now + 0.15))
    mesh.flow()
    assert mesh.leaders() == ["b"]
    assert mesh.cores["b"].term == 3


def test_who_promised_a_vote_waits_once() -> None:
    """It would vote for another: its own candidacy stands back, but not again and again for one that never wins."""
    it = core()
    it.note_lost("b", START)
    first = it.deadline or 0.0
    for beat in range(10):
        effects = it.receive(lab.ask_prevote(2), "c", START + 0.15 * beat)
        assert [msg.granted for _, msg in sent(effects, m.PreVoted)] == [True]
    assert it.deadline == START + LAN.yield_s if first < START + LAN.yield_s else first


def test_who_cannot_win_is_in_the_way_for_one_heartbeat() -> None:
    """A precandidate of higher rank refuses the lower ones, but only at first: its own links may be broken."""
    it = core()
    now = it.deadline or 0.0
    it.tick(now)
    effects = it.receive(lab.ask_prevote(2), "b", now + 0.1)
    assert [msg.granted for _, msg in sent(effects, m.PreVoted)] == [False]
    assert [to for to, _ in sent(effects, m.AskPreVote)] == ["b"]
    effects = it.receive(lab.ask_prevote(2), "b", now + 0.16)
    assert [msg.granted for _, msg in sent(effects, m.PreVoted)] == [True]
    assert it.role == "precandidate"


def test_prevote_with_check_quorum() -> None:
    """After the leader is gone for good the rest elect, though each had refused the other at first."""
    mesh = Lab()
    mesh.elect("a")
    del mesh.cores["a"]
    effects = mesh.cores["b"].receive(lab.ask_prevote(3, (2, 1)), "c", mesh.now)
    assert [msg.granted for _, msg in sent(effects, m.PreVoted)] == [False]
    mesh.run(2.5)
    assert len(mesh.leaders()) == 1


def test_prevote_migration_can_complete_election_with_a_higher_term_voter() -> None:
    """A PreVote is refused with the voter's higher term; the asker takes it and asks again."""
    it = core()
    it.tick(START + 3.0)
    it.receive(lab.prevoted(2, granted=False, term=7), "b", START + 3.0)
    assert (it.role, it.term) == ("follower", 7)
    assert (it.deadline or 0.0) <= START + 3.2
    effects = it.tick(START + 3.2)
    assert {msg.term for _, msg in sent(effects, m.AskPreVote)} == {8}


def test_learner_can_vote() -> None:
    """R9: a node asked for a vote answers though its own record does not name it: the asker's may."""
    it = core("d")
    assert not it.is_voter
    effects = it.receive(lab.ask_vote(2, (1, 2)), "b", START)
    assert [msg.granted for _, msg in sent(effects, m.Voted)] == [True]


def test_learner_does_not_campaign() -> None:
    """LearnerElectionTimeout: a node that is no voter by its own record waits for nothing."""
    it = core("d")
    assert it.deadline is None
    assert it.tick(START + 100.0) == []


def test_vote_from_any_state() -> None:
    """A higher term's request is granted by whoever has an older record, leaders too."""
    for make in (lambda: core(), lambda: lab.candidate()[0], lambda: lab.leader()[0]):
        it = make()
        effects = it.receive(lab.ask_vote(9, (9, 9)), "b", START + 4.0)
        assert [msg.granted for _, msg in sent(effects, m.Voted)] == [True]
        assert (it.role, it.term) == ("follower", 9)


def test_state_transition_candidate_votes_for_itself_only() -> None:
    it, now = lab.candidate()
    effects = it.receive(lab.ask_vote(it.term), "b", now)
    assert [msg.granted for _, msg in sent(effects, m.Voted)] == [False]


# ---------------------------------------------------------------- etcd: voters


def test_add_node_check_quorum() -> None:
    """A voter just added has as long as all to answer: the leader does not step down for it."""
    mesh = Lab("ab", "a")
    mesh.elect("a")
    mesh.run(30.0)
    mesh.drop = lambda sender, to, message: sender == "b"
    mesh.do("a", lambda it, now: it.propose(now, voters=["a", "b"]))
    mesh.run(0.9)
    assert mesh.leaders() == ["a"]
    mesh.run(0.4)
    assert mesh.leaders() == []


def test_remove_node() -> None:
    """The removed voter learns of it, and does not campaign any more."""
    mesh = Lab()
    mesh.elect("a")
    mesh.do("a", lambda it, now: it.propose(now, voters=["a", "b"]))
    mesh.run(1.0)
    assert not mesh.cores["c"].is_voter
    mesh.drop = lambda sender, to, message: to == "c"
    mesh.run(30.0)
    assert (mesh.cores["c"].role, mesh.cores["c"].leader, mesh.cores["c"].deadline) == ("follower", None, None)
    mesh.drop = lambda sender, to, message: False
    with pytest.raises(Refused):
        mesh.cores["a"].propose(mesh.now, voters=["b"])


def test_conf_change_check_before_campaign() -> None:
    """A candidate that learns that it is no voter any more stops."""
    it, now = lab.candidate("c")
    news = m.Announce(lab.MESH, lab.EPOCH, 2, record=record(1, 2, "ab"), leader=None)
    it.receive(news, "b", now)
    assert (it.role, it.deadline) == ("follower", None)
    it.receive(lab.voted(it.term), "a", now)
    assert it.role == "follower"


def test_new_voter_arms_itself() -> None:
    it = core("d")
    it.receive(lab.append(2, record(2, 2, "abcd")), "a", START)
    assert it.is_voter
    assert it.deadline is not None


# ---------------------------------------------------------------- etcd: leader transfer


def test_leader_transfer_to_up_to_date_node() -> None:
    mesh = Lab()
    mesh.elect("a")
    mesh.do("a", lambda it, now: it.transfer(now, "b"))
    assert mesh.leaders() == ["b"]


def test_leader_transfer_to_self_or_stranger() -> None:
    mesh = Lab("abcd")
    mesh.elect("a")
    for heir in "ad":
        with pytest.raises(Refused):
            mesh.cores["a"].transfer(mesh.now, heir)


def test_leader_transfer_ignores_proposals_then_times_out() -> None:
    """While it waits for the heir it proposes nothing; without one it goes on leading."""
    mesh = Lab()
    mesh.elect("a")
    mesh.drop = lambda sender, to, message: isinstance(message, m.TimeoutNow)
    mesh.do("a", lambda it, now: it.transfer(now))
    with pytest.raises(Busy):
        mesh.cores["a"].propose(mesh.now, Content(placement=b"x"))
    mesh.run(1.3)
    assert mesh.cores["a"].ready
    mesh.do("a", lambda it, now: it.propose(now, Content(placement=b"x")))
    assert mesh.cores["c"].committed.content.placement == b"x"


def test_leader_transfer_second_transfer_to_another_node() -> None:
    mesh = Lab()
    mesh.elect("a")
    for heir in "bca":
        mesh.do(mesh.leaders()[0], lambda it, now, heir=heir: it.transfer(now, heir))
        assert mesh.leaders() == [heir]


def test_timeout_now_from_a_stranger_or_of_an_old_term_is_ignored() -> None:
    mesh = Lab()
    mesh.elect("a")
    term = mesh.cores["b"].term
    for sender, of in (("c", term), ("a", term - 1)):
        mesh.cores["b"].receive(m.TimeoutNow(lab.MESH, lab.EPOCH, of), sender, mesh.now)
        assert mesh.cores["b"].role == "follower"


# ---------------------------------------------------------------- hashicorp/raft


def test_prevote_avoid_election_with_partition() -> None:
    mesh = Lab("abcde", "abcde")
    mesh.elect("a")
    mesh.isolate("e")
    mesh.run(30.0)
    mesh.heal()
    mesh.run(2.0)
    assert mesh.leaders() == ["a"]
    assert mesh.cores["e"].term == mesh.cores["a"].term == 2


def test_verify_leader_partial_connect() -> None:
    """The leader keeps a majority though one voter is gone."""
    mesh = Lab()
    mesh.elect("a")
    mesh.isolate("c")
    mesh.run(10.0)
    assert mesh.leaders() == ["a"]
    assert mesh.cores["a"].ready


def test_verify_leader_fail() -> None:
    """A leader without a majority accepts nothing, even before its tick tells it."""
    it, now = lab.leader()
    with pytest.raises(NotLeader):
        it.propose(now + 1.5, Content(placement=b"x"))


def test_vote_not_granted_when_node_not_in_cluster() -> None:
    """An ex-voter asks with its old record: refused, and told of the newer one."""
    it = core(term=2, held=record(2, 2, "ab"))
    effects = it.receive(lab.ask_prevote(3, (2, 1)), "c", START + 5.0)
    assert [msg.granted for _, msg in sent(effects, m.PreVoted)] == [False]
    assert [msg.record for _, msg in sent(effects, m.Announce)] == [it.committed]


def test_cluster_can_regain_stability_when_non_voter_with_higher_term_joins() -> None:
    """A learner with a huge term neither deposes the leader nor is in the way of one."""
    mesh = Lab("abcd", "abc")
    mesh.elect("a")
    mesh.disks["d"] = msgspec.structs.replace(mesh.disks["d"], term=50)
    mesh.boot("d")
    mesh.run(5.0)
    assert mesh.leaders() == ["a"]
    assert mesh.cores["a"].term == 2
    mesh.do("a", lambda it, now: it.propose(now, Content(placement=b"x")))
    mesh.run(1.0)
    assert mesh.cores["d"].committed.content.placement == b"x"


# ---------------------------------------------------------------- MicroRaft


def test_initial_member_removed_cannot_be_added_again_once_revoked() -> None:
    """A tombstone is for ever; an ex-voter that was only removed may return (R10)."""
    mesh = Lab("abcd", "abcd")
    it = mesh.elect("a")
    mesh.do("a", lambda it, now: it.propose(now, voters=["a", "b", "c"]))
    mesh.do("a", lambda it, now: it.propose(now, voters=["a", "b", "c", "d"]))
    assert mesh.cores["d"].is_voter
    revoked = msgspec.structs.replace(it.record.content, tombstones=("d",))
    mesh.do("a", lambda it, now: it.propose(now, revoked))
    assert it.committed.voters == ("a", "b", "c")
    with pytest.raises(Refused):
        it.propose(mesh.now, voters=["a", "b", "c", "d"])


def test_there_is_no_commit_in_the_current_term_cannot_make_member_change() -> None:
    it, now = lab.leader(commit=False)
    with pytest.raises(Busy):
        it.propose(now, voters=["a", "b"])
    it.receive(lab.appended(2, (2, 1), now), "b", now)
    it.propose(now, voters=["a", "b"])


def test_one_change_at_a_time() -> None:
    it, now = lab.leader()
    it.propose(now, Content(placement=b"x"))
    with pytest.raises(Busy):
        it.propose(now, Content(placement=b"y"))


# ---------------------------------------------------------------- R8: seeing the loss of the leader


def test_forget_leader_campaigns_within_its_jitter_and_raises_no_term() -> None:
    mesh = Lab()
    mesh.elect("a")
    it = mesh.cores["b"]
    effects = it.note_lost("a", mesh.now)
    assert lab.events(effects, LeaderLost) == [LeaderLost("a")]
    assert (it.deadline or 0.0) - mesh.now <= 0.150
    assert it.term == 2
    mesh.run(1.0)  # a lives: c refuses, and the next heartbeat brings b back
    assert mesh.leaders() == ["a"]
    assert it.leader == "a"


def test_a_lost_leaders_last_words_are_not_believed_however_late_a_neighbour_brings_them() -> None:
    """b would wait for a whole time-out once more, and refuse its vote meanwhile."""
    it = Lab().cores["b"]
    held = it.record

    def said(at: float, term: int = 1) -> m.Append:
        return lab.append(term, held, (held.id.term, held.id.version), whole=False, sent_at=at)

    it.receive(said(50.0), "a", START)  # a's clock is its own
    it.note_lost("a", START + 0.1)
    late = lab.relayed(said(50.05), origin="a", to="b")
    assert it.receive(late, "c", START + 0.4) == []
    assert it.leader is None
    it.receive(lab.relayed(said(50.11), origin="a", to="b"), "c", START + 0.4)  # only the link is gone
    assert it.leader == "a"
    it.note_lost("a", START + 0.5)
    it.receive(lab.relayed(said(3.0, term=2), origin="a", to="b"), "c", START + 0.6)  # restarted, and elected
    assert it.leader == "a"


def test_losing_another_than_the_leader_means_nothing() -> None:
    mesh = Lab()
    mesh.elect("a")
    before = mesh.cores["b"].deadline
    assert mesh.cores["b"].note_lost("c", mesh.now) == []
    assert mesh.cores["b"].deadline == before


def test_an_ailing_node_lets_the_others_campaign_first() -> None:
    """Once per time-out and for a fixed time; and by its health then, not when the time-out was armed."""
    it = core()
    it.note_health(8)
    now = it.deadline or 0.0
    assert it.tick(now) == []
    assert (it.role, it.deadline) == ("follower", now + LAN.yield_s)
    it.tick(now + LAN.yield_s)
    assert it.role == "precandidate"


def test_an_ailing_node_that_recovered_does_not_wait() -> None:
    it = core()
    it.note_health(8)
    it.receive(lab.append(2, record(2, 1)), "b", START)
    it.note_health(0)
    it.tick(it.deadline or 0.0)
    assert it.role == "precandidate"


def test_a_loss_that_was_seen_is_not_the_fault_of_an_ailing_node() -> None:
    it = core()
    it.receive(lab.append(2, record(2, 1)), "b", START)
    it.note_health(8)
    it.note_lost("b", START)
    it.tick(it.deadline or 0.0)
    assert it.role == "precandidate"


# ---------------------------------------------------------------- leaving


@pytest.mark.parametrize("name", ["a", "b", "d"])
def test_leave(name: str) -> None:
    """Leader, voter, learner: each is let go once it is no voter."""
    mesh = Lab("abcd", "abc", config=lan())
    mesh.elect("a")
    mesh.run(1.0)
    mesh.do(name, lambda it, now: it.leave(now))
    mesh.run(2.0)
    assert (name, Released()) in mesh.told
    left = [n for n in "abcd" if n != name]
    assert all(mesh.cores[n].committed.voters == tuple(left) for n in left)


def test_leave_of_the_last_node() -> None:
    it = core(held=record(voters="a"))
    it.tick(START)
    it.note_members([MemberInfo("a", START)], START)
    assert lab.events(it.leave(START), Released) == [Released()]
