"""Probes: direct, through helpers, over the stream; what they cost and what they prove."""

from __future__ import annotations

import pytest

from gossip.config import GossipConfig
from gossip.messages import Ack, Gossip, Nack, Ping, PingReq, StreamAck, StreamPing, Vitals
from mesh.types import NodeId
from tests.gossip.lab import Lab, alive, emitted, sends, suspect


def probe_indirectly(lab: Lab, target: str) -> tuple[Ping, list[str]]:
    """Let a direct ping of ``target`` time out; the ping and the helpers asked."""
    ping = lab.until_ping(target)
    effects = lab.run(0.21)
    return ping, [to for to, request in sends(effects, "PingReq") if request.target == target]


def answer_all(lab: Lab, seconds: float, silent: str = "", step: float = 0.01) -> list:
    """Every peer but ``silent`` answers pings (and ping requests by a nack) for so long."""
    start, end = len(lab.effects), lab.now + seconds
    done = start
    while lab.now < end:
        lab.run(step)
        for to, message in sends(lab.effects[done:]):
            if isinstance(message, Ping) and to != silent:
                lab.hears(Ack(message.seq), to)
            elif isinstance(message, PingReq) and to != silent:
                lab.hears(Nack(message.seq), to)
            elif isinstance(message, StreamPing) and to != silent:
                lab.hears(StreamAck(message.seq), to)
        done = len(lab.effects)
    return lab.effects[start:]


def test_probe_node() -> None:
    lab = Lab("b")
    ping = lab.until_ping("b")
    lab.run(0.01)
    lab.hears(Ack(ping.seq), "b")
    assert lab.state("b") == "alive"
    info = lab.core.member(NodeId("b"))
    assert info is not None
    assert info.rtt_ms == pytest.approx(10.0)
    assert lab.core.median_rtt_ms() == pytest.approx(10.0)


def test_probe_node_suspect() -> None:
    """No ack, no help: suspect at the end of the period, and told so at once."""
    lab = Lab("b", "c")
    lab.until_ping("b")
    effects = lab.run(0.6)
    assert lab.state("b") == "suspect"
    said = [update for to, message in sends(effects, "Gossip") if to == "b" for update in message.updates]
    assert [update.by for update in said if update.record.node == "b"][:1] == [("me",)]


def test_an_answer_to_another_probe_proves_nothing() -> None:
    lab = Lab("b", "c")
    ping = lab.until_ping("b")
    lab.hears(Ack(ping.seq + 77), "b")
    lab.hears(Ack(ping.seq), "c")  # another member cannot answer for it
    lab.hears(Ack(ping.seq, NodeId("b")), "c")  # nor as a helper that was not asked
    lab.run(0.6)
    assert lab.state("b") == "suspect"


def test_direct_timeout_then_helpers_and_the_stream() -> None:
    lab = Lab("b", "c", "d", "e", "f")
    ping = lab.until_ping("b")
    assert sends(lab.run(0.19), "PingReq") == []
    effects = lab.run(0.02)
    requests = sends(effects, "PingReq")
    assert len({to for to, _ in requests}) == 3
    assert "b" not in [to for to, _ in requests]
    assert {request.within_ms for _, request in requests} == {300}  # the deadline travels
    assert sends(effects, "StreamPing") == [("b", StreamPing(ping.seq))]


def test_a_fast_member_is_given_less_time() -> None:
    lab = Lab("b")
    ping = lab.until_ping("b")
    lab.run(0.001)
    lab.hears(Ack(ping.seq), "b")
    lab.until_ping("b")
    assert len(sends(lab.run(0.07), "StreamPing")) == 1  # 60 ms, not 200


def test_an_indirect_ack_saves() -> None:
    lab = Lab("b", "c")
    ping, helpers = probe_indirectly(lab, "b")
    lab.hears(Ack(ping.seq, NodeId("b")), helpers[0])
    lab.run(0.4)
    assert lab.state("b") == "alive"
    info = lab.core.member(NodeId("b"))
    assert info is not None
    assert info.rtt_ms is None  # the way round is no round trip


def test_the_stream_saves() -> None:
    lab = Lab("b", "c")
    ping, _ = probe_indirectly(lab, "b")
    lab.hears(StreamAck(ping.seq), "b")
    lab.run(0.4)
    assert lab.state("b") == "alive"


def test_a_late_ack_saves() -> None:
    lab = Lab("b", "c")
    ping, _ = probe_indirectly(lab, "b")
    lab.run(0.2)
    lab.hears(Ack(ping.seq), "b")
    lab.run(0.2)
    assert lab.state("b") == "alive"


def test_a_member_is_not_probed_twice_at_once() -> None:
    lab = Lab("b")
    lab.until_ping("b")
    assert sends(lab.did(lab.core.note_connection_lost(NodeId("b"), lab.now)), "Ping") == []


