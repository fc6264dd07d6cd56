"""Local health and round trips."""

from __future__ import annotations

import pytest

from gossip.config import GossipConfig, without_lifeguard
from gossip.health import LocalHealth, RoundTrips, p99


def test_awareness_is_clamped() -> None:
    """memberlist's TestAwareness."""
    health = LocalHealth(GossipConfig())
    scores = []
    for delta in (0, -1, -10, 1, -1, 10, -1, -1, -1, -1, -1, -1, -1, -1, -1):
        health.add(delta)
        scores.append(health.score(0.0))
    assert scores == [0, 0, 0, 1, 0, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0]


@pytest.mark.parametrize(("lag", "score"), [(0.0, 0), (0.099, 0), (0.1, 1), (0.25, 2), (0.9, 8), (60.0, 8)])
def test_lag_adds_to_local_health(lag: float, score: int) -> None:
    health = LocalHealth(GossipConfig())
    health.note_lag(lag, 0.0)
    assert health.score(1.0) == score


def test_lag_and_count_add_up_and_lag_is_forgotten() -> None:
    health = LocalHealth(GossipConfig())
    health.add(2)
    health.note_lag(0.35, 0.0)
    assert health.score(9.0) == 5
    assert health.score(11.0) == 2


def test_p99_is_the_nearest_rank() -> None:
    assert p99([]) == 0.0
    assert p99([3.0, 1.0, 2.0]) == 3.0
    assert p99([float(i) for i in range(1, 201)]) == 198.0


def test_without_lifeguard_health_stays_zero() -> None:
    health = LocalHealth(without_lifeguard(GossipConfig()))
    health.add(5)
    health.note_lag(3.0, 0.0)
    assert health.score(0.0) == 0


@pytest.mark.parametrize(
    ("rtts", "timeout"), [([], 0.2), ([0.001], 0.06), ([0.001, 0.03], 0.09), ([0.5], 0.2), ([0.01] * 20, 0.06)]
)
def test_direct_timeout_is_three_p99_clamped(rtts: list[float], timeout: float) -> None:
    trips = RoundTrips()
    for rtt in rtts:
        trips.add(rtt)
    assert trips.direct_timeout_s(GossipConfig()) == pytest.approx(timeout)


def test_only_the_last_round_trips_count() -> None:
    trips = RoundTrips()
    assert trips.least() is None
    trips.add(0.005)
    for _ in range(16):
        trips.add(0.01)
    assert trips.least() == 0.01
    assert trips.direct_timeout_s(GossipConfig()) == pytest.approx(0.06)


def test_the_shortest_round_trip_knows_no_queues() -> None:
    trips = RoundTrips()
    for rtt in (0.03, 0.002, 0.2, 0.04):
        trips.add(rtt)
    assert trips.least() == 0.002
