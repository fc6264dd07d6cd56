"""The last line that every benchmark prints with ``--json``, and its exit status."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def report(figures: dict[str, dict[str, Any]], *, seed: int, as_json: bool) -> int:
    """Print the figures; 0 when all of them hold, 3 when one does not."""
    if as_json:
        print(json.dumps({"figures": figures, **circumstances(), "seed": seed}))
    return 0 if all(figure["holds"] for figure in figures.values()) else 3


def nearest_rank(values: list[float], share: float) -> float:
    """The smallest of ``values`` that is at least as large as ``share`` of them; NaN of none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def spread(values: list[float], median: float | None, p99: float | None, unit: str = "s") -> dict[str, Any]:
    """A figure's value, goal and whether it holds, for a distribution with goals for its median and 99th percentile."""
    shown = {
        "median": round(statistics.median(values), 3) if values else None,
        "p99": round(nearest_rank(values, 0.99), 3) if values else None,
        "n": len(values),
    }
    limits = {"median": median, "p99": p99}
    goal = ", ".join(f"{name} <= {limit:g} {unit}" for name, limit in limits.items() if limit is not None)
    holds = bool(values) and all(limit is None or shown[name] <= limit for name, limit in limits.items())
    return {"value": shown, "unit": unit, "goal": goal, "holds": holds}


def circumstances() -> dict[str, str]:
    """Commit, machine and date, for whoever reads a figure later."""
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "machine": f"{os.cpu_count()} cores, {_processor()}, {platform.system()} {platform.release()}",
        "date": datetime.date.today().isoformat(),
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