def test_a_lost_connection_is_probed_at_once() -> None:
    lab = Lab("b", "c")
    effects = lab.did(lab.core.note_connection_lost(NodeId("c"), lab.now))
    assert [to for to, _ in sends(effects, "Ping")] == ["c"]
    assert sends(lab.did(lab.core.note_connection_lost(NodeId("nobody"), lab.now))) == []


def test_can_recover_from_incomplete_probe_cycle() -> None:
    """foca's: a driver that sleeps through a whole cycle goes on afterwards."""
    lab = Lab("b", "c")
    lab.until_ping("b")
    lab.sleep(30.0)
    answer_all(lab, 10.0)
    assert (lab.state("b"), lab.state("c")) == ("alive", "alive")


# -- local health


def test_awareness_degraded_without_helpers() -> None:
    lab = Lab("b")
    lab.until_ping("b")
    lab.run(0.51)
    assert lab.core.health.count == 1


def test_awareness_improved() -> None:
    lab = Lab("b")
    lab.core.health.add(3)
    ping = lab.until_ping("b")
    lab.hears(Ack(ping.seq), "b")
    assert lab.core.health.count == 2


def test_awareness_missed_nack() -> None:
    lab = Lab("b", "c", "d", "e")
    ping, helpers = probe_indirectly(lab, "b")
    assert len(helpers) == 3
    lab.hears(Nack(ping.seq), helpers[0])
    lab.run(0.3)
    assert lab.core.health.count == 2


def test_nacks_from_all_helpers_clear_the_prober() -> None:
    lab = Lab("b", "c", "d", "e")
    ping, helpers = probe_indirectly(lab, "b")
    for helper in helpers:
        lab.hears(Nack(ping.seq), helper)
        lab.hears(Nack(ping.seq), helper)
    lab.run(0.3)
    assert lab.core.health.count == 0
    assert lab.state("b") == "suspect"


def test_a_nack_of_one_that_was_not_asked_does_not_count() -> None:
    lab = Lab("b", "c", "d", "e", "f")
    ping, helpers = probe_indirectly(lab, "b")
    (idle,) = set("cdef") - set(helpers)
    lab.hears(Nack(ping.seq), idle)
    lab.run(0.3)
    assert lab.core.health.count == 3


def test_local_health_makes_patient() -> None:
    lab = Lab("b", "c", "d")
    lab.core.health.add(2)
    lab.until_ping()
    start = lab.now
    effects = lab.run(0.59)
    assert sends(effects, "PingReq") == []
    assert sends(lab.run(0.02), "PingReq")
    lab.until_ping()
    assert lab.now - start == pytest.approx(1.5)


def test_lag_makes_patient() -> None:
    lab = Lab("b", "c")
    lab.core.note_lag(0.25)
    assert lab.core.local_health(lab.now) == 2


def test_a_late_tick_is_lag() -> None:
    lab = Lab("b", "c")
    assert lab.core.deadline is not None
    lab.now = lab.core.deadline + 0.45
    lab.did(lab.core.tick(lab.now))
    assert lab.core.local_health(lab.now) == 4


# -- wake guard


def test_a_late_tick_adds_its_lateness_to_every_suspicion() -> None:
    lab = Lab("b", "c", config=GossipConfig(probe_period_s=0.4))
    lab.told(suspect("b", by=("c",)), "c")
    before = lab.core.roster.deadline
    due = lab.core.deadline
    assert due is not None
    lab.now = due + 7.0
    lab.did(lab.core.tick(lab.now))
    assert lab.core.roster.deadline == pytest.approx(before + 7.0)
    assert lab.state("b") == "suspect"


def test_who_wakes_up_gives_a_period_before_any_verdict() -> None:
    lab = Lab("b", "c")
    lab.told(suspect("b", by=("c", "x", "y", "z")), "c")
    lab.run(1.49)
    lab.sleep(60.0)
    lab.did(lab.core.tick(lab.now))
    assert lab.core.roster.deadline >= lab.now + 0.5


def test_messages_first_then_the_clock() -> None:
    """Mail that waited while this node slept is read before anybody is judged; lateness is counted once."""
    lab = Lab("b", "c")
    lab.told(suspect("b", by=("c",)), "c")
    lab.sleep(100.0)
    lab.hears(Gossip(), "c")
    deadline = lab.core.roster.deadline
    lab.hears(Gossip(), "c")
    lab.did(lab.core.tick(lab.now))
    assert lab.core.roster.deadline == deadline > lab.now


def test_without_the_guard_sleepers_bury_the_living() -> None:
    lab = Lab("b", "c", config=GossipConfig(wake_guard=False, last_call=False))
    lab.told(suspect("b", by=("c",)), "c")
    lab.sleep(100.0)
    lab.did(lab.core.tick(lab.now))
    assert lab.state("b") == "dead"


