"""Real processes with too little room: half of the nodes are killed under load, interactive requests keep flowing,
batch waits, and nothing that was accepted is lost."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import MeshClient
from scripts.local_mesh import LocalMesh, LocalNode, covers, http_json
from tests.live.conftest import FLOAT32, LAYERS, tokens_of, weight_bytes

pytestmark = pytest.mark.live

PROMPT = [(5 * i) % 253 + 3 for i in range(40)]
BATCH, BATCH_TOKENS = 7, 180
URGENT, URGENT_TOKENS = 3, 40
POSITION_BYTES = 2 * 2 * 16 * 4
"""Keys and values of one position in one layer of the tiny llama, float32."""
ROOM = 3 * 256 * 4 * POSITION_BYTES
"""A node has room for three sessions of 256 positions in four layers."""


@pytest.fixture
def scarce(models: dict[str, Path]) -> Iterator[LocalMesh]:
    llama = {"llama": models["llama"]}
    weights = int(weight_bytes(llama) * 0.75)
    flags = ["--weight-memory", str(weights), "--memory", str(weights + ROOM), *FLOAT32]
    with LocalMesh(4, [str(models["llama"])], flags=flags) as mesh:
        mesh.wait_holders(2)
        yield mesh


def body(priority: str, tokens: int, seed: int) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "seed": seed,
            "mesh": {"class": priority, "max_layers": 4, "timeout": 600}}  # fmt: skip


def pair_that_covers(mesh: LocalMesh) -> tuple[LocalNode, LocalNode]:
    """Two nodes that hold all layers between them."""
    status = mesh.nodes[0].get("/mesh/status")
    spans = {member["name"]: member["spans"] for member in status["members"]}
    model = status["placement"]["models"][0]["id"]
    for one, other in itertools.combinations(mesh.nodes, 2):
        held = spans[one.name] + spans[other.name]
        if all(any(covers(span, model, layer) for span in held) for layer in range(LAYERS)):
            return one, other
    pytest.fail(f"no two nodes hold all layers: {spans}")


def test_half_of_the_nodes_are_lost_under_load(scarce: LocalMesh) -> None:
    entry, other = pair_that_covers(scarce)
    wanted = {f"batch {n}": body("batch", BATCH_TOKENS, 1) for n in range(BATCH)}
    urgent = {f"urgent {n}": body("interactive", URGENT_TOKENS, 2) for n in range(URGENT)}
    quiet = {
        ask["max_tokens"]: http_json(f"{entry.api}/v1/completions", method="POST", body=ask, timeout=120.0)
        for ask in (wanted["batch 0"], urgent["urgent 0"])
    }
    expected = {
        name: tokens_of(quiet[ask["max_tokens"]]["choices"][0]["text"]) for name, ask in (wanted | urgent).items()
    }
    found: dict[str, list[int]] = {}
    failed: dict[str, Exception] = {}
    begun = {name: threading.Event() for name in wanted}

    def ask_for(name: str, ask: dict[str, Any]) -> None:
        try:
            with MeshClient([entry.api], learn=False, patience_s=120.0) as client:
                text = ""
                for piece in client.complete(stream=True, **ask):
                    text += piece.text
                    if name in begun:
                        begun[name].set()
                found[name] = tokens_of(text)
        except Exception as error:
            failed[name] = error

    threads = {name: threading.Thread(target=ask_for, args=(name, ask)) for name, ask in (wanted | urgent).items()}
    for name in wanted:
        threads[name].start()
    scarce.wait(lambda: sum(each.is_set() for each in begun.values()) >= 4, "batch to run", 60.0)
    for node in scarce.nodes:
        if node not in (entry, other):
            node.kill()
    for name in urgent:
        threads[name].start()
    for name in urgent:
        threads[name].join(120.0)
    still = [name for name in wanted if name not in found and name not in failed]
    sessions = entry.get("/mesh/status")["sessions"]
    for thread in threads.values():
        thread.join(240.0)
    preempted = sum(node.metric("mesh_num_preemptions_total") for node in (entry, other))
    waited = sum(entry.metric(f'mesh_recoveries_total{{cause="{cause}"}}') for cause in ("paused", "busy"))
    print(f"when the last interactive one ended {len(still)} of {BATCH} batch ones were left, {sessions['paused']}")
    print(f"paused, {sessions['waiting']} in the queue; {preempted:g} preemptions, {waited:g} pauses")
    assert failed == {}
    assert found == expected
    assert still, "interactive did not wait for batch"
    assert sessions["paused"] + sessions["waiting"] > 0 or preempted + waited > 0, "room was scarce"
