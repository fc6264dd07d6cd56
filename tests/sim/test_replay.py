"""One seed is one run, whatever PYTHONHASHSEED is: each simulator's trace, twice, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

TRACES = """
import hashlib
from tests.sim import election_bag, election_world, generation_world, gossip_weather
print(gossip_weather.Storm(1, gossip_weather.draw_mix(1, n=3, until=14.0)).run().digest())
world = election_world.drawn(3, 5.0)
world.run(until=5.0)
print(world.digest())
print(hashlib.sha256(election_bag.story(5, last=10**6).encode()).hexdigest())
print(generation_world.play(2, sessions=2, traced=True).world.digest())
"""


def test_traces_do_not_depend_on_the_hash_seed() -> None:
    command, running = [sys.executable, "-c", TRACES], []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    runs = [process.communicate()[0].split() for process in running]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 4