def test_a_verdict_brought_forward_is_not_lateness() -> None:
    """Confirmations may end a suspicion at a time that is past; nobody slept (found by simulation)."""
    lab = Lab(*"bcdefgh")
    lab.core.prober.stop()
    lab.told(suspect("b", by=("c",)))
    lab.run(5.0)
    lab.told(suspect("b", by=("d", "e", "f")))
    lab.run(0.0)
    assert lab.state("b") == "dead"
    assert lab.core.local_health(lab.now) == 0


# -- helping


def test_a_helper_pings_and_passes_the_ack_on() -> None:
    lab = Lab("b", "c")
    (to, ping), *_ = sends(lab.hears(PingReq(7, NodeId("c"), 300), "b"), "Ping")
    assert to == "c"
    lab.run(0.1)
    acks = sends(lab.hears(Ack(ping.seq, vitals=Vitals(lag_ms=5)), "c"), "Ack")
    assert [(to, ack.seq, ack.about, ack.vitals.lag_ms) for to, ack in acks] == [("b", 7, "c", 5)]


def test_a_helper_nacks_by_four_fifths_of_the_time() -> None:
    lab = Lab("b", "c")
    lab.hears(PingReq(7, NodeId("c"), 300), "b")
    assert sends(lab.run(0.239), "Nack") == []
    assert sends(lab.run(0.002), "Nack") == [("b", Nack(7))]
    assert sends(lab.run(1.0), "Nack") == []


def test_a_helper_passes_an_ack_on_even_after_its_nack() -> None:
    lab = Lab("b", "c")
    (_, ping), *_ = sends(lab.hears(PingReq(7, NodeId("c"), 300), "b"), "Ping")
    lab.run(0.25)
    assert sends(lab.hears(Ack(ping.seq), "c"), "Ack")


def test_a_helper_that_does_not_know_the_target_says_so_at_once() -> None:
    lab = Lab("b")
    assert sends(lab.hears(PingReq(7, NodeId("stranger"), 300), "b"), "Nack") == [("b", Nack(7))]


def test_relays_are_bounded() -> None:
    lab = Lab("b", "c")
    for seq in range(400):
        lab.hears(PingReq(seq, NodeId("c"), 10**9), "b")
    assert len(sends(lab.effects, "Ping")) == 256
    assert len(sends(lab.effects, "Nack")) == 400 - 256


# -- answering


def test_a_ping_is_answered_with_vitals() -> None:
    lab = Lab("b")
    lab.core.note_engine(3, lab.now)
    lab.run(2.0)
    lab.core.note_lag(0.15)
    ((to, ack),) = sends(lab.hears(Ping(9), "b"), "Ack")
    assert (to, ack.seq) == ("b", 9)
    assert ack.vitals == Vitals(lag_ms=150, queue=3, stuck_ms=2000)
    lab.core.note_engine(3, lab.now, finished_step=True)
    ((_, ack),) = sends(lab.hears(Ping(10), "b"), "Ack")
    assert ack.vitals.stuck_ms == 0
    lab.core.note_engine(0, lab.now)
    lab.run(60.0)
    ((_, ack),) = sends(lab.hears(Ping(11), "b"), "Ack")
    assert ack.vitals.stuck_ms == 0  # idle is not stuck


@pytest.mark.parametrize(
    ("vitals", "degraded"),
    [
        (Vitals(), False),
        (Vitals(lag_ms=999), False),
        (Vitals(lag_ms=1000), True),
        (Vitals(queue=5, stuck_ms=9_999), False),
        (Vitals(queue=5, stuck_ms=10_000), True),
    ],
)
def test_who_answers_but_does_not_compute_is_degraded(vitals: Vitals, degraded: bool) -> None:
    lab = Lab("b")
    ping = lab.until_ping("b")
    effects = lab.hears(Ack(ping.seq, vitals=vitals), "b")
    info = lab.core.member(NodeId("b"))
    assert info is not None
    assert (info.state, info.degraded) == ("alive", degraded)
    assert len(emitted(effects, "DegradedChanged")) == degraded


def test_a_mesh_of_living_members_has_no_suspects() -> None:
    lab = Lab(*"bcdefgh")
    effects = answer_all(lab, 20.0)
    assert emitted(effects, "MemberChanged") == []
    assert lab.core.local_health(lab.now) == 0
    assert 35 <= len(sends(effects, "Ping")) <= 41


def test_one_silent_member_of_many_is_found_alone() -> None:
    lab = Lab(*"bcdefgh")
    effects = answer_all(lab, 30.0, silent="d")
    assert {event.node for event in emitted(effects, "MemberChanged")} == {"d"}
    assert lab.state("d") == "dead"


def test_a_probe_of_an_earlier_life_does_not_accuse() -> None:
    """Its target was down when it was sent, and came back before it failed."""
    lab = Lab("b", "c", "d", "e")
    lab.until_ping("b")
    lab.told(alive("b", 2), "b")
    lab.run(0.6)
    assert lab.state("b") == "alive"
