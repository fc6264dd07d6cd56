"""Real processes: a stage is killed, frozen, slowed at every kind of moment, and the tokens are the undisturbed run's.

The table is a part of ``scripts/bench_recovery --sweep``, chosen so that every hop, moment, fault and double fault is
in it, greedy or seeded.  The coordinator and the entry die in test_mesh.py and test_entry_dies.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.local_mesh import LocalMesh
from scripts.recovery.oracle import NODES, Case, Oracle
from scripts.recovery.striking import Strikes

pytestmark = pytest.mark.live

TABLE = [
    Case("first", "decode", "kill"),
    Case("last", "decode", "kill", seeded=True),
    Case("first", "prefill", "kill", seeded=True),
    Case("last", "end", "kill"),
    Case("first", "end", "freeze", seeded=True),
    Case("middle", "decode", "freeze"),
    Case("last", "decode", "freeze", seeded=True),
    Case("middle", "decode", "slow", seeded=True),
    Case("first", "decode", "kill", then="row"),
    Case("middle", "decode", "kill", seeded=True, then="neighbour"),
    Case("middle", "decode", "kill", then="during"),
    Case("middle", "decode", "kill", seeded=True, whole=True),
]


@pytest.fixture(scope="module")
def oracle(models: dict[str, Path]) -> Iterator[Oracle]:
    """Six nodes that hold every layer of one small model; most of what they keep goes to the disk."""
    flags = ["--memory", "512MiB", "--checkpoint-memory", "8KiB"]
    with (
        LocalMesh(NODES, [str(models["llama"])], flags=flags, patience_s=300.0) as mesh,
        Strikes(mesh) as strikes,
    ):
        mesh.wait_holders(NODES)
        yield Oracle(mesh, strikes, "llama")


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_the_tokens_are_those_of_an_undisturbed_run(oracle: Oracle, case: Case) -> None:
    outcome = oracle.play(case)
    print(outcome)
    assert not outcome.failure, outcome


def test_a_replay_reads_what_went_to_the_disk(oracle: Oracle) -> None:
    def read() -> dict[str, float]:
        return {node.name: node.metric("mesh_checkpoint_disk_read_bytes_total") for node in oracle.mesh.nodes}

    before = read()
    outcome = oracle.play(Case("last", "decode", "kill"))
    assert not outcome.failure, outcome
    upstream = outcome.route[1]
    oracle.mesh.wait(lambda: read()[upstream] > before[upstream], f"{upstream} to count what it read", 10.0)
