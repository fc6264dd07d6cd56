"""Probes in flight: own ones, and those made for others.  Bookkeeping only; ``swim`` sends and judges."""

from __future__ import annotations

import math
import random
from enum import Enum

import msgspec

from gossip.config import GossipConfig
from gossip.messages import PingReq
from mesh.types import NodeId

MAX_PROBES = 16
MAX_RELAYS = 256


class Phase(Enum):
    DIRECT = 1
    INDIRECT = 2


class Probe(msgspec.Struct):
    """One own probe.  Acks count until ``end``; from ``direct_until`` on others help."""

    seq: int
    target: NodeId
    sent: float
    direct_until: float
    end: float
    incarnation: int
    """Of the target when it was sent: silence says nothing of a later one."""
    phase: Phase = Phase.DIRECT
    helpers: tuple[NodeId, ...] = ()
    nacks: tuple[NodeId, ...] = ()

    @property
    def deadline(self) -> float:
        return self.direct_until if self.phase is Phase.DIRECT else self.end

    @property
    def missed_nacks(self) -> int:
        return len(self.helpers) - len(self.nacks)


class Relay(msgspec.Struct):
    """One ping made for ``prober``, whose own number for it is ``seq``."""

    prober: NodeId
    seq: int
    target: NodeId
    nack_at: float
    end: float
    nacked: bool = False

    @property
    def deadline(self) -> float:
        return self.end if self.nacked else self.nack_at


class Probes:
    """Own probes and relays by their own sequence numbers."""

    def __init__(self, config: GossipConfig, rng: random.Random) -> None:
        self.config = config
        self._seq = rng.getrandbits(32)
        self._own: dict[int, Probe] = {}
        self._relays: dict[int, Relay] = {}

    @property
    def deadline(self) -> float:
        """Of the next thing to do here; infinity: nothing."""
        due = math.inf
        for waiting in (self._own, self._relays):
            for one in waiting.values():
                due = min(due, one.deadline)
        return due

    def _number(self) -> int:
        self._seq = (self._seq + 1) % 2**32
        return self._seq

    def probing(self, target: NodeId) -> bool:
        return any(probe.target == target for probe in self._own.values())

    def open(self, target: NodeId, incarnation: int, direct_s: float, period_s: float, now: float) -> Probe | None:
        """Start an own probe, unless too many run."""
        if len(self._own) >= MAX_PROBES:
            return None
        direct_until = now + min(direct_s, period_s)
        probe = Probe(self._number(), target, now, direct_until, now + period_s, incarnation)
        self._own[probe.seq] = probe
        return probe

    def answered(self, seq: int, by: NodeId, heard_from: NodeId) -> Probe | None:
        """``by`` answered, as itself or a helper says: the probe that this ends, if it was its target."""
        probe = self._own.get(seq)
        if probe is None or probe.target != by or (heard_from != by and heard_from not in probe.helpers):
            return None
        del self._own[seq]
        return probe

    def nacked(self, seq: int, helper: NodeId) -> None:
        probe = self._own.get(seq)
        if probe is not None and helper in probe.helpers and helper not in probe.nacks:
            probe.nacks += (helper,)

    def due_for_help(self, now: float) -> list[Probe]:
        """Own probes whose direct ping has just timed out."""
        due = [probe for probe in self._own.values() if probe.phase is Phase.DIRECT and probe.direct_until <= now]
        for probe in due:
            probe.phase = Phase.INDIRECT
        return due

    def failed(self, now: float) -> list[Probe]:
        """Own probes that ended without an answer, now removed."""
        over = [probe for probe in self._own.values() if probe.phase is Phase.INDIRECT and probe.end <= now]
        for probe in over:
            del self._own[probe.seq]
        return over

    def cancel_all(self) -> None:
        self._own.clear()

    # -- for others

    def relay(self, request: PingReq, prober: NodeId, now: float) -> int | None:
        """Take on a ping for ``prober``; its sequence number, or ``None`` when too many run."""
        if len(self._relays) >= MAX_RELAYS:
            return None
        within = request.within_ms / 1000.0
        nack_at = now + within * self.config.nack_share
        seq = self._number()
        self._relays[seq] = Relay(prober, request.seq, request.target, nack_at, now + within)
        return seq

    def relayed(self, seq: int, by: NodeId) -> Relay | None:
        """``by`` answered a ping made for another: that relay, now removed."""
        relay = self._relays.get(seq)
        if relay is None or relay.target != by:
            return None
        return self._relays.pop(seq)

    def due_nacks(self, now: float) -> list[Relay]:
        """Relays whose prober must hear now that there was no answer; those past their end are dropped."""
        due = [relay for relay in self._relays.values() if not relay.nacked and relay.nack_at <= now]
        for relay in due:
            relay.nacked = True
        for seq in [seq for seq, relay in self._relays.items() if relay.end <= now]:
            del self._relays[seq]
        return due

    def delay(self, seconds: float) -> None:
        """This node slept: what it waits for gets that much more time."""
        for probe in self._own.values():
            probe.direct_until += seconds
            probe.end += seconds
