"""The figures behind the balancing policies."""

from __future__ import annotations

import pytest

from mesh.balance import HOP_MS, LAG_NOISE_MS, P99_OF_MEAN, POLICIES, Measured, draw, hop_cost
from tests.mesh.views import PLAIN, member


def measured(**outstanding: int) -> Measured:
    return Measured(PLAIN, "me", outstanding)


def test_sessions_are_counted_once() -> None:
    busy = member("a", (0, 4), load={"running": 2, "waiting": 1})
    assert measured().sessions(busy) == 3
    assert measured(a=2).sessions(busy) == 3
    assert measured(a=5).sessions(busy) == 5


def test_measured_steps_count_more_than_estimates() -> None:
    idle, busy = member("a", (0, 4)), member("a", (0, 4), load={"running": 1, "step_ms": 40.0})
    assert measured().layers_ms(idle, 2) == pytest.approx(2.0)
    assert measured().layers_ms(busy, 2) == pytest.approx(20.0)


def test_a_hop_costs_its_layers_its_queue_and_its_leg() -> None:
    far = member("a", (0, 4), rtt_ms=10.0, load={"lag_ms": LAG_NOISE_MS + 2.0 * P99_OF_MEAN})
    assert measured().hop_ms(far, 0, 4) == pytest.approx(HOP_MS + 4 + 5 + 2)
    assert Measured(PLAIN, "a", {}).hop_ms(far, 0, 4) == pytest.approx(HOP_MS + 4 + 2), "no wire to oneself"
    queued = member("a", (0, 4), load={"running": 5, "waiting": 2})
    assert measured().hop_ms(queued, 0, 4) > 2 * measured().hop_ms(member("a", (0, 4)), 0, 4)


def test_draws_are_even_and_repeatable() -> None:
    draws = [draw("x", i) for i in range(2000)]
    assert draws == [draw("x", i) for i in range(2000)]
    assert min(draws) > 0
    assert max(draws) < 1
    assert sum(draws) / 2000 == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_costs_something_and_not_too_much(policy: str) -> None:
    holders = [(m, m.profile.spans[0]) for m in (member("a", (0, 4)), member("b", (2, 8), load={"free_tokens": 0}))]
    cost = hop_cost(policy, measured(b=3), holders, 5, "p")  # type: ignore[arg-type]
    for m, span in holders:
        assert 0 < cost(m, span, span.start, span.end) <= 1e6
