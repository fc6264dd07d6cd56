"""Failure detection: probes of others, pings made for others, and what an answer or its absence means.

A round (SWIM 3): ping one member; if it does not answer in time, ask helpers to ping it and try the peer stream; if
nothing came by the end of the period, suspect it.  Own patience grows with local health (Lifeguard, section IV-A).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gossip.config import GossipConfig
from gossip.events import DegradedChanged
from gossip.exchange import Exchange
from gossip.health import LocalHealth
from gossip.messages import Ack, Message, Nack, Ping, PingReq, State, StreamAck, StreamPing, Version, Vitals
from gossip.probe import Probe, Probes
from gossip.roster import Roster
from mesh.core import Effect, Emit
from mesh.types import NodeId

MOST = 2**31 - 1


class Prober:
    """``send(to, message)`` and ``out`` are the core's."""

    def __init__(
        self,
        config: GossipConfig,
        health: LocalHealth,
        roster: Roster,
        exchange: Exchange,
        probes: Probes,
        send: Callable[[NodeId, Message], None],
        out: list[Effect],
    ) -> None:
        self.config, self.health, self.roster, self.exchange = config, health, roster, exchange
        self._members, self._probes, self._send, self._out = roster.members, probes, send, out
        self._round_at = math.inf
        self._queue, self._busy_since = 0, 0.0

    @property
    def deadline(self) -> float:
        return min(self._round_at, self._probes.deadline)

    def start(self, when: float) -> None:
        self._round_at = when

    def stop(self) -> None:
        self._round_at = math.inf
        self._probes.cancel_all()

    def excuse(self, seconds: float) -> None:
        """This node slept for ``seconds``."""
        self._probes.delay(seconds)

    def note_engine(self, queue: int, now: float, finished_step: bool) -> None:
        if finished_step or self._queue == 0:
            self._busy_since = now
        self._queue = queue

    def tick(self, now: float) -> None:
        for probe in self._probes.due_for_help(now):
            self._ask_for_help(probe, now)
        for probe in self._probes.failed(now):
            # a failed probe whose helpers all lived to say so is the target's fault, not ours
            self.health.add(probe.missed_nacks if probe.helpers else 1)
            self.roster.accuse(probe.target, probe.incarnation, now)
        for relay in self._probes.due_nacks(now):
            self._send(relay.prober, Nack(relay.seq))
        if self._round_at <= now:
            self._round(now)

    # -- own probes

    def _round(self, now: float) -> None:
        self._round_at = now + self.health.period_s(now)
        target = self._members.next_to_probe()
        if target is not None:
            self.probe(target, now)

    def probe(self, target: NodeId, now: float) -> None:
        """Probe ``target`` now, unless that is under way."""
        member = self._members.get(target)
        if member is None or not member.present or self._probes.probing(target):
            return
        direct_s = member.rtt.direct_timeout_s(self.config) * (self.health.score(now) + 1)
        probe = self._probes.open(target, member.record.incarnation, direct_s, self.health.period_s(now), now)
        if probe is not None:
            load = self.exchange.profiles.load_row(target)
            self._send(target, Ping(probe.seq, member.version & 0xFFFF, load.version & 0xFFFF if load else 0))

    def _ask_for_help(self, probe: Probe, now: float) -> None:
        left_ms = round((probe.end - now) * 1000.0)
        if left_ms > 0:
            probe.helpers = tuple(self._helpers(probe.target))
        for helper in probe.helpers:
            self._send(helper, PingReq(probe.seq, probe.target, left_ms))
        self._send(probe.target, StreamPing(probe.seq))

    def _helpers(self, target: NodeId) -> list[NodeId]:
        """Members that are not themselves in doubt, as far as there are any."""
        sample = self._members.sample(3 * self.config.helpers, exclude=target)
        sure = [node for node in sample if (member := self._members.get(node)) and member.state is State.ALIVE]
        return sure[: self.config.helpers]

    def _answered(self, probe: Probe, vitals: Vitals, now: float, direct: bool) -> None:
        """``probe``'s target lives; ``direct``: the time it took is the round trip to it."""
        self.health.add(-1)
        member = self._members.get(probe.target)
        if member is None:
            return
        if direct:
            member.rtt.add(now - probe.sent)
        config = self.config
        slow, stuck = config.degraded_lag_s * 1000.0, config.degraded_step_s * 1000.0
        degraded = vitals.lag_ms >= slow or vitals.stuck_ms >= stuck
        if degraded != member.degraded:
            member.degraded = degraded
            self._out.append(Emit(DegradedChanged(probe.target, degraded)))

    # -- messages

    def on_ping(self, message: Ping, sender: NodeId, now: float) -> None:
        profiles, me = self.exchange.profiles, self._members.me
        own, load = profiles.version(me), profiles.load_row(me)
        versions = (Version(me, own),) if own and own & 0xFFFF != message.profile else ()
        cares = bool(message.load) or self._members.n <= self.config.load_everyone  # or it has watched
        fresh = load if load and cares and load.version & 0xFFFF != message.load else None
        self._send(sender, Ack(message.seq, vitals=self._vitals(now), load=fresh, versions=versions))

    def _vitals(self, now: float) -> Vitals:
        stuck_s = now - self._busy_since if self._queue else 0.0
        lag_ms, stuck_ms = int(self.health.lag_s(now) * 1000.0), int(stuck_s * 1000.0)
        return Vitals(min(lag_ms, MOST), min(self._queue, MOST), min(stuck_ms, MOST))

    def on_ack(self, message: Ack, sender: NodeId, now: float) -> None:
        relay = None if message.about else self._probes.relayed(message.seq, sender)
        if relay is not None:
            self._send(relay.prober, Ack(relay.seq, sender, message.vitals, message.load))
        about = message.about or sender
        probe = self._probes.answered(message.seq, about, sender)
        if probe is not None:
            self._answered(probe, message.vitals, now, direct=about == sender)
        if message.load is not None and (about == sender or probe is not None):
            self.exchange.on_load(about, message.load)

    def on_stream_ping(self, message: StreamPing, sender: NodeId, now: float) -> None:
        self._send(sender, StreamAck(message.seq, self._vitals(now)))

    def on_stream_ack(self, message: StreamAck, sender: NodeId, now: float) -> None:
        probe = self._probes.answered(message.seq, sender, sender)
        if probe is not None:
            self._answered(probe, message.vitals, now, direct=False)

    def on_ping_req(self, message: PingReq, sender: NodeId, now: float) -> None:
        known = message.target != self._members.me and self._members.get(message.target) is not None
        seq = self._probes.relay(message, sender, now) if known else None
        if seq is None:
            return self._send(sender, Nack(message.seq))  # healthy, but of no use
        self._send(message.target, Ping(seq))

    def on_nack(self, message: Nack, sender: NodeId, now: float) -> None:
        self._probes.nacked(message.seq, sender)
