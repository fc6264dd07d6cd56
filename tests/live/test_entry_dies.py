"""Real processes: the node that a client is connected to is killed or frozen, and its stream goes on elsewhere."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import signal
import threading
import time
import urllib.error
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from client import MeshClient
from scripts.local_mesh import LocalMesh, LocalNode, http_json
from tests.live.conftest import tokens_of

pytestmark = pytest.mark.live

PROMPT = [(7 * i) % 253 + 3 for i in range(40)]
GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 11}
TOKENS = 240
"""So many that a reader on a slow machine is not yet behind the end of them all when it strikes."""


def asked(**params: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "mesh": {"max_layers": 4}, **params}


@pytest.fixture(autouse=True)
def whole_again(llama_mesh: LocalMesh) -> Iterator[None]:
    yield
    for node in llama_mesh.nodes:
        node.signal(signal.SIGCONT)
        if not node.running:
            node.start()
    llama_mesh.wait_ready()
    llama_mesh.wait_holders(2)


def client_of(mesh: LocalMesh, entry: LocalNode) -> MeshClient:
    """A client that asks ``entry`` first and knows the others."""
    client = MeshClient([entry.api], patience_s=30.0)
    client._client.nodes.learn([node.api for node in mesh.nodes], entry.api)
    for node in mesh.nodes:
        if node is not entry:
            client._client.nodes.began(node.api)
    return client


def place_of(entry: LocalNode, route: str) -> str:
    """Where ``entry`` stands on the route that a response named."""
    names = [hop.split(":")[0] for hop in route.split(",")]
    if entry.name not in names:
        return "pure"
    return "first" if names[0] == entry.name else "sampler" if names[-1] == entry.name else "middle"


def others(mesh: LocalMesh, place: str, entry: LocalNode) -> dict[str, Any]:
    """Nodes that a route may use, so that ``entry`` may only be where ``place`` says."""
    names = [node.name for node in mesh.nodes if node is not entry]
    return {"max_layers": 4, "allowed_nodes": names} if place == "pure" else {"max_layers": 4}


def struck(mesh: LocalMesh, entry: LocalNode, body: dict[str, Any], number: signal.Signals) -> dict[str, Any]:
    """The stream with ``entry`` struck at its tenth piece: text, pause, where it was, what was told."""
    with client_of(mesh, entry) as client:
        stream = client.complete(body["prompt"], stream=True, **{k: v for k, v in body.items() if k != "prompt"})
        text, usage, count, longest, last = "", None, 0, 0.0, time.monotonic()
        for piece in stream:
            now = time.monotonic()
            longest, last = max(longest, now - last if count >= 10 else 0.0), now
            text, usage = text + piece.text, piece.usage or usage
            count += bool(piece.text)
            if count == 10 and piece.text:
                entry.signal(number)
                last = time.monotonic()
                if number is signal.SIGSTOP:
                    threading.Timer(4.0, entry.signal, [signal.SIGCONT]).start()
        progress = stream.progress
    recoveries = usage.recoveries if usage is not None else ()
    return {"tokens": tokens_of(text), "pause_s": longest, "route": progress.route, "recoveries": recoveries,
            "moves": progress.moves}  # fmt: skip


def quiet(mesh: LocalMesh, entry: LocalNode, body: dict[str, Any]) -> list[int]:
    """The tokens of an undisturbed run.  Just after a node came back layers may be on the move: 503, ask again."""
    answers: list[Any] = []

    def answered() -> bool:
        try:
            answers.append(http_json(f"{entry.api}/v1/completions", method="POST", body=body, timeout=60.0))
        except urllib.error.HTTPError as refused:
            if refused.code != 503:
                raise
        return bool(answers)

    mesh.wait(answered, "a route", 60.0)
    return tokens_of(answers[0]["choices"][0]["text"])


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("at", [0, 1])
def test_the_entry_is_killed(llama_mesh: LocalMesh, sampling: dict[str, Any], at: int, record_property: Any) -> None:
    """Over several nodes in turn the entry is sometimes hop 0, sometimes the sampler; ``at`` 1 is a pure entry."""
    entry = llama_mesh.nodes[at]
    body = asked(**sampling, mesh=others(llama_mesh, "pure" if at == 1 else "any", entry))
    expected = quiet(llama_mesh, entry, body)
    found = struck(llama_mesh, entry, body, signal.SIGKILL)
    print(f"{place_of(entry, found['route'])} entry killed: pause {found['pause_s']:.2f} s, {found['recoveries']}")
    assert found["tokens"] == expected
    assert found["moves"] >= 1
    assert found["recoveries"][0]["cause"] == "owner lost"


def test_the_entry_freezes_and_wakes(llama_mesh: LocalMesh) -> None:
    entry = llama_mesh.nodes[2]
    body = asked(**GREEDY, mesh=others(llama_mesh, "pure", entry))
    expected = quiet(llama_mesh, entry, body)
    found = struck(llama_mesh, entry, body, signal.SIGSTOP)
    print(f"entry frozen for 4 s: pause {found['pause_s']:.2f} s, {found['recoveries']}")
    assert found["tokens"] == expected


def events(node: LocalNode, method: str, path: str, body: Any = None, **headers: str) -> Iterator[tuple[str, Any]]:
    """(id, data) of a stream, by nothing but HTTP."""
    url = urlsplit(node.api)
    connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=30.0)
    connection.request(
        method, path, json.dumps(body) if body else None, {"Content-Type": "application/json", **headers}
    )
    response = connection.getresponse()
    assert response.status == 200, response.read()
    yield "session", response.headers["x-mesh-session"]
    name = ""
    while line := response.readline():
        if line.startswith(b"id: "):
            name = line[4:].strip().decode()
        elif line.startswith(b"data: ") and b"[DONE]" not in line:
            yield name, json.loads(line[6:])
    connection.close()


def text_of(found: list[tuple[str, Any]]) -> str:
    return "".join(choice["text"] for _, chunk in found for choice in chunk["choices"])


def test_a_plain_http_client_goes_on_by_last_event_id(llama_mesh: LocalMesh) -> None:
    entry, other = llama_mesh.nodes[3], llama_mesh.nodes[0]
    body = asked(**GREEDY, mesh=others(llama_mesh, "pure", entry))
    expected = quiet(llama_mesh, entry, body)
    session, got = "", []
    with contextlib.suppress(OSError, http.client.HTTPException):
        for name, chunk in events(entry, "POST", "/v1/completions", body | {"stream": True}):
            if name == "session":
                session = chunk
                continue
            got.append((name, chunk))
            if len(got) == 10:
                entry.kill()
    assert tokens_of(text_of(got)) != expected
    path = f"/v1/sessions/{session}/events"
    rest = list(events(other, "GET", path, **{"Last-Event-ID": got[-1][0]}))[1:]
    assert tokens_of(text_of(got + rest)) == expected
    again = list(events(llama_mesh.nodes[1], "GET", path))[1:]
    assert tokens_of(text_of(again)) == expected, "what has ended can be read again"


def test_a_repeated_post_attaches(llama_mesh: LocalMesh) -> None:
    key, body = secrets.token_hex(8), asked(temperature=1.0, stream=True)
    one = list(events(llama_mesh.nodes[0], "POST", "/v1/completions", body, **{"Idempotency-Key": key}))
    two = list(events(llama_mesh.nodes[1], "POST", "/v1/completions", body, **{"Idempotency-Key": key}))
    assert one[0] == two[0], "the same session"
    assert text_of(one[1:]) == text_of(two[1:]) != ""
    with pytest.raises(AssertionError, match="Idempotency-Key"):
        list(
            events(llama_mesh.nodes[2], "POST", "/v1/completions", body | {"max_tokens": 5}, **{"Idempotency-Key": key})
        )
