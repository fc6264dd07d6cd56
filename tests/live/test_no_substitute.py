"""Real processes: the only holder of some layers is killed.  The stream waits until another node has loaded them; past
its deadline it ends with an error that says how far it came."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.local_mesh import LocalMesh, LocalNode
from tests.live.conftest import FLOAT32, tokens_of, weight_bytes

pytestmark = pytest.mark.live

BODY: dict[str, Any] = {
    "model": "llama",
    "prompt": [(7 * i) % 253 + 3 for i in range(60)],
    "max_tokens": 240,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}
STRIKE_AT = 10


@pytest.fixture
def mesh(models: dict[str, Path]) -> Iterator[LocalMesh]:
    """Two nodes that only together hold the model, a witness for the majority, and a fourth that has not come yet."""
    one = {"llama": models["llama"]}
    flags = ["--weight-memory", str(int(weight_bytes(one) * 0.62)), "--memory", "512MiB", *FLOAT32]
    mesh = LocalMesh(4, [str(models["llama"])], flags=flags, patience_s=300.0)
    mesh.nodes[2].flags = [*mesh.nodes[2].flags, "--role", "witness"]
    spare = mesh.nodes.pop()
    try:
        with mesh:
            mesh.nodes.append(spare)
            yield mesh
    finally:
        spare.kill()


def lines(entry: LocalNode, body: dict[str, Any], on_line: Callable[[int, bytes], None]) -> tuple[list[Any], int]:
    """(data of the events, comments) of one stream; ``on_line`` gets the count of events so far and each line."""
    request = urllib.request.Request(
        entry.api + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    events: list[Any] = []
    comments = 0
    with urllib.request.urlopen(request, timeout=120.0) as answer:
        for line in answer:
            comments += line.startswith(b":")
            if line.startswith(b"data: ") and b"[DONE]" not in line:
                events.append(json.loads(line[6:]))
            on_line(len(events), line)
    return events, comments


def text_of(events: list[Any]) -> str:
    return "".join(choice["text"] for chunk in events for choice in chunk.get("choices", ()))


def test_a_stream_waits_until_its_layers_are_held_again_or_its_deadline_is_over(mesh: LocalMesh) -> None:
    entry, holder, _, spare = mesh.nodes
    quiet, _ = lines(entry, BODY, lambda count, line: None)

    def strike(count: int, line: bytes) -> None:
        if count == STRIKE_AT and holder.running:
            holder.kill()
        elif line.startswith(b":") and spare.process is None:  # nobody to go on with, and the client is told to wait
            spare.start(mesh.token)

    loud, comments = lines(entry, BODY, strike)
    assert "error" not in loud[-1], loud[-1]
    assert comments >= 1
    assert tokens_of(text_of(loud)) == tokens_of(text_of(quiet))
    assert loud[-1]["choices"][0]["finish_reason"] == "length"

    def strike_again(count: int, line: bytes) -> None:
        if count == STRIKE_AT and spare.running:
            spare.kill()

    broken, _ = lines(entry, BODY | {"mesh": {"timeout": 12.0}}, strike_again)
    error = broken[-1]["error"]
    assert error["code"] == "timeout"
    assert "of at most 240 tokens were drawn" in error["message"]
    assert all(choice["finish_reason"] is None for chunk in broken[:-1] for choice in chunk["choices"])
    assert tokens_of(text_of(quiet))[: len(tokens_of(text_of(broken)))] == tokens_of(text_of(broken))
