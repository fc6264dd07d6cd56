"""Several results of a soak as one: counters are added, provided that no seed was counted twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read(path: str) -> dict[str, Any]:
    """The figures of a run: the last line of what it printed with ``--json``."""
    lines = Path(path).read_text().strip().splitlines() or [""]
    try:
        return dict(json.loads(lines[-1])["figures"])
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{path}: its last line is no result; was the run made with --json, and is it over?"
        ) from error


def coverages(figures: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind of schedule, its counters)."""
    for name, figure in figures.items():
        covered = figure.get("coverage", {})
        if "schedules" in covered:
            yield name, covered
        else:
            yield from ((f"{name} {kind}", one) for kind, one in covered.items())


def total(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Kind of schedule -> the sums of all counters, and the ranges of seeds."""
    sums: dict[str, dict[str, Any]] = {}
    for figures in results:
        for kind, covered in coverages(figures):
            if covered["schedules"]:
                _add(kind, sums.setdefault(kind, {"seeds": [], "failed_seeds": []}), covered)
    for covered in sums.values():
        covered["schedules_per_s"] = round(covered["schedules"] / max(covered["seconds"], 1e-9), 1)
    return sums


def _add(kind: str, sums: dict[str, Any], covered: dict[str, Any]) -> None:
    first, last = covered["seeds"]
    for low, high in sums["seeds"]:
        if first <= high and low <= last:
            raise SystemExit(f"{kind}: seeds {first}-{last} and {low}-{high} overlap: they would count twice")
    sums["seeds"].append([first, last])
    sums["failed_seeds"] += covered["failed_seeds"]
    for name, value in covered.items():
        if isinstance(value, int | float) and not name.endswith("_per_s"):
            sums[name] = sums.get(name, 0) + value
