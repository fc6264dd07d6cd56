"""Claims and what becomes of them, by the names of memberlist's and foca's tests."""

from __future__ import annotations

import msgspec
import pytest

from gossip.config import GossipConfig
from gossip.messages import Gossip, Join, Ping, SavedIncarnation, State, SyncRow, SyncRows, Update
from gossip.sync import to_mask
from mesh.types import NodeId
from tests.gossip.lab import ME, Lab, alive, dead, emitted, left, persisted, record, said, sends, suspect

ALL = to_mask(range(64))


def synced(lab: Lab, *updates: Update, sender: str = "b", age_s: int = 0) -> list:
    rows = tuple(SyncRow(update, 0, age_s if update.state >= State.DEAD else 0) for update in updates)
    return lab.hears(SyncRows(ALL, rows, False), sender)


# -- alive


def test_alive_node_new_node() -> None:
    lab = Lab("b")
    effects = lab.told(alive("c"))
    (event,) = emitted(effects, "MemberChanged")
    assert (event.node, event.old, event.new) == ("c", None, "alive")
    assert lab.core.address_of(NodeId("c")) == "c:1"
    assert lab.core.n == 3


def test_alive_node_idempotent() -> None:
    lab = Lab("b")
    assert emitted(lab.told(alive("b")), "MemberChanged") == []


def test_alive_node_suspect_node() -> None:
    lab = Lab("b", "c")
    lab.told(suspect("b"), "c")
    assert lab.state("b") == "suspect"
    lab.told(alive("b"), "c")
    assert lab.state("b") == "suspect"  # an old incarnation does not clear a suspect
    lab.told(alive("b", 2), "c")
    assert lab.state("b") == "alive"


def test_alive_node_change_address() -> None:
    """A restart elsewhere at a larger incarnation wins."""
    lab = Lab("b", "c")
    (event,) = emitted(lab.told(alive("b", 2, address="elsewhere:2"), "c"), "MemberChanged")
    assert (event.old, event.new, event.incarnation) == ("alive", "alive", 2)
    assert lab.core.address_of(NodeId("b")) == "elsewhere:2"


def test_alive_node_old_address_is_old_news() -> None:
    lab = Lab("c")
    lab.told(alive("b", 5, address="new:1"), "c")
    lab.told(alive("b", 4, address="old:1"), "c")
    assert lab.core.address_of(NodeId("b")) == "new:1"


def test_alive_node_conflict() -> None:
    """Two records of one incarnation: the first stays, and somebody is told."""
    lab = Lab("b", "c")
    (conflict,) = emitted(lab.told(alive("b", 1, address="twin:1"), "c"), "Conflict")
    assert (conflict.held, conflict.said) == ("b:1", "twin:1")
    assert lab.core.address_of(NodeId("b")) == "b:1"


def test_alive_node_refute() -> None:
    """An own record of a larger incarnation is of an earlier life with a faster clock: go above it."""
    lab = Lab("b")
    effects = lab.told(alive(ME, 70, address="other:1"))
    assert lab.core.incarnation == 71
    assert persisted(effects) == [SavedIncarnation(71)]
    assert lab.core.address_of(ME) == "me:1"


def test_a_forged_record_is_rejected() -> None:
    lab = Lab("b")
    forged = msgspec.structs.replace(record("c", 3), address="mine:1")
    effects = lab.told(Update(State.ALIVE, forged))
    assert emitted(effects, "Rejected")[0].sender == "b"
    assert lab.state("c") is None


def test_a_forged_incarnation_cannot_kill() -> None:
    """A suspicion at an incarnation that its subject never issued is worth nothing."""
    lab = Lab("b", "c")
    forged = msgspec.structs.replace(record("b", 1), incarnation=2**60)
    assert emitted(lab.told(Update(State.DEAD, forged, (NodeId("x"),)), "c"), "Rejected")
    assert lab.state("b") == "alive"
    assert lab.incarnation("b") == 1


def test_signatures_are_checked_once_per_incarnation() -> None:
    lab = Lab("b", "c")
    checked = []
    verify = lab.core.roster.identity.verify
    lab.core.roster.identity = msgspec.structs.replace(
        lab.core.roster.identity, verify=lambda *call: checked.append(call[0]) or verify(*call)
    )
    for _ in range(3):
        lab.told(alive("b", 2), "c")
        lab.told(suspect("b", 2), "c")
    assert checked == ["b"]


