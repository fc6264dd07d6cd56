"""Schedules played, counted and, where one breaks a property, told: the last events and the command that replays it."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any


class Tally:
    """Plays schedules of one kind; ``play(seed)`` returns counters or raises ``AssertionError`` with its story as a
    note."""

    def __init__(self, command: str, play: Callable[[int], dict[str, int]], flag: str = "--schedules") -> None:
        self.replay = f"scripts/simulate {command} {flag} 1 --seed"
        self.play = play
        self.schedules = self.violations = 0
        self.counts: Counter[str] = Counter()
        self.failed: list[int] = []
        self.seeds: list[int] = []
        """First and last; they follow each other."""
        self.seconds = 0.0
        """Of one processor, so that speeds mean something on a busy machine."""

    def one(self, seed: int, tell: Callable[[str], None]) -> None:
        start = time.process_time()
        try:
            self.counts.update(self.play(seed))
        except AssertionError as violation:
            self.violations += 1
            self.failed.append(seed)
            tell(describe(violation))
            tell(f"seed {seed} breaks a property; again: {self.replay} {seed}")
        self.seeds = [self.seeds[0] if self.seeds else seed, seed]
        self.schedules += 1
        self.seconds += time.process_time() - start

    def run(self, seeds: Iterable[int], tell: Callable[[str], None]) -> Tally:
        """Every seed, to the end, whatever fails; a line every 30 s."""
        shown = time.monotonic()
        for seed in seeds:
            self.one(seed, tell)
            if time.monotonic() - shown > 30.0:
                shown = time.monotonic()
                tell(self.line())
        if self.schedules:
            tell(self.line())
        return self

    def coverage(self) -> dict[str, Any]:
        """Counters, speed, the range of seeds, and those that failed."""
        found: dict[str, Any] = {**self.counts, "schedules": self.schedules, "violations": self.violations}
        found["seconds"] = round(self.seconds, 1)
        if self.seconds:
            found["schedules_per_s"] = round(self.schedules / self.seconds, 1)
            if "steps" in self.counts:
                found["steps_per_s"] = round(self.counts["steps"] / self.seconds)
        return {**found, "seeds": self.seeds, "failed_seeds": self.failed[:20]}

    def line(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.coverage().items() if "seeds" not in name)
        return f"{self.replay.split()[1]}: {self.violations} violations; {counts}"


def describe(violation: AssertionError) -> str:
    """The notes (faults, last events), where it was raised, and what is wrong."""
    last = traceback.extract_tb(violation.__traceback__)[-1]
    return "\n".join([*getattr(violation, "__notes__", []), f"{last.filename}:{last.lineno}", str(violation)])
