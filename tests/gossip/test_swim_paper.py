"""Sentences of the SWIM and Lifeguard papers, and what this core makes of each.

Departures: a failed probe whose helpers all nacked does not count against local health (memberlist's reading, not
Lifeguard's table I); a lone accuser probes once more before its verdict, and a death without a second accuser is a
suspicion to others (neither paper; found by simulation); confirmations travel as a set inside the claim.
"""

from __future__ import annotations

import math

from gossip.config import GossipConfig, lan, loopback, memberlist, wan, without_lifeguard
from gossip.messages import Ack, Gossip, Nack, Ping, PingReq, State
from mesh.types import NodeId
from tests.gossip.lab import ME, Lab, alive, dead, emitted, sends, suspect
from tests.gossip.test_prober import answer_all


def test_swim_3_1_ping_then_ping_req_to_k_members_then_failed() -> None:
    """'If this ack is not received within a prespecified time-out ... Mi selects k members at random and sends each a
    ping-req(Mj) message. ... At the end of this protocol period, Mi checks if it has received any acks.'"""
    lab = Lab(*"bcdefg")
    target = "b"
    ping = lab.until_ping(target)
    effects = lab.run(0.51)
    requests = sends(effects, "PingReq")
    assert [request.target for _, request in requests if request.seq == ping.seq] == [target] * 3
    assert lab.state(target) == "suspect"


def test_swim_3_1_load_is_constant() -> None:
    """'the expected load of each member does not vary with group size': pings a second are those of the period."""
    for names in ("bcd", "bcdefghijklmnopq"):
        lab = Lab(*names)
        assert 38 <= len(sends(answer_all(lab, 20.0), "Ping")) <= 41


def test_swim_4_1_updates_are_piggybacked_on_pings_and_acks() -> None:
    lab = Lab(*"bcd", config=GossipConfig(retransmit_mult=40.0))
    lab.told(alive("e"))
    carriers = {
        type(message).__name__
        for _, message in sends(lab.hears(Ping(1), "b") + lab.run(1.0))
        if "e" in [update.record.node for update in getattr(message, "updates", ())]
    }
    assert carriers >= {"Ack", "Ping", "Gossip"}


def test_swim_4_1_each_update_is_sent_lambda_log_n_times() -> None:
    """'a maximum of lambda log n times', younger ones first."""
    lab = Lab(*"bcdefgh", config=GossipConfig(probe_period_s=1e6, retransmit_least=1))
    lab.run(30.0)
    lab.told(alive("z"))
    effects = lab.run(10.0)
    times = sum(
        update.record.node == "z" for _, message in sends(effects) for update in getattr(message, "updates", ())
    )
    assert times == math.ceil(4 * math.log10(lab.core.n + 1))


def test_swim_4_2_suspect_is_overridden_by_alive_of_larger_incarnation_only() -> None:
    """'Alive with a higher incarnation number overrides suspect; suspect overrides alive at the same.'"""
    lab = Lab("b", "c")
    lab.told(suspect("c", 3))
    for incarnation, state in ((2, "suspect"), (3, "suspect"), (4, "alive")):
        lab.told(alive("c", incarnation))
        assert lab.state("c") == state


def test_swim_4_2_confirm_overrides_alive_and_suspect() -> None:
    """'The confirm message overrides' both, at the same incarnation.  Here a confirm is a death with two accusers."""
    lab = Lab("b", "c", "d")
    lab.told(suspect("c"))
    for name in "cd":
        lab.told(dead(name))
        assert lab.state(name) == "dead"


def test_swim_4_2_only_the_member_itself_raises_its_incarnation() -> None:
    """'incremented only by Mi, when it receives information about itself being suspected'."""
    lab = Lab("b")
    before = lab.core.incarnation
    lab.told(alive(ME, 3))
    lab.told(suspect(ME, before))
    assert lab.core.incarnation == before + 1