# -- suspect


def test_suspect_node_no_node() -> None:
    """A suspicion of somebody unknown introduces it, with its incarnation."""
    lab = Lab("b")
    lab.told(suspect("c", 4))
    assert (lab.state("c"), lab.incarnation("c")) == ("suspect", 4)


def test_suspect_node() -> None:
    lab = Lab("b", "c")
    (event,) = emitted(lab.told(suspect("c")), "MemberChanged")
    assert (event.old, event.new, event.confirmations) == ("alive", "suspect", 1)
    gossip = [message for _, message in sends(lab.run(0.3), "Gossip")]
    assert any(update.state is State.SUSPECT for message in gossip for update in message.updates)


def test_suspect_node_double_suspect() -> None:
    """The same accuser counts once; news that is no news is not passed on."""
    lab = Lab("b", "c", "d")
    lab.told(suspect("c", by=("b",)))
    lab.run(5.0)
    effects = lab.told(suspect("c", by=("b",)), "d")
    assert emitted(effects, "MemberChanged") + emitted(effects, "Confirmed") == []
    info = lab.core.member(NodeId("c"))
    assert info is not None
    assert info.confirmations <= 2  # b and, if it has probed it, oneself


def test_who_says_alive_does_not_accuse() -> None:
    """A suspect that somebody else still holds alive has one accuser, not two (found by simulation)."""
    lab = Lab("b", "c", "d")
    lab.core.prober.stop()
    lab.told(suspect("c", by=("b",)))
    lab.told(alive("c"), "d")
    synced(lab, alive("c"), sender="d")
    info = lab.core.member(NodeId("c"))
    assert info is not None
    assert (info.state, info.confirmations) == ("suspect", 1)


def test_suspect_node_old_suspect() -> None:
    lab = Lab("b")
    lab.told(alive("c", 10))
    lab.told(suspect("c", 9))
    assert lab.state("c") == "alive"


def test_suspect_node_refute() -> None:
    lab = Lab("b")
    effects = lab.told(suspect(ME, 10))
    assert lab.core.incarnation == 11
    assert [type(effect).__name__ for effect in effects[:2]] == ["Persist", "Emit"]
    assert lab.core.local_health(lab.now) == 1
    to, message = sends(effects, "Gossip")[0]
    assert to == "b"  # who accused hears it first
    assert message.updates[0] == Update(State.ALIVE, lab.core.roster.own.record)


def test_incarnation_does_not_increase_for_stale_suspicion() -> None:
    lab = Lab("b")
    for old in (suspect(ME, 9), dead(ME, 3), suspect(ME, 1)):
        assert emitted(lab.told(old), "Refuted") == []
    assert lab.core.incarnation == 10


@pytest.mark.parametrize("accusers", [1, 2, 3, 4])
def test_suspect_dogpile(accusers: int) -> None:
    """Each confirmation hastens the verdict: memberlist's table, in this core's figures at N = 6."""
    lab = Lab(*"abcde", config=GossipConfig(probe_period_s=1e6))
    for name in "abcd"[:accusers]:
        lab.told(suspect("e", by=(name,)), name)
    expected = {1: 9.0, 2: 5.25, 3: 3.06, 4: 1.5}[accusers] * (1e6 * 2 / 1.5)
    deadline = lab.core.roster.deadline
    assert deadline - lab.now == pytest.approx(expected, rel=0.01)


def test_confirmations_travel_with_the_claim() -> None:
    """One message from one member can bring the word of four."""
    lab = Lab(*"abcde")
    lab.told(suspect("e", by=("a", "b", "c", "d")))
    info = lab.core.member(NodeId("e"))
    assert info is not None
    assert info.confirmations == 4


def test_suspicion_refutal() -> None:
    lab = Lab("b", "c")
    lab.told(suspect("c"))
    lab.told(alive("c", 2))
    assert lab.core.roster.deadline == float("inf")
    assert [event.new for event in emitted(lab.run(1.0), "MemberChanged") if event.node == "c"] == []


def test_a_suspect_that_is_silent_is_declared_dead() -> None:
    lab = Lab("b")
    lab.told(suspect("b", by=("b",)))
    events = emitted(lab.run(1.6), "MemberChanged")
    assert [(event.node, event.new) for event in events] == [("b", "dead")]
    assert lab.core.n == 1


