"""All kinds of schedules in turn, with fresh seeds, until time is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from scripts.simulation import election, generation, gossip
from scripts.simulation.tally import Tally

ROUND = (("bag", 400), ("timed", 8), ("generation", 40), ("gossip", 1))
"""Schedules of each kind in a round: about as many seconds for each."""


def figures(minutes: float, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Ends early, with what it has, on an interrupt."""
    kinds = {
        "bag": Tally("election --schedules 0", election.bag, "--bag"),
        "timed": Tally("election --bag 0", election.timed),
        "generation": Tally("generation", generation.weathered),
        "gossip": Tally("storms", gossip.storm),
    }
    end, shown = time.monotonic() + 60.0 * minutes, time.monotonic()
    at = dict.fromkeys(kinds, seed)
    try:
        while time.monotonic() < end:
            for kind, count in ROUND:
                for _ in range(count):
                    if time.monotonic() >= end:
                        break
                    kinds[kind].one(at[kind], tell)
                    at[kind] += 1
            if time.monotonic() - shown > 60.0:
                shown = time.monotonic()
                tell("\n".join(tally.line() for tally in kinds.values()))
    except KeyboardInterrupt:
        tell("interrupted")
    tell("\n".join(tally.line() for tally in kinds.values()))
    return {
        "Q15": election.q15(kinds["timed"], kinds["bag"]),
        "P1": generation.p1(kinds["generation"]),
        "G1-G6": storms(kinds["gossip"]),
    }


def storms(runs: Tally) -> dict[str, Any]:
    return {
        "what": "weather over small meshes, G1-G4 after every step, G5 and G6 when it is over",
        "value": {"violations": runs.violations, "schedules": runs.schedules},
        "unit": "schedules",
        "goal": "0 violations",
        "holds": runs.violations == 0 and runs.schedules > 0,
        "anchor": None,
        "coverage": runs.coverage(),
    }
