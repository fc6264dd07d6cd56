"""The membership core: SWIM with Lifeguard, as a pure state machine (``mesh.core.Core``).

Who is here, where, and what each says of itself.  Members are probed one at a time; who does not answer, not even
through helpers, is *suspect* and has time to refute; then it is *dead*.  Claims spread on probes, acks and gossip;
anti-entropy repairs what gossip missed.  ``members.decide`` holds the rules of merging, ``roster`` merges by them,
``suspicion`` and ``health`` are the formulas, ``probe`` the bookkeeping, ``exchange`` the profiles, ``sync`` the
comparison of tables.  This file is the timers, and what is said to whom.

The driver owes the core: an authenticated ``sender``; an inbox that is drained before ``tick``; messages of
``messages.STREAM`` over the peer stream and all others as datagrams, to ``address_of(to)`` (or to where ``to`` last
wrote from, while it is not a member); ``join`` before anything else.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from gossip.config import GossipConfig
from gossip.events import DegradedChanged, Departed, Joined
from gossip.exchange import Exchange
from gossip.health import LocalHealth
from gossip.members import MemberInfo
from gossip.messages import (
    BUCKETS,
    DATAGRAM_CODEC,
    Ack,
    BigRows,
    Buckets,
    Gossip,
    Join,
    LoadPush,
    Message,
    Nack,
    Ping,
    PingReq,
    Root,
    Rows,
    State,
    StreamAck,
    StreamPing,
    SyncRows,
    Version,
    Vitals,
    Want,
    Watch,
)
from gossip.probe import Probe, Probes
from gossip.roster import Identity, Roster
from gossip.sync import Pace, differing, honest, reply, tell
from mesh.core import Effect, Emit, Rejected, Send
from mesh.types import NodeId, NodeProfile

JITTER_S = 0.001
"""A call later than this after the deadline means that the process did not run when it wanted to."""
REMIND_S = 1.0
"""A member held dead that writes to us is told so at most this often."""


class Swim:
    """One node's view of the mesh.  Times are seconds of one monotonic clock."""

    def __init__(
        self,
        identity: Identity,
        address: str,
        incarnation: int,
        config: GossipConfig,
        rng: random.Random,
    ) -> None:
        """``incarnation``: max(the last ``SavedIncarnation`` + 1, unix milliseconds at boot)."""
        self.me, self.config, self._rng = identity.node, config, rng
        self._out: list[Effect] = []
        self.health = LocalHealth(config)
        self.roster = Roster(identity, config, self.health, rng, self._out)
        self.members_table = self.roster.members
        self.exchange = Exchange(identity, config, self.members_table, self._send, self._out)
        self._probes = Probes(config, rng)
        self._pace = Pace(config, rng)
        self._birth = (address, incarnation)
        self._seeds: dict[NodeId, str] = {}
        self._joined = False
        self._departed = False
        self._now = -math.inf
        self._excused_until = -math.inf
        self._gossiped_at = -math.inf
        self._join_wait = config.join_retry_s
        self._strangers: dict[NodeId, float] = {}
        self._queue, self._busy_since = 0, 0.0
        self._timers: dict[str, float] = dict.fromkeys(
            ("join", "round", "gossip", "sync", "announce", "sweep", "depart"), math.inf
        )
        self.deadline: float | None = None
        """When to call ``tick``."""

    # -- verbs

    def join(self, seeds: Iterable[tuple[NodeId, str]], now: float) -> list[Effect]:
        """Come into the mesh through ``seeds`` (id, address); none: be the first.  To be called once, first."""
        self._now = now
        self.roster.start(*self._birth, now)
        self._seeds = {node: address for node, address in seeds if node != self.me}
        self._joined = not self._seeds
        config, soon = self.config, self._rng.uniform(0.0, 1.0)
        self._timers["join"] = math.inf if self._joined else now
        self._timers["round"] = now + soon * config.probe_period_s
        self._timers["sync"] = self._pace.next(now)
        self._timers["announce"] = now + soon * config.announce_period_s
        self._timers["sweep"] = now + 60.0
        return self._leave(now)

    def leave(self, now: float) -> list[Effect]:
        """Say goodbye; ``Departed`` follows once that has spread."""
        self._enter(now)
        if not self.roster.leaving:
            self.roster.leave(now)
            self._probes.cancel_all()
            for name in ("join", "round", "sync", "announce"):
                self._timers[name] = math.inf
            for node in self.members_table.sample(16):
                self._send(node, Gossip((self.roster.own.update(),)))
            self._timers["depart"] = now + (self.config.leave_s if self.n > 1 else 0.0)
        return self._leave(now)

    def set_profile(self, profile: NodeProfile, now: float) -> list[Effect]:
        """What this node says of itself; to be called as often as it likes."""
        self._enter(now)
        self.exchange.set_own(profile, self.incarnation, now)
        return self._leave(now)

    def set_address(self, address: str, now: float) -> list[Effect]:
        """The peer door has another address now."""
        self._enter(now)
        if address != self.roster.own.record.address and not self.roster.leaving:
            self.roster.move(address, now)
        return self._leave(now)

    def watch(self, nodes: Iterable[NodeId], now: float) -> list[Effect]:
        """Keep the load of ``nodes`` fresh, because this node routes to them (at most 64)."""
        self._enter(now)
        self.exchange.watch(list(nodes), now)
        return self._leave(now)

    def expel(self, node: NodeId, now: float) -> list[Effect]:
        """``node`` was revoked: hold it dead and believe nothing about it any more."""
        self._enter(now)
        self.roster.expel(node, now)
        return self._leave(now)

    def note_connection_lost(self, node: NodeId, now: float) -> list[Effect]:
        """A connection of ``node`` was reset: probe it at once, out of turn."""
        self._enter(now)
        member = self.members_table.get(node)
        if member is not None and member.present and not self._probes.probing(node) and not self.roster.leaving:
            self._probe(node, now)
        return self._leave(now)

    def note_lag(self, seconds: float) -> None:
        """The event loop was this late (measured by the driver, besides late ticks)."""
        self.health.note_lag(seconds, self._now)

    def note_engine(self, queue: int, now: float, finished_step: bool = False) -> None:
        """The engine has work for ``queue`` sequences; ``finished_step``: it has just finished a step."""
        if finished_step or self._queue == 0:
            self._busy_since = now
        self._queue = queue

    # -- reading

    @property
    def incarnation(self) -> int:
        return self.roster.own.record.incarnation

    @property
    def n(self) -> int:
        """Alive and suspect members, oneself included."""
        return self.members_table.n

    def members(self) -> list[MemberInfo]:
        """All members and tombstones, oneself included."""
        return [member.info() for member in self.members_table]

    def member(self, node: NodeId) -> MemberInfo | None:
        member = self.members_table.get(node)
        return member.info() if member else None

    def profile(self, node: NodeId) -> NodeProfile | None:
        """``node``'s profile with its latest load; ``None``: not heard yet."""
        return self.exchange.profiles.get(node)

    def address_of(self, node: NodeId) -> str | None:
        """Where to write to ``node``."""
        member = self.members_table.get(node)
        return member.record.address if member else self._seeds.get(node)

    def median_rtt_ms(self) -> float:
        """Median over members of the median round trip; 0 while nothing was measured."""
        medians = [self.members_table.get(node) for node in self.members_table.present]
        rtts = sorted(rtt for member in medians if member and (rtt := member.rtt.median()) is not None)
        return rtts[len(rtts) // 2] * 1000.0 if rtts else 0.0

    def local_health(self, now: float) -> int:
        """0 (healthy) to 8; the election multiplies its own patience by this + 1."""
        return self.health.score(now)

    # -- the core

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        self._enter(now)
        handler = _HANDLERS.get(type(message))
        if handler is None or sender == self.me:
            self._out.append(Emit(Rejected(sender, f"unexpected {type(message).__name__}")))
        elif not self.roster.is_expelled(sender) and not self._departed:
            self._hear_news(message, sender, now)
            handler(self, message, sender, now)
            self._mind_sender(message, sender, now)
        return self._leave(now)

    def tick(self, now: float) -> list[Effect]:
        self._enter(now)
        self._help_and_accuse(now)
        self.roster.judge(now)
        self.exchange.tick(now)
        for name, act in _TIMERS:
            if self._timers[name] <= now:
                act(self, now)
        return self._leave(now)

    def _enter(self, now: float) -> None:
        """Wake guard: whatever was due while this node slept gets that much more time, once."""
        self._now = now
        if self.deadline is None:
            return
        late = now - max(self.deadline, self._excused_until)
        if late <= JITTER_S:
            return
        self._excused_until = now
        self.health.note_lag(late, now)
        if self.config.wake_guard:
            long = late > self.config.direct_max_s
            self.roster.excuse(late, earliest=now + self.config.probe_period_s if long else now)
            self._probes.delay(late - JITTER_S)  # what was due stays due

    def _leave(self, now: float) -> list[Effect]:
        """Send what must go at once, set the deadline, hand over the effects."""
        roster = self.roster
        while roster.to_tell:
            to, update = roster.to_tell.pop(0)
            self._send(to, Gossip((update,)))
        for node in roster.revived[:3]:
            self._send(node, Root(self.members_table.root()))
        roster.revived.clear()
        if self._timers["gossip"] == math.inf and self._may_gossip():
            self._timers["gossip"] = max(now, self._gossiped_at + self.config.gossip_period_s)
        due = min(*self._timers.values(), self._probes.deadline, roster.next_verdict, self.exchange.deadline)
        self.deadline = None if self._departed or due == math.inf else due
        effects = self._out[:]
        self._out.clear()
        return effects

    def _may_gossip(self) -> bool:
        return bool(self.roster.news or self.exchange.news) and (self.n > 1 or bool(self.roster.recently_dead))

    # -- sending

    def _send(self, to: NodeId, message: Message) -> None:
        if isinstance(message, Ping | Ack | PingReq | Gossip):
            message = self._with_news(to, message)
        self._out.append(Send(to, message))

    def _with_news(self, to: NodeId, message: Any) -> Any:
        """``message`` with as much news as fits; first what ``to`` must know of itself."""
        member = self.members_table.get(to)
        accused = member is not None and member.state is not State.ALIVE
        if not (accused or self.roster.news or self.exchange.news):
            return message
        first = [member.update()] if member is not None and accused and not message.updates else []
        room = self.config.datagram_bytes - DATAGRAM_CODEC.size(message) - sum(map(DATAGRAM_CODEC.size, first))
        times = self.config.retransmissions(self.n)
        updates = self.roster.news.take(room, times, most=48)
        room -= sum(map(DATAGRAM_CODEC.size, updates))
        versions = self.exchange.news.take(room, times, most=48)
        return msgspec.structs.replace(
            message,
            updates=(*message.updates, *first, *updates),
            versions=(*message.versions, *versions),
        )

    def _gossip(self, now: float) -> None:
        self._gossiped_at = now
        for node in self.roster.gossip_targets(self.config.fanout, now, self._rng):
            if self.roster.news or self.exchange.news:
                self._send(node, Gossip())
        self._timers["gossip"] = now + self.config.gossip_period_s if self._may_gossip() else math.inf

    # -- hearing

    def _hear_news(self, message: Any, sender: NodeId, now: float) -> None:
        for update in getattr(message, "updates", ()):
            self.roster.apply(update, sender, now)
        for version in getattr(message, "versions", ()):
            self.exchange.hear(version, sender, now, spread=True)

    def _mind_sender(self, message: Message, sender: NodeId, now: float) -> None:
        """Strangers are asked who they are; who is held dead but writes is told so, and will refute."""
        member = self.members_table.get(sender)
        if member is None:
            if now - self._strangers.get(sender, -math.inf) > REMIND_S:
                if len(self._strangers) >= 256:
                    self._strangers.clear()
                self._strangers[sender] = now
                self._send(sender, Buckets(self.members_table.hashes()))
        elif not member.present and now - member.told_at > REMIND_S:
            member.told_at = now
            self._send(sender, Gossip())

    # -- probing

    def _period_s(self, now: float) -> float:
        return self.config.probe_period_s * (self.health.score(now) + 1)

    def _round(self, now: float) -> None:
        self._timers["round"] = now + self._period_s(now)
        target = self.members_table.next_to_probe()
        if target is not None and not self._probes.probing(target):
            self._probe(target, now)

    def _probe(self, target: NodeId, now: float) -> None:
        member = self.members_table.get(target)
        assert member is not None, target
        patience = self.health.score(now) + 1
        direct_s = member.rtt.direct_timeout_s(self.config) * patience
        probe = self._probes.open(target, direct_s, self._period_s(now), now)
        if probe is not None:
            load = self.exchange.profiles.load_row(target)
            self._send(target, Ping(probe.seq, member.version & 0xFFFF, load.version & 0xFFFF if load else 0))

    def _help_and_accuse(self, now: float) -> None:
        for probe in self._probes.due_for_help(now):
            self._ask_for_help(probe, now)
        for probe in self._probes.failed(now):
            # a failed probe whose helpers all lived to say so is the target's fault, not ours
            self.health.add(probe.missed_nacks if probe.helpers else 1)
            self.roster.accuse(probe.target, now)
        for relay in self._probes.due_nacks(now):
            self._send(relay.prober, Nack(relay.seq))

    def _ask_for_help(self, probe: Probe, now: float) -> None:
        left_ms = int((probe.end - now) * 1000.0)
        if left_ms > 0:
            probe.helpers = tuple(self._helpers(probe.target))
        for helper in probe.helpers:
            self._send(helper, PingReq(probe.seq, probe.target, left_ms))
        self._send(probe.target, StreamPing(probe.seq))

    def _helpers(self, target: NodeId) -> list[NodeId]:
        """Members that are not themselves in doubt, as far as there are any."""
        sample = self.members_table.sample(3 * self.config.helpers, exclude=target)
        sure = [node for node in sample if (member := self.members_table.get(node)) and member.state is State.ALIVE]
        return sure[: self.config.helpers]

    def _on_ping(self, message: Ping, sender: NodeId, now: float) -> None:
        own, load = self.exchange.profiles.version(self.me), self.exchange.profiles.load_row(self.me)
        versions = (Version(self.me, own),) if own and own & 0xFFFF != message.profile else ()
        fresh = load if load and load.version & 0xFFFF != message.load else None
        self._send(sender, Ack(message.seq, vitals=self._vitals(now), load=fresh, versions=versions))

    def _vitals(self, now: float) -> Vitals:
        stuck_s = now - self._busy_since if self._queue else 0.0
        lag_ms = int(self.health.lag_s(now) * 1000.0)
        return Vitals(min(lag_ms, 2**31 - 1), min(self._queue, 2**31 - 1), min(int(stuck_s * 1000.0), 2**31 - 1))

    def _on_ack(self, message: Ack, sender: NodeId, now: float) -> None:
        relay = None if message.about else self._probes.relayed(message.seq, sender)
        if relay is not None:
            self._send(relay.prober, Ack(relay.seq, sender, message.vitals, message.load))
        about = message.about or sender
        probe = self._probes.answered(message.seq, about)
        if probe is not None:
            self._alive(probe, message.vitals, now, direct=about == sender)
        if message.load is not None and (about == sender or probe is not None):
            self.exchange.on_load(about, message.load)

    def _alive(self, probe: Probe, vitals: Vitals, now: float, direct: bool) -> None:
        """``probe`` was answered."""
        self.health.add(-1)
        member = self.members_table.get(probe.target)
        if member is None:
            return
        if direct:
            member.rtt.add(now - probe.sent)
        member.vitals = vitals
        config = self.config
        degraded = vitals.lag_ms >= config.degraded_lag_s * 1000.0 or vitals.stuck_ms >= config.degraded_step_s * 1000.0
        if degraded != member.degraded:
            member.degraded = degraded
            self._out.append(Emit(DegradedChanged(probe.target, degraded)))

    def _on_stream_ping(self, message: StreamPing, sender: NodeId, now: float) -> None:
        self._send(sender, StreamAck(message.seq, self._vitals(now)))

    def _on_stream_ack(self, message: StreamAck, sender: NodeId, now: float) -> None:
        probe = self._probes.answered(message.seq, sender)
        if probe is not None:
            self._alive(probe, message.vitals, now, direct=False)

    def _on_ping_req(self, message: PingReq, sender: NodeId, now: float) -> None:
        known = message.target != self.me and self.members_table.get(message.target) is not None
        seq = self._probes.relay(message, sender, now) if known else None
        if seq is None:
            return self._send(sender, Nack(message.seq))  # healthy, but of no use
        self._send(message.target, Ping(seq))

    def _on_nack(self, message: Nack, sender: NodeId, now: float) -> None:
        self._probes.nacked(message.seq, sender)

    # -- comparing tables

    def _join(self, now: float) -> None:
        """Ask three seeds at a time, more slowly each time, until one answers."""
        seeds = list(self._seeds)
        for node in self._rng.sample(seeds, min(3, len(seeds))):
            self._send(node, Join(self.roster.own.update()))
        self._timers["join"] = now + self._join_wait
        self._join_wait = min(self._join_wait * 1.5, 10.0)

    def _on_join(self, message: Join, sender: NodeId, now: float) -> None:
        if message.update.record.node != sender:
            return self._out.append(Emit(Rejected(sender, "joined in another's name")))
        self.roster.apply(message.update, sender, now)
        for rows in tell(self.members_table, list(range(BUCKETS)), now, answer=False):
            self._send(sender, rows)

    def _sync(self, now: float) -> None:
        self._timers["sync"] = self._pace.next(now)
        for node in self.members_table.sample(1):
            self._send(node, Root(self.members_table.root()))

    def _on_root(self, message: Root, sender: NodeId, now: float) -> None:
        if message.root != self.members_table.root():
            self._send(sender, Buckets(self.members_table.hashes()))

    def _on_buckets(self, message: Buckets, sender: NodeId, now: float) -> None:
        buckets = differing(self.members_table.hashes(), message.hashes)
        for rows in tell(self.members_table, buckets, now, answer=True) if buckets else []:
            self._send(sender, rows)

    def _on_sync_rows(self, message: SyncRows, sender: NodeId, now: float) -> None:
        if not honest(message):
            return self._out.append(Emit(Rejected(sender, "rows of other buckets, or of impossible age")))
        news = 0
        for row in message.rows:
            news += self.roster.apply(row.update, sender, now, synced=True, age_s=float(row.age_s))
            if row.version:
                self.exchange.hear(Version(row.update.record.node, row.version), sender, now, spread=False)
        if self._pace.found(news):
            self._timers["sync"] = min(self._timers["sync"], self._pace.next(now))
        answer = reply(self.members_table, message, now) if message.answer else None
        if answer is not None:
            self._send(sender, answer)
        if not self._joined:
            self._joined = True
            self._timers["join"] = math.inf
            self._out.append(Emit(Joined(sender)))

    # -- the dead, the old, and leaving

    def _announce(self, now: float) -> None:
        """Write to some of the dead: if one lives (a partition healed) it refutes, and tables are compared."""
        self._timers["announce"] = now + self.config.announce_period_s
        dead = self.roster.dead()
        for node in self._rng.sample(dead, min(self.config.announce_targets, len(dead))):
            self._send(node, Gossip())

    def _sweep(self, now: float) -> None:
        self._timers["sweep"] = now + 60.0
        for node in self.roster.sweep(now):
            self.exchange.profiles.forget(node)

    def _depart(self, now: float) -> None:
        self._timers = dict.fromkeys(self._timers, math.inf)
        self._departed = True
        self._out.append(Emit(Departed()))

    def _gossip_and_depart(self, now: float) -> None:
        self._gossip(now)
        if self.roster.leaving and self.me not in self.roster.news:
            self._depart(now)

    # -- profiles

    def _on_want(self, message: Want, sender: NodeId, now: float) -> None:
        self.exchange.on_want(message, sender)

    def _on_rows(self, message: Rows | BigRows, sender: NodeId, now: float) -> None:
        self.exchange.on_rows(message.rows, sender)

    def _on_load(self, message: LoadPush, sender: NodeId, now: float) -> None:
        self.exchange.on_load(sender, message.row)

    def _on_watch(self, message: Watch, sender: NodeId, now: float) -> None:
        self.exchange.on_watch(sender, now)

    def _on_gossip(self, message: Gossip, sender: NodeId, now: float) -> None:
        """All it says was heard before."""


_HANDLERS: dict[type, Callable[[Swim, Any, NodeId, float], None]] = {
    Ping: Swim._on_ping,
    Ack: Swim._on_ack,
    PingReq: Swim._on_ping_req,
    Nack: Swim._on_nack,
    Gossip: Swim._on_gossip,
    Root: Swim._on_root,
    Watch: Swim._on_watch,
    LoadPush: Swim._on_load,
    Want: Swim._on_want,
    Rows: Swim._on_rows,
    BigRows: Swim._on_rows,
    StreamPing: Swim._on_stream_ping,
    StreamAck: Swim._on_stream_ack,
    Join: Swim._on_join,
    Buckets: Swim._on_buckets,
    SyncRows: Swim._on_sync_rows,
}
_TIMERS: tuple[tuple[str, Callable[[Swim, float], None]], ...] = (
    ("join", Swim._join),
    ("round", Swim._round),
    ("gossip", Swim._gossip_and_depart),
    ("sync", Swim._sync),
    ("announce", Swim._announce),
    ("sweep", Swim._sweep),
    ("depart", Swim._depart),
)