def test_a_suspect_hears_of_it_in_the_next_message() -> None:
    lab = Lab("b", "c")
    lab.told(suspect("c", by=("b",)))
    lab.run(3.0)
    lab.effects.clear()
    (reply,) = [message for to, message in sends(lab.hears(Ping(1), "c")) if to == "c" and hasattr(message, "seq")]
    assert [update.record.node for update in reply.updates][:1] == ["c"]


# -- dead


def test_dead_node() -> None:
    lab = Lab("b", "c")
    (event,) = emitted(lab.told(dead("c")), "MemberChanged")
    assert (event.old, event.new) == ("alive", "dead")
    assert lab.core.n == 2


def test_dead_node_no_node_leaves_a_tombstone() -> None:
    lab = Lab("b")
    lab.told(dead("c", 7))
    lab.told(alive("c", 7))
    assert lab.state("c") == "dead"


def test_dead_node_double() -> None:
    lab = Lab("b", "c", "d")
    lab.told(dead("c", by=("b", "x")))
    assert emitted(lab.told(dead("c", by=("b", "x")), "d"), "MemberChanged") == []


def test_a_death_that_only_its_finder_saw_is_a_suspicion() -> None:
    """An ill finder would bury the healthy otherwise.  With one's own failed probe it is confirmed."""
    lab = Lab("b", "c", "d")
    lab.told(dead("c", by=("b",)))
    assert lab.state("c") == "suspect"
    lab.told(dead("c", by=("d",)), "d")
    assert lab.state("c") == "dead"


def test_the_last_call() -> None:
    """Before a verdict that nobody else shares the suspect is probed once more, and hears of the suspicion by it."""
    lab = Lab("b", "c", config=GossipConfig(suspicion_max_mult=1.0))
    lab.told(suspect("c", by=("b",)))
    lab.core.roster.members.next_to_probe()
    lab.core.prober.stop()
    effects = lab.run(1.6)
    ((to, ping),) = sends(effects, "Ping")
    assert (to, ping.updates[0].record.node, ping.updates[0].state) == ("c", "c", State.SUSPECT)
    assert lab.state("c") == "suspect"
    lab.run(0.5)
    assert lab.state("c") == "dead"


def test_dead_node_old_dead() -> None:
    lab = Lab("b", "c")
    lab.told(alive("c", 10))
    lab.told(dead("c", 9))
    assert lab.state("c") == "alive"


def test_dead_node_alive_replay() -> None:
    lab = Lab("b", "c")
    lab.told(dead("c", 5))
    lab.told(alive("c", 5))
    lab.told(alive("c", 4))
    assert lab.state("c") == "dead"


def test_dead_node_refute() -> None:
    lab = Lab("b")
    effects = lab.told(dead(ME, 10))
    assert lab.core.incarnation == 11
    assert emitted(effects, "Refuted")[0].held == "dead"


def test_dead_node_stores_the_larger_incarnation() -> None:
    """memberlist forgets it and resurrects the dead (al8n/memberlist PR #197)."""
    lab = Lab("b", "c")
    lab.told(dead("c", 1))
    lab.told(dead("c", 5))
    lab.told(alive("c", 3))
    assert (lab.state("c"), lab.incarnation("c")) == ("dead", 5)
    lab.told(alive("c", 6))
    assert lab.state("c") == "alive"


def test_dead_node_left() -> None:
    """Only the member itself says that it left; after that nobody can make it dead or alive at that incarnation."""
    lab = Lab("b", "c")
    lab.told(left("c", 2))
    assert lab.state("c") == "left"
    for stale in (suspect("c", 1), dead("c", 1), alive("c", 1)):
        lab.told(stale)
    assert lab.state("c") == "left"
    lab.told(alive("c", 3))
    assert lab.state("c") == "alive"


def test_left_is_believed_of_the_member_alone() -> None:
    lab = Lab("b", "c")
    assert emitted(lab.told(said(State.LEFT, "c", 2)), "Rejected")
    assert emitted(lab.told(said(State.DEAD, "c", 2, left=True)), "Rejected")
    assert lab.state("c") == "alive"


