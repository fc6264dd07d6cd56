"""The last line that every benchmark prints with ``--json``, and its exit status."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def report(figures: dict[str, dict[str, Any]], *, seed: int, as_json: bool) -> int:
    """Print the figures; 0 when all of them hold, 3 when one does not."""
    if as_json:
        print(json.dumps({"figures": figures, **circumstances(), "seed": seed}))
    return 0 if all(figure["holds"] for figure in figures.values()) else 3


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
