"""The device thread's wait for the tokens that it has just handed out; the rest of it is tested through the engine."""

from __future__ import annotations

import pytest

from mesh.types import SamplingParams
from node.engine import runner as module
from node.engine.runner import Runner
from node.engine.sequence import Sequence, SequenceSpec, Work
from tests.node.engine.chain import MODEL

DRAWN = {"start": 0, "end": 4, "sampling": SamplingParams(max_tokens=8), "tokens": (1, 2, 3)}


def _after_a_step(**spec: object) -> tuple[Runner, Sequence]:
    """A runner whose last step drew a token of one sequence; its thread is not started."""
    runner = Runner(1, 64, lambda results: None, lambda error: None)
    sequence = Sequence(SequenceSpec("a", MODEL, max_positions=16, **spec), 1, 256, 256)  # type: ignore[arg-type]
    sequence.push(Work("a", 0, 0, 3, (1, 2, 3), sample=True))
    sequence.advance(3, step=1)
    runner._sequences["a"], runner._step, runner.pace.step_s = sequence, 1, 600.0
    return runner, sequence


def test_a_drawn_token_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_MOST_S", 60.0)
    runner, sequence = _after_a_step(**DRAWN)
    for _ in range(3):  # whatever else was posted before
        runner.post(lambda: None)
    runner.post(runner.submit, Work("a", 0, 3, 1, (4,), sample=True))
    runner.post(runner._stop)
    runner._wait_for_fed()
    assert sequence.wanted == 1
    assert not runner._stopping  # and nothing is waited for any longer


def test_a_token_that_does_not_come_back_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_MOST_S", 0.0)
    runner, sequence = _after_a_step(**DRAWN)
    runner._wait_for_fed()
    assert not sequence.queue


@pytest.mark.parametrize(
    "over", [{"hops": 2}, {"start": 1}, {"sampling": None}], ids=["two hops", "not hop 0", "no head"]
)
def test_what_goes_on_over_other_nodes_is_not_waited_for(over: dict[str, object]) -> None:
    runner, _ = _after_a_step(**DRAWN | over)
    runner.post(runner._stop)
    runner._wait_for_fed()
    assert not runner._stopping


def test_a_stop_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_MOST_S", 60.0)
    runner, _ = _after_a_step(**DRAWN)
    runner.stop()
    runner._wait_for_fed()
    assert runner._stopping