def test_declaring_a_member_as_down_notifies_it() -> None:
    lab = Lab("b", "c", "d")
    lab.told(dead("c"))
    lab.run(3.0)
    assert any(
        to == "c" and message.updates[0].record.node == "c" and message.updates[0].state is State.DEAD
        for to, message in sends(lab.effects, "Gossip")
    )


def test_what_is_told_to_suspects_is_not_counted_as_spread() -> None:
    """In a mesh of three all copies could go to the one that is dead, and the third would never confirm (found by
    simulation)."""
    lab = Lab("b", "c")
    lab.core.prober.stop()
    lab.told(suspect("c", by=("b",)))
    gossip = sends(lab.run(2.0), "Gossip")
    assert sum(to == "b" and message.updates != () for to, message in gossip) == 8


def test_the_one_who_suspects_is_told_of_the_refutation_once() -> None:
    """The news is the reply's subject already: it does not ride on it a second time."""
    lab = Lab("b", "c", "d")
    (_, reply), *others = sends(lab.told(suspect("me", 10), "b"), "Gossip")
    assert [update.record.node for update in reply.updates].count("me") == 1
    assert others == []


def test_gossip_to_dead_ends_after_a_while() -> None:
    lab = Lab("b", "c", "d", config=GossipConfig(announce_period_s=1e6))
    lab.told(dead("c"))
    lab.run(60.0)
    lab.effects.clear()
    for incarnation in range(2, 12):
        lab.told(alive("d", incarnation))
        lab.run(0.5)
    assert "c" not in [to for to, _ in sends(lab.effects)]


def test_who_is_held_dead_but_writes_is_told_so() -> None:
    lab = Lab("b", "c")
    lab.told(dead("c"))
    lab.run(3.0)
    effects = lab.hears(Gossip(), "c")
    (notice,) = [message for to, message in sends(effects, "Gossip") if to == "c"]
    assert notice.updates[0].state is State.DEAD
    assert sends(lab.hears(Gossip(), "c")) == []  # but not for every word


def test_the_dead_are_announced_to() -> None:
    lab = Lab("b", "c", "d", "e")
    for name in "cde":
        lab.told(dead(name))
    lab.run(50.0)
    lab.effects.clear()
    lab.run(61.0)
    told = [to for to, message in sends(lab.effects, "Gossip") if message.updates]
    assert len(set(told) & set("cde")) >= 2


# -- comparing tables


def test_merge_state() -> None:
    """memberlist's TestMemberlist_MergeState: alive, suspect and dead as suspect."""
    lab = Lab("b", "c", "d")
    synced(lab, alive("b", 2), suspect("c", 1), dead("d", 1), alive("e", 1))
    assert [lab.state(name) for name in "bcde"] == ["alive", "suspect", "suspect", "alive"]
    assert lab.incarnation("b") == 2


def test_dead_in_a_sync_is_suspect_and_told_to_its_subject() -> None:
    lab = Lab("b", "c")
    effects = synced(lab, dead("c", 1))
    assert lab.state("c") == "suspect"
    assert "c" in [to for to, _ in sends(effects, "Gossip")]


def test_left_in_a_sync_is_left() -> None:
    lab = Lab("b", "c")
    synced(lab, left("c", 2))
    assert lab.state("c") == "left"


def test_a_tombstone_disallows_adding_again() -> None:
    lab = Lab("b")
    synced(lab, dead("c", 5), age_s=100)
    synced(lab, alive("c", 5))
    assert lab.state("c") == "dead"


def test_tombstones_keep_their_age_on_their_travels() -> None:
    """chitchat's gc_with_network_partition: otherwise tombstones are handed round forever."""
    lab = Lab("b")
    synced(lab, dead("c", 5), age_s=24 * 3600 - 100)
    lab.run(200.0)
    assert lab.state("c") is None
    synced(lab, dead("c", 5), age_s=24 * 3600 + 1)
    assert lab.state("c") is None


def test_old_tombstones_are_not_passed_on_as_news() -> None:
    lab = Lab("b")
    lab.run(5.0)
    synced(lab, dead("c", 5), age_s=100)
    assert NodeId("c") not in lab.core.roster.news


