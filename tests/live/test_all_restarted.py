"""Every node is killed in the middle of a stream and started again: the SDK brings the tokens it has, and the stream
goes on after them with the same text."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import MeshClient
from scripts.local_mesh import LocalMesh, http_json
from tests.live.conftest import launch

pytestmark = pytest.mark.live

PROMPT = [(13 * i) % 253 + 3 for i in range(30)]
ASKED: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "temperature": 1.0, "mesh": {"max_layers": 4}}
SHOWN = 10


@pytest.fixture
def mesh(models: dict[str, Path]) -> Iterator[LocalMesh]:
    with launch(3, {"llama": models["llama"]}, 0.75) as mesh:
        mesh.wait_holders(1)
        yield mesh


def test_a_stream_goes_on_after_all_nodes_were_killed(mesh: LocalMesh) -> None:
    starting = None
    with MeshClient([node.api for node in mesh.nodes], patience_s=120.0) as client:
        stream = client.complete(PROMPT, stream=True, **ASKED)
        text, shown, usage = "", 0, None
        for piece in stream:
            text, usage, shown = text + piece.text, piece.usage or usage, shown + bool(piece.text)
            if shown == SHOWN and starting is None:
                for node in mesh.nodes:
                    node.kill()
                starting = threading.Thread(target=start_all, args=[mesh])
                starting.start()
        progress = stream.progress
    assert starting is not None
    starting.join()
    assert progress.moves >= 1, "the stream broke off"
    assert usage is not None
    assert [recovery["cause"] for recovery in usage.recoveries][:1] == ["resubmitted"]
    assert usage.completion_tokens == ASKED["max_tokens"]
    mesh.wait_ready()
    again = {"prompt": PROMPT, **ASKED, "seed": progress.body["seed"]}
    answer = http_json(f"{mesh.nodes[0].api}/v1/completions", method="POST", body=again, timeout=120.0)
    assert text == answer["choices"][0]["text"]
    assert len(progress.tokens) == ASKED["max_tokens"]


def start_all(mesh: LocalMesh) -> None:
    for node in mesh.nodes:
        node.start()
