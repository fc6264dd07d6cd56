"""Every number of the membership protocol, with its unit and its reason.  Times are seconds.

Sources: SWIM (Das, Gupta, Motivala, DSN 2002), Lifeguard (Dadgar, Phillips, Currey, arXiv 1707.00788), and the
defaults of hashicorp/memberlist, which ``memberlist()`` restates for comparison.
"""

from __future__ import annotations

import math

import msgspec


class GossipConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One node's settings; all nodes of a mesh should share them.  The defaults are ``lan()``."""

    # -- probing
    probe_period_s: float = 0.5
    """One member is probed per period, times (local health + 1).  Twice memberlist's rate, still about 0.4 KB/s."""
    direct_min_s: float = 0.06
    direct_max_s: float = 0.2
    """The direct ping waits clamp(rtt_factor x p99 RTT, direct_min_s, direct_max_s), times (local health + 1)."""
    rtt_factor: float = 3.0
    helpers: int = 3
    """Members asked to ping in our place once the direct ping timed out."""
    nack_share: float = 0.8
    """A helper answers by this share of the prober's remaining time.  At 1.0 the nack comes one trip too late and a
    healthy prober blames itself (swift-cluster-membership #6)."""

    # -- local health
    health_max: int = 8
    """Largest local health multiplier; 0 switches local health off."""
    lag_step_s: float = 0.1
    """Local health grows by floor(p99 of event-loop lag / this)."""
    lag_window_s: float = 10.0

    # -- suspicion
    suspicion_floor_s: float = 1.5
    suspicion_mult: float = 2.0
    """Suspicion lasts at least max(floor, mult x log10(max(10, N)) x probe period): 3 s at N = 1,000."""
    suspicion_max_mult: float = 6.0
    """... and at most this many times as long, while nobody confirms it."""
    confirmations: int = 3
    """K: min(this, N - 2) confirmations bring the time from its maximum down to its minimum."""
    small_mesh_confirms: bool = True
    """False: K = 0 wherever N - 2 < confirmations, as memberlist has it."""
    last_call: bool = True
    """A death that one member alone found is a suspicion to all others, and that one probes once more before it
    says so.  Else a member that loses most of its packets buries the healthy (not in SWIM; found by simulation)."""
    wake_guard: bool = True
    """A tick late by d adds d to every suspicion and probe deadline: a stalled loop must not declare others dead."""

    # -- dissemination
    gossip_period_s: float = 0.2
    fanout: int = 3
    """Targets per gossip period, and only while there is news."""
    retransmit_mult: float = 4.0
    """Each update is sent ceil(mult x log10(N + 1)) times ..."""
    retransmit_least: int = 8
    """... and at least so often: in a mesh of six, four copies of a refutation leave at once, and at 30 % loss all are
    lost once in a hundred times."""
    subject_first: bool = True
    """A suspicion is sent to its subject at once, so that it can refute."""
    datagram_bytes: int = 1_100
    """Largest encoded datagram before sealing: at most 1,200 on the wire."""

    # -- anti-entropy
    sync_period_s: float = 10.0
    """Comparison with one random member (jittered by a fifth)."""
    sync_min_s: float = 1.0
    """... which comes sooner, down to this, while comparisons find differences, and after joining."""

    # -- the dead
    dead_gossip_s: float = 30.0
    """The recently dead stay targets of gossip, so that a wrongly declared one hears of it."""
    tombstone_s: float = 24 * 3600.0
    """What is remembered of the dead; a shorter memory would let late news resurrect them."""
    announce_period_s: float = 60.0
    announce_targets: int = 2
    """Dead members that are written to, so that a healed partition finds itself without seeds."""

    # -- joining, leaving
    join_retry_s: float = 1.0
    leave_s: float = 2.0
    """The longest that ``leave`` takes to spread."""

    # -- profiles
    load_change: float = 0.1
    """Load is published on a relative change of at least this ..."""
    load_period_s: float = 10.0
    """... and at most once in this time."""
    load_everyone: int = 64
    """Up to this many members load goes to everyone, above only to those that watch."""
    watch_period_s: float = 10.0
    pull_retry_s: float = 0.5
    """First wait for a requested profile; doubled at each of the three tries."""

    # -- degraded: answers pings but does not compute
    degraded_lag_s: float = 1.0
    degraded_step_s: float = 10.0
    """Time without a finished engine step while work is queued."""

    # -- bounds
    max_members: int = 8_192
    """Members and tombstones together; old tombstones go first, then new members are refused."""

    def retransmissions(self, n: int) -> int:
        """How often each update is sent in a mesh of ``n`` members."""
        return max(self.retransmit_least, math.ceil(self.retransmit_mult * math.log10(n + 1)))


def lan() -> GossipConfig:
    """Machines on one network, RTT below about 20 ms."""
    return GossipConfig()


def wan() -> GossipConfig:
    """Machines over the Internet, RTT up to about 500 ms, home uplinks."""
    return GossipConfig(
        probe_period_s=2.0,
        direct_min_s=0.3,
        direct_max_s=1.0,
        lag_step_s=0.3,
        suspicion_floor_s=6.0,
        gossip_period_s=0.5,
        sync_period_s=20.0,
        sync_min_s=3.0,
        dead_gossip_s=60.0,
        join_retry_s=3.0,
        leave_s=5.0,
        pull_retry_s=1.5,
    )


def loopback() -> GossipConfig:
    """Processes of one machine: the network is fast, but the processors are shared, so stalls are common."""
    return GossipConfig(
        probe_period_s=0.3,
        direct_min_s=0.05,
        direct_max_s=0.15,
        suspicion_floor_s=1.5,
        gossip_period_s=0.1,
        join_retry_s=0.5,
    )


def memberlist() -> GossipConfig:
    """hashicorp/memberlist's DefaultLANConfig in this core, for comparison only."""
    return GossipConfig(
        probe_period_s=1.0,
        direct_min_s=0.5,
        direct_max_s=0.5,
        nack_share=1.0,
        lag_step_s=math.inf,
        suspicion_floor_s=0.0,
        suspicion_mult=4.0,
        confirmations=2,
        small_mesh_confirms=False,
        wake_guard=False,
        last_call=False,
        retransmit_least=1,
        subject_first=False,
        sync_period_s=30.0,
        sync_min_s=30.0,
    )


def without_lifeguard(config: GossipConfig) -> GossipConfig:
    """The same as plain SWIM: no local health, no confirmations, no guards, nobody told first."""
    return msgspec.structs.replace(
        config,
        health_max=0,
        suspicion_max_mult=1.0,
        confirmations=0,
        wake_guard=False,
        last_call=False,
        subject_first=False,
    )
