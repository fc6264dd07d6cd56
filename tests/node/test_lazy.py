"""Imports that are put off until they are needed, by several threads at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

FIRST_USE_BY_MANY = """
import threading
from node.lazy import transformers
found, start = [], threading.Barrier(6)
def use():
    start.wait()
    found.append(transformers().AutoConfig)
threads = [threading.Thread(target=use) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 6 and len(set(found)) == 1, found
"""


def test_threads_that_need_transformers_at_once_all_get_it_whole() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_USE_BY_MANY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