def test_rows_of_other_buckets_are_rejected() -> None:
    lab = Lab("b")
    effects = lab.hears(SyncRows(bytes(8), (SyncRow(alive("c")),), False), "b")
    assert emitted(effects, "Rejected")
    assert lab.state("c") is None


# -- joining and leaving


def test_join_asks_seeds_until_one_answers() -> None:
    lab = Lab(join=False)
    lab.did(lab.core.join([(NodeId("s"), "s:1")], lab.now))
    assert persisted(lab.effects) == [SavedIncarnation(10)]
    asked = [to for to, _ in sends(lab.run(5.0), "Join")]
    assert asked == ["s"] * len(asked)
    assert len(asked) >= 3
    effects = synced(lab, alive("s"), alive("c"), sender="s")
    assert emitted(effects, "Joined")[0].seed == "s"
    assert sends(lab.run(5.0), "Join") == []


def test_join_is_answered_with_every_row() -> None:
    lab = Lab("b", "c")
    effects = lab.hears(Join(alive("d")), "d")
    ((to, rows),) = sends(effects, "SyncRows")
    assert to == "d"
    assert sorted(row.update.record.node for row in rows.rows) == ["b", "c", "d", "me"]
    assert lab.state("d") == "alive"


def test_join_in_anothers_name_is_rejected() -> None:
    lab = Lab("b")
    assert emitted(lab.hears(Join(alive("d")), "b"), "Rejected")
    assert lab.state("d") is None


def test_join_of_a_dead_node() -> None:
    """memberlist's Join_DeadNode: it comes back with its larger incarnation, elsewhere."""
    lab = Lab("b", "c")
    lab.told(dead("c", 1))
    lab.hears(Join(alive("c", 2, address="c:2")), "c")
    assert (lab.state("c"), lab.core.address_of(NodeId("c"))) == ("alive", "c:2")


def test_leave_spreads_before_the_end() -> None:
    lab = Lab("b", "c", "d")
    effects = lab.did(lab.core.leave(lab.now))
    assert persisted(effects) == [SavedIncarnation(11)]
    assert sorted(to for to, _ in sends(effects, "Gossip")) == ["b", "c", "d"]
    effects = lab.run(5.0)
    assert len(emitted(effects, "Departed")) == 1
    assert lab.core.deadline is None
    assert sends(effects, "Ping") == []


def test_leave_alone_ends_at_once() -> None:
    lab = Lab()
    lab.did(lab.core.leave(lab.now))
    assert emitted(lab.run(0.1), "Departed")


def test_a_leaving_node_does_not_refute() -> None:
    lab = Lab("b")
    lab.core.leave(lab.now)
    lab.told(dead(ME, 10))
    assert lab.core.incarnation == 11  # raised once, by leaving


def test_the_leaving_are_not_suspected() -> None:
    lab = Lab("b", "c")
    lab.told(left("c", 2))
    events = emitted(lab.run(20.0), "MemberChanged")
    assert [event for event in events if event.node == "c"] == []


def test_strangers_are_asked_who_they_are() -> None:
    lab = Lab("b")
    effects = lab.hears(Ping(5), "stranger")
    assert [to for to, _ in sends(effects, "Ack")] == ["stranger"]
    assert [to for to, _ in sends(effects, "Buckets")] == ["stranger"]
    assert sends(lab.hears(Ping(6), "stranger"), "Buckets") == []


def test_an_expelled_member_is_dead_for_good() -> None:
    lab = Lab("b", "c")
    lab.did(lab.core.expel(NodeId("c"), lab.now))
    lab.told(alive("c", 99))
    lab.hears(Join(alive("c", 100)), "c")
    assert lab.state("c") == "dead"


def test_members_are_bounded() -> None:
    lab = Lab("b", "c", config=GossipConfig(max_members=4))
    lab.told(alive("d"))
    lab.told(alive("e"))
    assert lab.state("e") is None
    lab.told(dead("c"))
    lab.told(alive("e"))
    assert (lab.state("c"), lab.state("e")) == (None, "alive")  # a tombstone makes room


def test_set_address_is_a_new_incarnation() -> None:
    lab = Lab("b")
    effects = lab.did(lab.core.set_address("me:9", lab.now))
    assert persisted(effects) == [SavedIncarnation(11)]
    assert lab.core.address_of(ME) == "me:9"
    assert persisted(lab.core.set_address("me:9", lab.now)) == []
