"""The loop's lateness, on a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from node import lag
from node.lag import EVERY_S, KEPT, LagMeter


async def measured(monkeypatch: pytest.MonkeyPatch, late: Iterable[float]) -> LagMeter:
    """A meter whose sleeps ended so much later than asked."""
    meter, sleeps = LagMeter(), iter(late)
    now = 50.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        try:
            now += seconds + next(sleeps)
        except StopIteration:
            raise asyncio.CancelledError from None

    with monkeypatch.context() as patch:
        patch.setattr(lag.asyncio, "sleep", sleep)
        patch.setattr(lag.time, "monotonic", lambda: now)
        with pytest.raises(asyncio.CancelledError):
            await meter.run()
    return meter


def test_a_new_meter_knows_of_no_lag() -> None:
    assert (LagMeter().p99_ms, LagMeter().worst_s()) == (0.0, 0.0)


async def test_one_hundredth_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = await measured(monkeypatch, [0.001] * 198 + [0.5, 0.4])
    assert meter.p99_ms == pytest.approx(400.0)
    meter = await measured(monkeypatch, [0.001] * 199 + [0.5])
    assert meter.p99_ms == pytest.approx(1.0)


async def test_only_the_last_seconds_count(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = await measured(monkeypatch, [0.5] * 100 + [0.002] * KEPT)
    assert meter.p99_ms == pytest.approx(2.0)
    assert pytest.approx(5.0) == KEPT * EVERY_S


async def test_the_worst_is_forgotten_once_it_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = await measured(monkeypatch, [0.001, 0.3, 0.002])
    assert meter.worst_s() == pytest.approx(0.3)
    assert meter.worst_s() == 0.0


async def test_a_sleep_that_ends_early_is_no_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = await measured(monkeypatch, [-0.001, -0.002])
    assert meter.worst_s() == 0.0
