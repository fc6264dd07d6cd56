"""All kinds of schedules in turn, with fresh seeds, until time is over; what is done is kept, and adds up over days.

Each process has seeds of its own: process k of a soak that starts at S plays S + k x 10^9, S + k x 10^9 + 1, ...
With a folder it writes its tally there every minute, and the next soak goes on where it ended.  A tally belongs to the
code that was played (a digest of it, without its comments, is in the file's name): of two codes nothing is added up.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from scripts.figures import ROOT
from scripts.simulation import election, generation, gossip
from scripts.simulation.tally import Tally

ROUND = {"bag": 400, "timed": 40, "generation": 40, "gossip": 1}
"""Schedules of each kind in a round; of the election as many to one as Q15 asks for."""
STRIDE = 10**9
"""Seeds of one process."""
KEEP_S = 60.0
SIMULATOR = ("tests/sim/world.py", "tests/sim/network.py", "tests/sim/faults.py")
PLAYED = {
    "bag": ("mesh/election/*.py", "tests/sim/election_bag.py", "tests/sim/election_checks.py"),
    "timed": ("mesh/election/*.py", "tests/sim/election_world.py", "tests/sim/election_checks.py", *SIMULATOR),
    "generation": ("mesh/pipeline/*.py", "tests/sim/generation*.py", *SIMULATOR),
    "gossip": ("gossip/*.py", "tests/sim/gossip_*.py", *SIMULATOR),
}
"""What decides about a schedule of each kind."""

Tell = Callable[[str], None]


def new_tallies() -> dict[str, Tally]:
    return {
        "bag": Tally("election --schedules 0", election.bag, "--bag"),
        "timed": Tally("election --bag 0", election.timed),
        "generation": Tally("generation", generation.weathered),
        "gossip": Tally("storms", gossip.storm),
    }


class Kept(msgspec.Struct):
    """What one process did of one kind: seeds [first, next)."""

    first: int
    next: int
    violations: int = 0
    failed: list[int] = []
    counts: dict[str, int] = {}
    seconds: float = 0.0


class Soak:
    """One process's share."""

    def __init__(self, process: int, seed: int, kinds: Sequence[str], folder: Path | None) -> None:
        start = seed + process * STRIDE
        self.paths = {kind: folder / f"{kind}-{code_digest(kind)}-{process}.json" for kind in kinds if folder}
        self.kept = {kind: Kept(start, start) for kind in kinds}
        for kind, path in self.paths.items():
            if path.exists():
                self.kept[kind] = msgspec.json.decode(path.read_bytes(), type=Kept)
        self.tallies = {kind: resumed(kind, kept) for kind, kept in self.kept.items()}

    def run(self, end: float, tell: Tell) -> None:
        """Until ``time.monotonic()`` is ``end`` or an interrupt."""
        gc.set_threshold(100_000)  # worlds are cycles, and few of them live at once
        shown = time.monotonic()
        try:
            while time.monotonic() < end:
                for kind in self.kept:
                    for _ in range(ROUND[kind]):
                        if time.monotonic() < end:
                            self.tallies[kind].one(self.kept[kind].next, tell)
                            self.kept[kind].next += 1
                if time.monotonic() - shown > KEEP_S:
                    shown = time.monotonic()
                    self.keep()
                    tell("\n".join(tally.line() for tally in self.tallies.values()))
        except KeyboardInterrupt:
            tell("interrupted")
        self.keep()

    def keep(self) -> None:
        for kind, tally in self.tallies.items():
            kept = self.kept[kind]
            kept.violations, kept.failed, kept.counts = tally.violations, tally.failed, dict(tally.counts)
            kept.seconds = round(tally.seconds, 1)
        for kind, path in self.paths.items():
            part = path.with_suffix(".part")
            part.write_bytes(msgspec.json.encode(self.kept[kind]))
            part.rename(path)


