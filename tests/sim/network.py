"""The simulated network: what becomes of a message, and when it arrives."""

from __future__ import annotations

import math
import random

import msgspec

from tests.sim.faults import Fault, NetParams

PLAIN_BYTES = 200
"""What a message counts for on a limited uplink in a world without a codec."""


class Cut(msgspec.Struct, frozen=True):
    """Messages from ``here`` to ``there`` are lost; every other ``period`` seconds where that is finite."""

    here: frozenset[str]
    there: frozenset[str]
    began: frozenset[str]
    """The nodes that the fault named."""
    since: float
    period: float

    def stops(self, source: str, to: str, now: float) -> bool:
        if source not in self.here or to not in self.there:
            return False
        return self.period == math.inf or int((now - self.since) / self.period) % 2 == 0


class Network:
    """Links between all nodes of a world, and what ails them.  Chance comes from ``rng``, which it shares."""

    def __init__(self, params: NetParams, rng: random.Random) -> None:
        self.params, self.rng = params, rng
        self.loss = params.loss
        self.losses: dict[str, float] = {}
        self.slowness: dict[str, float] = {}
        self.uplinks: dict[str, float] = {}
        self.cuts: list[Cut] = []
        draws = {"exponential": self._exponential, "uniform": self._uniform, "pareto": self._pareto}
        self._draw = draws[params.delay]
        self._fifo: dict[tuple[str, str], float] = {}
        self._sending_until: dict[str, float] = {}

    def apply(self, fault: Fault, names: frozenset[str], now: float) -> None:
        """``names``: of all nodes."""
        here = frozenset(fault.nodes)
        there = frozenset(fault.other) or names - here
        if fault.kind == "heal" and fault.nodes:
            self.cuts = [cut for cut in self.cuts if cut.began != here]
        elif fault.kind == "heal":
            self.cuts, self.losses, self.loss = [], {}, self.params.loss
        elif fault.kind == "loss":
            self.loss = self.loss if fault.nodes else fault.value
            self.losses.update(dict.fromkeys(fault.nodes, fault.value))
        elif fault.kind in ("slow", "uplink"):
            table = self.slowness if fault.kind == "slow" else self.uplinks
            table.update(dict.fromkeys(fault.nodes, fault.value))
        else:
            period = fault.value if fault.kind == "flap" else math.inf
            self.cuts.append(Cut(here, there, here, now, period))
            if fault.kind == "partition":
                self.cuts.append(Cut(there, here, here, now, period))

    def blocked(self, source: str, to: str, now: float) -> bool:
        return bool(self.cuts) and any(cut.stops(source, to, now) for cut in self.cuts)

    def carry(self, source: str, to: str, size: int, reliable: bool, now: float) -> tuple[str, list[float]]:
        """What becomes of a message of ``size`` bytes (``sent`` or why not), and when its copies arrive."""
        if self.cuts and self.blocked(source, to, now):
            return "blocked", []
        wait = 0.0
        if self.uplinks:
            wait = self._sending_until.get(source, 0.0) - now
            if wait > self.params.queue_s and not reliable:
                return "full", []
            wait = self._queue(source, size, now)
        if reliable:
            return self._carry_reliably(source, to, now + wait)
        if self._lost(source, to):
            return "lost", []
        params, arrivals = self.params, []
        copies = 2 if params.duplicate and self.rng.random() < params.duplicate else 1
        for _ in range(copies):
            late = params.reorder and self.rng.random() < params.reorder
            detour = self.rng.uniform(0.0, params.reorder_s) if late else 0.0
            arrivals.append(now + wait + self.delay(source, to) + detour)
        return "sent", arrivals

    def _carry_reliably(self, source: str, to: str, start: float) -> tuple[str, list[float]]:
        when = start + self.delay(source, to)
        for _ in range(8):
            if not self._lost(source, to):
                when = self._fifo[source, to] = max(when, self._fifo.get((source, to), 0.0))
                return "sent", [when]
            when += self.params.retransmit_s
        return "lost", []

    def _queue(self, source: str, size: int, now: float) -> float:
        """Seconds until a limited uplink has sent ``size`` bytes more."""
        rate = self.uplinks.get(source, 0.0)
        if not rate:
            return 0.0
        done = self._sending_until[source] = max(now, self._sending_until.get(source, 0.0)) + size / rate
        return done - now

    def _lost(self, source: str, to: str) -> bool:
        chance = self.loss
        if self.losses:
            chance = max(chance, self.losses.get(source, 0.0), self.losses.get(to, 0.0))
        return chance > 0.0 and self.rng.random() < chance

    def delay(self, source: str, to: str) -> float:
        """One way, in s."""
        delay = self.params.base_s + self._draw() * self.params.jitter_s
        if self.slowness:
            delay += self.slowness.get(source, 0.0) + self.slowness.get(to, 0.0)
        return delay

    def _exponential(self) -> float:
        return -math.log(1.0 - self.rng.random())

    def _uniform(self) -> float:
        return 2.0 * self.rng.random()

    def _pareto(self) -> float:
        return (1.0 - self.rng.random()) ** (-1.0 / 1.5) / 3.0
