"""Real processes: nodes leave in the middle of streams, one kind of hop after the other and all in turn; nothing is
lost, no token changes, and next to nothing is computed again."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from client import MeshClient
from scripts.local_mesh import LocalMesh, LocalNode
from tests.live.conftest import tokens_of
from tests.live.test_entry_dies import GREEDY, SEEDED, asked, client_of, events, quiet, text_of

pytestmark = pytest.mark.live

GONE_S = 60.0
"""For a node that leaves to end; it takes a few seconds."""
LONG = 440
"""Tokens of a stream that is moved: the client is behind the draws, and whoever leaves may have to ask more than once,
where layers are still on the move since the node before it came back."""


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
                told = f"{stream.progress.route}\n{leaver.tail()}\n{entry.tail()}"
                return {"tokens": tokens_of(text), "recoveries": usage.recoveries, "moves": stream.progress.moves,
                        "told": told}  # fmt: skip
    pytest.fail("every entry is that hop itself")


@pytest.mark.parametrize("hop", [0, 1, -1], ids=["first", "middle", "sampler"])
def test_a_hop_leaves(llama_mesh: LocalMesh, hop: int) -> None:
    body = asked(**(SEEDED if hop else GREEDY), max_tokens=LONG, mesh={"max_layers": 3 if hop == 1 else 4})
    expected = quiet(llama_mesh, llama_mesh.nodes[0], body)
    found = moved_while_streaming(llama_mesh, body, hop)
    print(f"hop {hop} left: {found['recoveries']}")
    assert found["tokens"] == expected
    assert [told["cause"] for told in found["recoveries"]][:1] == ["moved"], found["told"]
    assert found["recoveries"][0]["positions_replayed"] <= 16
    assert found["moves"] == 0, "the client's node was not the one that left"


@pytest.mark.parametrize("way", ["sdk", "plain"])
def test_the_clients_node_leaves(llama_mesh: LocalMesh, way: str) -> None:
    """The SDK is sent on; a client without it reads on at the node that leaves, for as long as that waits."""
    entry, body = llama_mesh.nodes[1], asked(**GREEDY)
    expected = quiet(llama_mesh, entry, body)
    if way == "sdk":
        with client_of(llama_mesh, entry) as client:
            stream = client.complete(body["prompt"], stream=True, **{k: v for k, v in body.items() if k != "prompt"})
            text = ""
            for count, piece in enumerate(stream):
                text += piece.text
                if count == 10:
                    entry.signal(signal.SIGTERM)
            assert (tokens_of(text), stream.progress.moves) == (expected, 1)
    else:
        got: list[tuple[str, Any]] = []
        for name, chunk in events(entry, "POST", "/v1/completions", body | {"stream": True}):
            got += [(name, chunk)] if name != "session" else []
            if len(got) == 10:
                entry.signal(signal.SIGTERM)
            if "error" in chunk:
                break
        if "error" in got[-1][1]:  # slower than the node waits: what is told is enough to go on with
            error = got.pop()[1]["error"]
            assert error["code"] == "leaving"
            path = next(word for word in error["message"].split() if word.startswith("/v1/sessions/"))
            got += list(events(llama_mesh.nodes[0], "GET", path, **{"Last-Event-ID": got[-1][0]}))[1:]
        assert tokens_of(text_of(got)) == expected
    leaves(entry)


STREAMS = 8


class Load:
    """One thread of the load: whole streams, one after the other, until told to stop."""

    def __init__(self, client: MeshClient, body: dict[str, Any]) -> None:
        self.client, self.body = client, body
        self.found: list[list[int]] = []
        self.recoveries: list[Any] = []
        self.failed: Exception | None = None
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not self.stop.is_set():
                prompt, rest = self.body["prompt"], {k: v for k, v in self.body.items() if k != "prompt"}
                answer = self.client.complete(prompt, **rest)
                self.found.append(tokens_of(answer.text))
                self.recoveries += answer.usage.recoveries
        except Exception as error:  # told in the test's own thread
            self.failed = error


def test_a_rolling_restart_of_all_nodes_under_load(llama_mesh: LocalMesh) -> None:
    bodies = [asked(**(GREEDY if number % 2 else SEEDED | {"seed": number})) for number in range(STREAMS)]
    expected = [quiet(llama_mesh, llama_mesh.nodes[0], body) for body in bodies]
    began = time.monotonic()
    with MeshClient([node.api for node in llama_mesh.nodes], patience_s=60.0) as client:
        load = [Load(client, body) for body in bodies]
        try:
            for node in llama_mesh.nodes:
                node.signal(signal.SIGTERM)
                leaves(node)
                come_back(llama_mesh)
        finally:
            for one in load:
                one.stop.set()
            for one in load:
                one.thread.join(120.0)
    causes = sorted(told["cause"] for one in load for told in one.recoveries)
    answers = sum(len(one.found) for one in load)
    print(f"{answers} answers in {time.monotonic() - began:.0f} s: {causes}")
    assert [one.failed for one in load] == [None] * STREAMS
    for one, tokens in zip(load, expected, strict=True):
        assert one.found
        assert all(found == tokens for found in one.found)
    assert any(cause in ("moved", "owner moved") for cause in causes)