def resumed(kind: str, kept: Kept) -> Tally:
    tally = new_tallies()[kind]
    tally.schedules, tally.violations = kept.next - kept.first, kept.violations
    tally.failed, tally.seconds = list(kept.failed), kept.seconds
    tally.counts.update(kept.counts)
    tally.seeds = [kept.first, kept.next - 1]
    return tally


@functools.cache
def code_digest(kind: str) -> str:
    """Of what ``PLAYED`` names, without comments and docstrings."""
    digest = hashlib.sha256()
    for pattern in PLAYED[kind]:
        for path in sorted(ROOT.glob(pattern)):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if isinstance(body, list):
                    node.body = [it for it in body if not _is_text(it)]  # type: ignore[attr-defined]
            digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:8]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def figures(
    minutes: float, seed: int, tell: Tell, *, processes: int = 1, kinds: Sequence[str] = (), folder: Path | None = None
) -> dict[str, Any]:
    """Ends early, with what it has, on an interrupt."""
    kinds = list(kinds) or list(ROUND)
    end = time.monotonic() + 60.0 * minutes
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    if processes == 1:
        soak = Soak(0, seed, kinds, folder)
        soak.run(end, tell)
        return judged(soak.tallies)
    assert folder is not None, "several processes keep their tallies in a folder"
    spawn = multiprocessing.get_context("spawn")
    running = [spawn.Process(target=_work, args=(k, seed, kinds, folder, end)) for k in range(processes)]
    for process in running:
        process.start()
    try:
        for process in running:
            process.join()
    except KeyboardInterrupt:  # the others were interrupted with this one
        for process in running:
            process.join()
    return summed(folder)


def _work(process: int, seed: int, kinds: Sequence[str], folder: Path, end: float) -> None:
    Soak(process, seed, kinds, folder).run(end, lambda line: print(f"[{process}] {line}", flush=True))


def summed(folder: Path) -> dict[str, Any]:
    """The figures of all tallies in ``folder``; of each kind those of the code that was played last."""
    tallies, ranges, codes = {}, {}, {}
    for kind in ROUND:
        paths = sorted(folder.glob(f"{kind}-*.json"), key=os.path.getmtime)
        if paths:
            codes[kind] = paths[-1].name.split("-")[1]
            kept = [msgspec.json.decode(path.read_bytes(), type=Kept) for path in paths if codes[kind] in path.name]
            ranges[kind] = disjoint([(one.first, one.next) for one in kept])
            tallies[kind] = functools.reduce(added, (resumed(kind, one) for one in kept))
    if not tallies:
        raise FileNotFoundError(f"no tally of a soak in {folder}")
    what = {"what": "seeds played, of which code", "value": ranges, "unit": "[first, next)", "code": codes}
    return judged(tallies) | {"seeds": {**what, "goal": "disjoint", "holds": True, "anchor": None}}


def disjoint(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """``ranges``, sorted; an assertion fails where the same seed would be counted twice."""
    ranges = sorted(ranges)
    for (_, end), (start, _) in itertools.pairwise(ranges):
        assert end <= start, f"the seeds from {start} to {end} are counted twice"
    return ranges


def added(whole: Tally, part: Tally) -> Tally:
    whole.schedules += part.schedules
    whole.violations += part.violations
    whole.failed += part.failed
    whole.seconds += part.seconds
    whole.counts.update(part.counts)
    whole.seeds += part.seeds
    return whole


def judged(tallies: dict[str, Tally]) -> dict[str, Any]:
    empty = new_tallies()
    found: dict[str, Any] = {}
    if "bag" in tallies or "timed" in tallies:
        found["Q15"] = election.q15(tallies.get("timed", empty["timed"]), tallies.get("bag", empty["bag"]))
    if "generation" in tallies:
        found["P1"] = generation.p1(tallies["generation"])
    if "gossip" in tallies:
        found["G1-G6"] = storms(tallies["gossip"])
    return found


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