def test_swim_4_3_round_robin_bounds_the_time_to_detection() -> None:
    """'each member is pinged within 2n - 1 periods of its failure'."""
    lab = Lab(*"bcdefg")
    answer_all(lab, 1.0)
    effects = answer_all(lab, (2 * 6 - 1) * 0.5, silent="e")
    assert "e" in [to for to, _ in sends(effects, "Ping")]


def test_lifeguard_iv_a_nack_tells_a_slow_prober_from_a_dead_target() -> None:
    """'the prober can then decide ... that it is itself not receiving': nacks spare it, their absence does not."""
    scores = []
    for nacks in (0, 3):
        lab = Lab(*"bcde")
        ping = lab.until_ping("b")
        for helper, request in sends(lab.run(0.25), "PingReq")[:nacks]:
            assert isinstance(request, PingReq)
            lab.hears(Nack(ping.seq), helper)
        lab.run(0.3)
        scores.append(lab.core.health.count)
    assert scores == [3, 0]


def test_lifeguard_iv_a_probe_interval_and_timeout_grow_with_local_health() -> None:
    """'ProbeInterval = BaseProbeInterval (LHM + 1)', saturating at S = 8."""
    lab = Lab("b", "c")
    lab.core.health.add(100)
    assert lab.core.local_health(lab.now) == 8
    assert lab.core.health.period_s(lab.now) == 9 * 0.5


def test_lifeguard_iv_b_suspicion_starts_long_and_falls_with_confirmations() -> None:
    lab = Lab(*"bcdefg")
    lab.core.prober.stop()
    lab.told(suspect("g", by=("b",)))
    first = lab.core.roster.deadline
    lab.told(suspect("g", by=("c",)), "c")
    assert lab.core.roster.deadline < first


def test_lifeguard_iv_b_new_confirmations_are_gossiped_again() -> None:
    """'re-gossip the first K independent suspicions'; the same accuser again is not passed on."""
    lab = Lab(*"bcdefg")
    lab.core.prober.stop()
    lab.told(suspect("g", by=("b",)))
    lab.run(2.0)
    lab.effects.clear()
    lab.told(suspect("g", by=("b",)))
    assert sends(lab.run(1.0), "Gossip") == []
    lab.told(suspect("g", by=("c",)), "c")
    told = [update for _, message in sends(lab.run(0.3), "Gossip") for update in message.updates]
    assert {update.by for update in told if update.record.node == "g"} == {("b", "c")}


def test_lifeguard_iv_c_the_suspected_is_told_first() -> None:
    """The buddy system: a ping to a suspect carries the suspicion."""
    lab = Lab(*"bcd")
    lab.told(suspect("c", by=("b",)))
    lab.core.roster.news.drop(NodeId("c"))
    ping = lab.until_ping("c")
    assert (ping.updates[0].record.node, ping.updates[0].state) == ("c", State.SUSPECT)


def test_message_from_aware_suspect_refutes_suspicion() -> None:
    """foca's: the ack to such a ping brings the refutation."""
    lab = Lab("b", "c")
    lab.told(suspect("c", by=("b",)))
    ping = lab.until_ping("c")
    lab.hears(Ack(ping.seq, updates=(alive("c", 2),)), "c")
    assert lab.state("c") == "alive"


def test_presets() -> None:
    assert lan() == GossipConfig()
    assert wan().probe_period_s > lan().probe_period_s > loopback().probe_period_s
    published = memberlist()
    assert (published.probe_period_s, published.direct_max_s, published.suspicion_mult) == (1.0, 0.5, 4.0)
    assert (published.gossip_period_s, published.fanout, published.retransmit_mult) == (0.2, 3, 4.0)
    plain = without_lifeguard(lan())
    assert (plain.health_max, plain.confirmations, plain.suspicion_max_mult) == (0, 0, 1.0)


def test_a_mesh_of_one_waits_for_nothing_but_its_sweeps() -> None:
    lab = Lab()
    assert sends(lab.run(300.0)) == []
    assert emitted(lab.effects, "MemberChanged") == []
    lab.hears(Gossip(), "b")
    assert lab.core.n == 1
