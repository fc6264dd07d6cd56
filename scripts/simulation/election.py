"""The election under random schedules (Q15), in long calm (Q13) and with links cut (Q14)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from scripts.figures import spread
from scripts.simulation.tally import Tally
from tests.sim.election_bag import Bag, story
from tests.sim.election_failover import failover
from tests.sim.election_world import PARTIAL, cut_partly, needless_elections, play

TIMED_GOAL, BAG_GOAL = 100_000, 1_000_000


def timed(seed: int) -> dict[str, int]:
    """30 s of weather with proposals, then liveness; I1-I12 after every step."""
    world = play(seed)
    faults = sum(fault.kind not in ("restart", "resume", "heal") for fault in world.faults)
    return {"steps": world.steps, "faults": faults, **world.checker.counts}


def bag(seed: int) -> dict[str, int]:
    try:
        return Bag(seed).run().counts
    except AssertionError as violation:
        violation.add_note(story(seed))
        raise


def q15(timed_runs: Tally, bags: Tally) -> dict[str, Any]:
    violations = timed_runs.violations + bags.violations
    value = {"violations": violations, "timed": timed_runs.schedules, "message_bag": bags.schedules}
    return {
        "what": "random fault schedules on the production core, I1-I12 after every step",
        "value": value,
        "unit": "schedules",
        "goal": f"0 violations in >= {TIMED_GOAL:,} timed and >= {BAG_GOAL:,} message-bag schedules",
        "holds": violations == 0 and timed_runs.schedules >= TIMED_GOAL and bags.schedules >= BAG_GOAL,
        "anchor": "TigerBeetle's VOPR habit",
        "coverage": {"timed": timed_runs.coverage(), "message_bag": bags.coverage()},
    }


def q13(hours: float, seed: int) -> dict[str, Any]:
    needless = needless_elections(seed, hours)
    return {
        "what": f"needless leader changes in {hours:g} simulated hours, 5 voters, 5 % loss, a 1 s stall every 30 s",
        "value": needless,
        "unit": "elections",
        "goal": "0 in 24 h",
        "holds": needless == 0 and hours >= 24.0,
        "anchor": None,
    }


def q14(seed: int, runs: int = 10) -> dict[str, Any]:
    worst = {name: round(max(cut_partly(seed + k, name) for k in range(runs)), 3) for name in PARTIAL}
    return {
        "what": f"partial connectivity: links cut until somebody leads and commits, worst of {runs} runs each",
        "value": worst,
        "unit": "s",
        "goal": "<= 5 s in all four",
        "holds": max(worst.values()) <= 5.0,
        "anchor": "Raft with PreVote and CheckQuorum fails at least one",
    }


FAILOVERS = {
    "Q10_sim": ("a killed coordinator", {"fault": "crash"}, 0.35, 1.2),
    "Q11_sim": ("a frozen coordinator", {"fault": "pause"}, 1.7, 3.0),
    "Q11_sim_restless": ("the same, all stalled for 1.5 s lately", {"fault": "pause", "restless": True}, 1.7, 3.0),
}
"""Figure -> (what, how ``failover`` is called, goals for median and p99 in s)."""


def failovers(seed: int, runs: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """From the loss of the coordinator to a committed record of another: the distribution over ``runs`` seeds."""
    found: dict[str, Any] = {}
    for name, (what, how, median, p99) in FAILOVERS.items():
        for size in (3, 5):
            times = [failover(seed + k, size, **how)[0] for k in range(runs)]
            tail = {"worst": round(max(times), 3), "over_half_a_second": sum(time > 0.5 for time in times)}
            found[f"{name}_{size}"] = {
                "what": f"{what}, to a new committed record; {size} voters, fsync of 4 ms, {runs} runs",
                **spread(times, median, p99),
                "anchor": None,
                **tail,
            }
            tell(f"{name} with {size} voters: {found[f'{name}_{size}']['value']}, {tail}")
    return found


def figures(
    schedules: int, bags: int, hours: float, seed: int, tell: Callable[[str], None], failover_runs: int = 0
) -> dict[str, Any]:
    timed_runs, bag_runs = Tally("election --bag 0", timed), Tally("election --schedules 0", bag, "--bag")
    bag_runs.run(range(seed, seed + bags), tell)
    timed_runs.run(range(seed, seed + schedules), tell)
    found = {"Q15": q15(timed_runs, bag_runs)}
    if schedules + bags > 1:  # else a replay
        found["Q14"] = q14(seed)
    found |= failovers(seed, failover_runs, tell) if failover_runs else {}
    if hours:
        start = time.monotonic()
        found["Q13"] = q13(hours, seed)
        tell(f"{hours:g} simulated hours in {time.monotonic() - start:.0f} s")
    return found
