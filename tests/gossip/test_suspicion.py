"""Suspicion: the formulas as tables, then a running one."""

from __future__ import annotations

import pytest

from gossip.config import GossipConfig, memberlist
from gossip.messages import MAX_ACCUSERS
from gossip.suspicion import Suspicion, expected_confirmations, minimum_s, total_s, unite


@pytest.mark.parametrize(
    ("n", "k", "elapsed", "least", "most", "remaining"),
    [
        (0, 3, 0.0, 2.0, 30.0, 30.0),
        (1, 3, 2.0, 2.0, 30.0, 14.0),
        (2, 3, 3.0, 2.0, 30.0, 4.810),
        (3, 3, 4.0, 2.0, 30.0, -2.0),
        (4, 3, 5.0, 2.0, 30.0, -3.0),
        (5, 3, 10.0, 2.0, 30.0, -8.0),
    ],
)
def test_remaining_suspicion_time(n: int, k: int, elapsed: float, least: float, most: float, remaining: float) -> None:
    """memberlist's table, remainingSuspicionTime."""
    assert total_s(n, k, least, most) - elapsed == pytest.approx(remaining, abs=1e-3)


@pytest.mark.parametrize(("n", "seconds"), [(1, 1.5), (3, 1.5), (10, 1.5), (31, 1.5), (100, 2.0), (1000, 3.0)])
def test_minimum(n: int, seconds: float) -> None:
    assert minimum_s(n, GossipConfig()) == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize(("n", "k"), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 3), (1000, 3)])
def test_expected_confirmations_never_zero_at_three(n: int, k: int) -> None:
    assert expected_confirmations(n, GossipConfig()) == k


@pytest.mark.parametrize(("n", "k"), [(2, 0), (3, 0), (4, 2), (100, 2)])
def test_memberlist_expects_none_in_small_meshes(n: int, k: int) -> None:
    assert expected_confirmations(n, memberlist()) == k


def test_timer_falls_with_each_confirmation_and_not_below_its_minimum() -> None:
    suspicion = Suspicion(100, 50.0, GossipConfig())
    deadlines = [suspicion.deadline(accusers) for accusers in (1, 2, 3, 4, 5)]
    assert deadlines[0] == 50.0 + 12.0
    assert deadlines == sorted(deadlines, reverse=True)
    assert deadlines[3] == deadlines[4] == 50.0 + 2.0
    assert deadlines[0] - deadlines[1] > deadlines[1] - deadlines[2] > deadlines[2] - deadlines[3] > 0


def test_timer_zero_k() -> None:
    """Where nobody can confirm, waiting for confirmations is idle."""
    suspicion = Suspicion(2, 0.0, GossipConfig())
    assert suspicion.deadline(1) == suspicion.deadline(2) == 1.5


def test_without_lifeguard_all_suspicions_are_equally_long() -> None:
    config = GossipConfig(suspicion_max_mult=1.0, confirmations=0)
    assert Suspicion(100, 0.0, config).deadline(1) == Suspicion(100, 0.0, config).deadline(4)


def test_accusers_are_a_bounded_union() -> None:
    held = unite((), ("a", "b", "a"))
    assert held == ("a", "b")
    assert unite(held, ("b",)) is held
    assert unite(held, ("c", "d", "e", "f")) == ("a", "b", "c", "d")
    assert GossipConfig().confirmations < MAX_ACCUSERS


def test_timer_immediate() -> None:
    """A confirmation can come so late that the verdict is due at once (memberlist's TestSuspicion_Timer_Immediate)."""
    suspicion = Suspicion(1000, 100.0, GossipConfig())
    late = 100.0 + suspicion.most - 0.1
    assert suspicion.deadline(1) > late > suspicion.deadline(1 + suspicion.k)
