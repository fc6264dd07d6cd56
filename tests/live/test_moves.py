"""Real processes: a node leaves in the middle of a stream that runs over it; nothing is lost, and no token changes."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from scripts.local_mesh import LocalMesh, LocalNode
from tests.live.conftest import tokens_of
from tests.live.test_entry_dies import GREEDY, asked, client_of, quiet

pytestmark = pytest.mark.live

GONE_S = 60.0
"""For a node that leaves to end; it takes a few seconds."""


@pytest.fixture(autouse=True)
def whole_again(llama_mesh: LocalMesh) -> Iterator[None]:
    yield
    come_back(llama_mesh)


def come_back(mesh: LocalMesh) -> None:
    """All nodes run, and every layer is held twice again."""
    for node in mesh.nodes:
        if not node.running:
            node.start()
    mesh.wait_ready()
    mesh.wait_holders(2)


def leaves(node: LocalNode) -> None:
    """It has ended by itself, and well."""
    assert node.process is not None
    try:
        assert node.process.wait(GONE_S) == 0, node.tail()
    except subprocess.TimeoutExpired:
        pytest.fail(f"{node.name} did not end: {node.tail()}")


def by_name(mesh: LocalMesh, name: str) -> LocalNode:
    return next(node for node in mesh.nodes if node.name == name)


def moved_while_streaming(mesh: LocalMesh, body: dict[str, Any], hop: int) -> dict[str, Any]:
    """A stream whose hop number ``hop`` is asked to leave at the tenth piece; the client's node is another."""
    for entry in mesh.nodes:
        with client_of(mesh, entry) as client:
            stream = client.complete(body["prompt"], stream=True, **{k: v for k, v in body.items() if k != "prompt"})
            text, usage, leaver, count = "", None, None, 0
            for piece in stream:
                text, usage, count = text + piece.text, piece.usage or usage, count + bool(piece.text)
                names = [each.split(":")[0] for each in stream.progress.route.split(",")]
                if names[hop] == entry.name:
                    break
                if count == 10 and leaver is None:
                    leaver = by_name(mesh, names[hop])
                    leaver.signal(signal.SIGTERM)
            if leaver is not None:
                leaves(leaver)
                assert usage is not None
                return {"tokens": tokens_of(text), "recoveries": usage.recoveries, "moves": stream.progress.moves}
    pytest.fail("every entry is that hop itself")


def test_a_hop_leaves(llama_mesh: LocalMesh) -> None:
    body = asked(**GREEDY)
    expected = quiet(llama_mesh, llama_mesh.nodes[0], body)
    found = moved_while_streaming(llama_mesh, body, 0)
    print(f"hop 0 left: {found['recoveries']}")
    assert found["tokens"] == expected
    assert "moved" in [told["cause"] for told in found["recoveries"]]
