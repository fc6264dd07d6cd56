"""Sessions and stages under random schedules of faults: P1 and P2 when each is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from scripts.simulation.tally import Tally
from tests.sim.generation_world import SPANS, play, schedule

UNDO = ("restart", "resume", "heal")


def weathered(seed: int) -> dict[str, int]:
    world = play(seed)
    recoveries = world.core("entry").recoveries
    causes = Counter(f"recoveries_{recovery.cause}" for recovery in recoveries)
    faults = schedule(world.rng_for("faults"), list(SPANS))
    return {
        "steps": world.steps,
        "faults": sum(fault.kind not in UNDO and (fault.kind != "slow" or fault.value > 0.0) for fault in faults),
        "tokens": sum(len(stream) for stream in world.core("entry").streams.values()),
        "recoveries": len(recoveries),
        "replays": sum(recovery.positions_replayed > 0 for recovery in recoveries),
        "positions_replayed": sum(recovery.positions_replayed for recovery in recoveries),
        **causes,
    }


def p1(runs: Tally) -> dict[str, Any]:
    return {
        "what": "random fault schedules on the production session and stage cores, P1 and P2 at the end of each",
        "value": {"violations": runs.violations, "schedules": runs.schedules},
        "unit": "schedules",
        "goal": "0 violations",
        "holds": runs.violations == 0 and runs.schedules > 0,
        "anchor": None,
        "coverage": runs.coverage(),
    }


def figures(schedules: int, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    runs = Tally("generation", weathered).run(range(seed, seed + schedules), tell)
    return {"P1": p1(runs)}
