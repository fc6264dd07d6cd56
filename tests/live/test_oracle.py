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
    """Six nodes that hold every layer of one small model."""
    with (
        LocalMesh(NODES, [str(models["llama"])], flags=["--memory", "512MiB"], patience_s=300.0) as mesh,
        Strikes(mesh) as strikes,
    ):
        mesh.wait_holders(NODES)
        yield Oracle(mesh, strikes, "llama")


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_the_tokens_are_those_of_an_undisturbed_run(oracle: Oracle, case: Case) -> None:
    outcome = oracle.play(case)
    print(outcome)
    assert not outcome.failure, outcome
