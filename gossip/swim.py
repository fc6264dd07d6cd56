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
from gossip.events import Departed
from gossip.exchange import Exchange
from gossip.health import LocalHealth
from gossip.members import MemberInfo
from gossip.messages import (
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
    Want,
    Watch,
)
from gossip.probe import Probes
from gossip.prober import Prober
from gossip.roster import Identity, Roster
from gossip.sync import Comparer
from mesh.core import Effect, Emit, Rejected, Send
from mesh.types import NodeId, NodeProfile

JITTER_S = 0.001
"""A call later than this after the deadline means that the process did not run when it wanted to."""
NEWS_RIDES_ON = (Ping, Ack, PingReq, Gossip)
SWEEP_S = 60.0
"""How often tombstones are looked through."""
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
        self._members = self.roster.members
        self.exchange = Exchange(identity, config, self._members, self._send, self._out)
        probes = Probes(config, rng)
        self.prober = Prober(config, self.health, self.roster, self.exchange, probes, self._send, self._out)
        self.comparer = Comparer(config, self.roster, self.exchange, rng, self._send, self._out)
        self._birth = (address, incarnation)
        self._seeds: dict[NodeId, str] = {}
        self._departed = False
        self._now = self._excused_until = self._gossiped_at = -math.inf
        self._gossip_at = self._announce_at = self._sweep_at = self._depart_at = math.inf
        self._strangers: dict[NodeId, float] = {}
        """When each unknown sender was last asked who it is."""
        self.deadline: float | None = None
        """When to call ``tick``."""
        self._handlers = self._table_of_handlers()

    def _table_of_handlers(self) -> dict[type, Callable[[Any, NodeId, float], None]]:
        prober, comparer, exchange = self.prober, self.comparer, self.exchange
        return {
            Ping: prober.on_ping,
            Ack: prober.on_ack,
            PingReq: prober.on_ping_req,
            Nack: prober.on_nack,
            StreamPing: prober.on_stream_ping,
            StreamAck: prober.on_stream_ack,
            Gossip: lambda message, sender, now: None,  # its news was heard before
            Join: comparer.on_join,
            Root: comparer.on_root,
            Buckets: comparer.on_buckets,
            SyncRows: comparer.on_rows,
            Want: exchange.on_want,
            Rows: exchange.on_rows,
            BigRows: exchange.on_rows,
            LoadPush: exchange.on_load_push,
            Watch: exchange.on_watch,
        }

    # -- verbs

    def join(self, seeds: Iterable[tuple[NodeId, str]], now: float) -> list[Effect]:
        """Come into the mesh through ``seeds`` (id, address); none: be the first.  To be called once, first."""
        self._now = now
        self.roster.start(*self._birth, now)
        self._seeds = {node: address for node, address in seeds if node != self.me}
        self.comparer.start(list(self._seeds), now)
        soon = self._rng.uniform(0.0, 1.0)
        self.prober.start(now + soon * self.config.probe_period_s)
        self._announce_at = now + soon * self.config.announce_period_s
        self._sweep_at = now + SWEEP_S
        return self._finish(now)

    def leave(self, now: float) -> list[Effect]:
        """Say goodbye; ``Departed`` follows once that has spread."""
        self._begin(now)
        if not self.roster.leaving:
            self.roster.leave(now)
            self.prober.stop()
            self.comparer.stop()
            self._announce_at = math.inf
            for node in self._members.sample(16):
                self._send(node, Gossip((self.roster.own.update(),)))
            self._depart_at = now + (self.config.leave_s if self.n > 1 else 0.0)
        return self._finish(now)

    def set_profile(self, profile: NodeProfile, now: float) -> list[Effect]:
        """What this node says of itself; to be called as often as it likes."""
        self._begin(now)
        self.exchange.set_own(profile, self.incarnation, now)
        return self._finish(now)

    def set_address(self, address: str, now: float) -> list[Effect]:
        """The peer door has another address now."""
        self._begin(now)
        if address != self.roster.own.record.address and not self.roster.leaving:
            self.roster.move(address, now)
        return self._finish(now)

    def watch(self, nodes: Iterable[NodeId], now: float) -> list[Effect]:
        """Keep the load of ``nodes`` fresh, because this node routes to them (at most 64)."""
        self._begin(now)
        self.exchange.watch(list(nodes), now)
        return self._finish(now)

    def expel(self, node: NodeId, now: float) -> list[Effect]:
        """``node`` was revoked: hold it dead and believe nothing about it any more."""
        self._begin(now)
        self.roster.expel(node, now)
        return self._finish(now)

    def note_connection_lost(self, node: NodeId, now: float) -> list[Effect]:
        """A connection of ``node`` was reset: probe it at once, out of turn."""
        self._begin(now)
        if not self.roster.leaving:
            self.prober.probe(node, now)
        return self._finish(now)

    def note_lag(self, seconds: float) -> None:
        """The event loop was this late (measured by the driver, besides late ticks)."""
        self.health.note_lag(seconds, self._now)

    def note_engine(self, queue: int, now: float, finished_step: bool = False) -> None:
        """The engine has work for ``queue`` sequences; ``finished_step``: it has just finished a step."""
        self.prober.note_engine(queue, now, finished_step)

    # -- reading

    @property
    def incarnation(self) -> int:
        return self.roster.own.record.incarnation

    @property
    def n(self) -> int:
        """Alive and suspect members, oneself included."""
        return self._members.n

    def members(self) -> list[MemberInfo]:
        """All members and tombstones, oneself included."""
        return [member.info() for member in self._members]

    def member(self, node: NodeId) -> MemberInfo | None:
        member = self._members.get(node)
        return member.info() if member else None

    def profile(self, node: NodeId) -> NodeProfile | None:
        """``node``'s profile with its latest load; ``None``: not heard yet."""
        return self.exchange.profiles.get(node)

    def address_of(self, node: NodeId) -> str | None:
        """Where to write to ``node``."""
        member = self._members.get(node)
        return member.record.address if member else self._seeds.get(node)

    def median_rtt_ms(self) -> float:
        """Median over members of the shortest of the last round trips; 0 while nothing was measured."""
        present = [self._members.get(node) for node in self._members.present]
        rtts = sorted(rtt for member in present if member and (rtt := member.rtt.least()) is not None)
        return rtts[len(rtts) // 2] * 1000.0 if rtts else 0.0

    def local_health(self, now: float) -> int:
        """0 (healthy) to 8; an ailing node lets others campaign first."""
        return self.health.score(now)

    # -- the core

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        self._begin(now)
        handler = self._handlers.get(type(message))
        if handler is None or sender == self.me:
            self._out.append(Emit(Rejected(sender, f"unexpected {type(message).__name__}")))
        elif not self.roster.is_expelled(sender) and not self._departed:
            self._hear_news(message, sender, now)
            handler(message, sender, now)
            self._mind_sender(message, sender, now)
        return self._finish(now)

    def tick(self, now: float) -> list[Effect]:
        self._begin(now)
        for part in (self.prober, self.roster, self.exchange, self.comparer):
            if part.deadline <= now:
                part.tick(now)
        while self.roster.last_calls:
            self.prober.probe(self.roster.last_calls.pop(), now)
        if self._gossip_at <= now:
            self._gossip(now)
        if self._announce_at <= now:
            self._announce(now)
        if self._sweep_at <= now:
            self._sweep(now)
        if self._depart_at <= now:
            self._depart()
        return self._finish(now)

    def _begin(self, now: float) -> None:
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
            self.prober.excuse(late - JITTER_S)  # what was due stays due

    def _finish(self, now: float) -> list[Effect]:
        """Send what must go at once, set the deadline, hand over the effects."""
        roster = self.roster
        while roster.to_tell:
            to, update = roster.to_tell.pop(0)
            self._send(to, Gossip((update,)))
        while roster.revived:
            self.comparer.compare_with(roster.revived.pop())
        if self._gossip_at == math.inf and self._may_gossip():
            self._gossip_at = max(now, self._gossiped_at + self.config.gossip_period_s)
        due = min(
            self._gossip_at,
            self._announce_at,
            self._sweep_at,
            self._depart_at,
            self.prober.deadline,
            roster.deadline,
            self.exchange.deadline,
            self.comparer.deadline,
        )
        # never in the past: a confirmation can bring a verdict forward to before now, which is not lateness
        self.deadline = None if self._departed or due == math.inf else max(due, now)
        effects = self._out[:]
        self._out.clear()
        return effects

    def _may_gossip(self) -> bool:
        return bool(self.roster.news or self.exchange.news) and (self.n > 1 or bool(self.roster.recently_dead))

    # -- sending

    def _send(self, to: NodeId, message: Message) -> None:
        if type(message) in NEWS_RIDES_ON:
            message = self._with_news(to, message)
        self._out.append(Send(to, message))

    def _with_news(self, to: NodeId, message: Any) -> Any:
        """``message`` with as much news as fits; first what ``to`` must know of itself."""
        member = self._members.get(to)
        accused = member is not None and member.state is not State.ALIVE
        told, versions_told = self.roster.news, self.exchange.news
        if not (accused or told or versions_told):
            return message
        first = [member.update()] if member is not None and accused and not message.updates else []
        room = self.config.datagram_bytes - DATAGRAM_CODEC.size(message) - sum(map(DATAGRAM_CODEC.size, first))
        # what goes to a member that may well be dead is not counted: it would use up the times that the living need
        times, count = self.config.retransmissions(self.n), not accused
        known = (to, *[update.record.node for update in message.updates])
        updates = told.take(room, times, most=48, skip=known, count=count)
        versions = []
        if versions_told:
            room -= sum(map(DATAGRAM_CODEC.size, updates))
            versions = versions_told.take(room, times, most=48, skip=(to,), count=count)
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
        self._gossip_at = now + self.config.gossip_period_s if self._may_gossip() else math.inf
        if self.roster.leaving and self.me not in self.roster.news:
            self._depart()

    # -- hearing

    def _hear_news(self, message: Any, sender: NodeId, now: float) -> None:
        for update in getattr(message, "updates", ()):
            self.roster.apply(update, sender, now)
        for version in getattr(message, "versions", ()):
            self.exchange.hear(version, sender, now, spread=True)

    def _mind_sender(self, message: Message, sender: NodeId, now: float) -> None:
        """Strangers are asked who they are; who is held dead but writes is told so, and will refute."""
        member = self._members.get(sender)
        if member is None:
            if now - self._strangers.get(sender, -math.inf) > REMIND_S:
                if len(self._strangers) >= 256:
                    self._strangers.clear()
                self._strangers[sender] = now
                self.comparer.ask(sender)
        elif not member.present and now - member.told_at > REMIND_S:
            member.told_at = now
            self._send(sender, Gossip())

    # -- the dead, the old, and leaving

    def _announce(self, now: float) -> None:
        """Write to some of the dead: if one lives (a partition healed) it refutes, and tables are compared.  A seed
        whose tombstone is forgotten is asked as a stranger: a mesh parted for longer than that finds itself again."""
        self._announce_at = now + self.config.announce_period_s
        dead = self.roster.dead()
        for node in self._rng.sample(dead, min(self.config.announce_targets, len(dead))):
            self._send(node, Gossip())
        forgotten = [node for node in self._seeds if self._members.get(node) is None]
        if forgotten:
            self.comparer.ask(self._rng.choice(forgotten))

    def _sweep(self, now: float) -> None:
        self._sweep_at = now + SWEEP_S
        for node in self.roster.sweep(now):
            self.exchange.profiles.forget(node)

    def _depart(self) -> None:
        self._departed = True
        self._out.append(Emit(Departed()))
