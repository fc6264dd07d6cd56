"""Sessions and stages under random schedules of faults: P4, P6, P7 at every step, P1, P2, P3 when each is over."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

from scripts.simulation.tally import Tally
from tests.sim.generation_world import play, weather_of

UNDO = ("restart", "resume", "heal")


def weathered(seed: int) -> dict[str, int]:
    weather = play(seed)
    world = weather.world
    recoveries = [r for node in world.nodes.values() if node.up for r in node.core.recoveries]
    causes = Counter(f"recoveries_{recovery.cause.replace(' ', '_')}" for recovery in recoveries)
    _, faults = weather_of(seed)
    return {
        "steps": world.steps,
        "faults": sum(fault.kind not in UNDO and (fault.kind != "slow" or fault.value > 0.0) for fault in faults),
        "tokens": sum(len(client.tokens) for client in weather.clients),
        "recoveries": len(recoveries),
        "replays": sum(recovery.positions_replayed > 0 for recovery in recoveries),
        "positions_replayed": sum(recovery.positions_replayed for recovery in recoveries),
        "positions_shared": sum(node.core.stage.pages.found for node in world.nodes.values() if node.up),
        "adoptions": weather.counts["adoptions"],
        "relays": weather.counts["relays"],
        "claims_contested": weather.counts["contested"],
        "clients_moved": sum(client.moves for client in weather.clients),
        "all_holders_killed": len(weather.lost),
        "rows_spilled": weather.counts["spilled"],
        "rows_replayed_from_disk": weather.counts["replayed from disk"],
        "refused_by_disk": weather.counts["refused by disk"],
        **causes,
    }


def p1(runs: Tally) -> dict[str, Any]:
    return {
        "what": "random fault schedules on the production session and stage cores: P1-P4, P6, P7",
        "value": {"violations": runs.violations, "schedules": runs.schedules},
        "unit": "schedules",
        "goal": "0 violations",
        "holds": runs.violations == 0 and runs.schedules > 0,
        "anchor": None,
        "coverage": runs.coverage(),
    }


def figures(schedules: int, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    gc.set_threshold(100_000)  # worlds are cycles, and few of them live at once
    runs = Tally("generation", weathered).run(range(seed, seed + schedules), tell)
    return {"P1": p1(runs)}
