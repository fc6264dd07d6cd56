"""How far this node should trust itself (Lifeguard's local health), and how far away others are."""

from __future__ import annotations

import math
from collections import deque

from gossip.config import GossipConfig


def p99(values: list[float]) -> float:
    """99th percentile by nearest rank; 0 of nothing."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else 0.0


class LocalHealth:
    """A multiplier of all own patience: 0 is healthy, ``health_max`` is very slow.

    Lifeguard counts: -1 per answered probe, +1 per failed probe that nobody helped with, per missed nack and per
    refutation.  Where the event loop's lag can be measured it is added: measuring is better than counting.
    """

    def __init__(self, config: GossipConfig) -> None:
        self.config = config
        self.count = 0
        self._lags: deque[tuple[float, float]] = deque(maxlen=256)
        self._lag: float | None = 0.0

    def add(self, delta: int) -> None:
        self.count = min(max(0, self.count + delta), self.config.health_max)

    def note_lag(self, seconds: float, now: float) -> None:
        """A measured delay of the event loop."""
        self._lags.append((now, seconds))
        self._lag = None

    def lag_s(self, now: float) -> float:
        """p99 of the lags noted in the last ``lag_window_s``."""
        while self._lags and self._lags[0][0] < now - self.config.lag_window_s:
            self._lags.popleft()
            self._lag = None
        if self._lag is None:
            self._lag = p99([lag for _, lag in self._lags])
        return self._lag

    def score(self, now: float) -> int:
        """0..health_max."""
        return min(self.config.health_max, self.count + math.floor(self.lag_s(now) / self.config.lag_step_s))

    def period_s(self, now: float) -> float:
        """The probe period, as long as local health makes it."""
        return self.config.probe_period_s * (self.score(now) + 1)


class RoundTrips:
    """The last round trips to one member, in seconds."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: tuple[float, ...] = ()  # most members of a large mesh are seldom probed: a deque is 600 bytes

    def add(self, seconds: float) -> None:
        self._last = (*self._last[-15:], seconds)

    def least(self) -> float | None:
        """What the wire takes, without the queues of busy nodes."""
        return min(self._last, default=None)

    def direct_timeout_s(self, config: GossipConfig) -> float:
        """clamp(3 x p99 RTT, ...); of so few samples the p99 is the largest."""
        if not self._last:
            return config.direct_max_s
        return min(max(config.rtt_factor * max(self._last), config.direct_min_s), config.direct_max_s)
