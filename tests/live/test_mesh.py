"""What users see of a mesh of real processes: limits, hang-ups, killed and frozen nodes, restarts, leaving."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from scripts.local_mesh import ROOT, LocalMesh, LocalNode, http_request, stream
from tests.live.conftest import tokens_of

pytestmark = pytest.mark.live

PROMPT = [(7 * i) % 253 + 3 for i in range(60)]


def body(tokens: int, **params: Any) -> dict[str, Any]:
    return {
        "model": "llama",
        "prompt": PROMPT,
        "max_tokens": tokens,
        "ignore_eos": True,
        # No node holds all the layers, and no route of one hop can be found.
        "mesh": {"max_layers": 4},
        **params,
    }


GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 11}


def read(node: LocalNode, wanted: dict[str, Any], on_text: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """The whole stream: tokens, finish reason, usage."""
    text, finish, usage, count = "", None, {}, 0
    for chunk in stream(node.api, "/v1/completions", wanted | {"stream_options": {"include_usage": True}}):
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice["text"]
            finish = choice["finish_reason"] or finish
            if choice["text"]:
                count += 1
                on_text(count)
    return {"tokens": tokens_of(text), "finish": finish, "usage": usage}


def sessions(node: LocalNode) -> dict[str, Any]:
    return dict(node.get("/mesh/status")["sessions"])


def victim_of(mesh: LocalMesh, entry: LocalNode, which: str) -> LocalNode:
    """A node of the running session's route that is not the entry."""
    status = entry.get("/mesh/status")
    names = {member["id"]: member["name"] for member in status["members"]}
    route = [names[hop["node"]] for hop in status["sessions"]["items"][0]["route"]]
    away = [name for name in (route if which == "first" else reversed(route)) if name != entry.name]
    return next(node for node in mesh.nodes if node.name == away[0])


def engines_are_idle(mesh: LocalMesh) -> bool:
    """Every node says of itself that it holds no sequence."""
    for node in mesh.nodes:
        status = node.get("/mesh/status")
        mine = next(member for member in status["members"] if member["id"] == status["node_id"])
        if mine["load"]["running"] or status["sessions"]["running"]:
            return False
    return True


@pytest.fixture(autouse=True)
def whole_again(llama_mesh: LocalMesh) -> Iterator[None]:
    """After each test, what was killed is started again with its data folder, and nothing is left behind."""
    yield
    for node in llama_mesh.nodes:
        if not node.running:
            node.start()
    llama_mesh.wait_ready()
    llama_mesh.wait_holders(2)
    llama_mesh.wait(lambda: engines_are_idle(llama_mesh), "all sequences to be freed", 70.0)


def rows_computed(mesh: LocalMesh) -> int:
    """Positions that the layers of all nodes have computed so far."""
    return int(sum(node.metric("mesh_engine_rows_total") for node in mesh.nodes))


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_prefix_that_was_computed_before_is_computed_by_no_hop_again(
    llama_mesh: LocalMesh, sampling: dict[str, Any]
) -> None:
    """Each hop computes what is behind the common pages and no more; the tokens are the same, after a kill as well."""
    entry, step = llama_mesh.nodes[0], 11 if sampling is GREEDY else 13
    wanted = body(40, prompt=[(step * i) % 249 + 3 for i in range(303)], **sampling)
    wanted["mesh"]["balance"] = "prefix_affinity"
    before = rows_computed(llama_mesh)
    quiet = read(entry, wanted)
    # Two hops; the last token is drawn and computed by none.
    llama_mesh.wait(lambda: rows_computed(llama_mesh) >= before + 2 * (303 + 39), "figures of the first run", 30.0)
    before = rows_computed(llama_mesh)
    again = read(entry, wanted)
    behind = 303 + 39 - 9 * 32
    llama_mesh.wait(lambda: rows_computed(llama_mesh) >= before + 2 * behind, "figures of the second run", 30.0)
    assert rows_computed(llama_mesh) <= before + 2 * (behind + 32)
    cached = [run["usage"]["prompt_tokens_details"]["cached_tokens"] for run in (quiet, again)]
    assert cached == [0, 9 * 32]

    def strike(count: int) -> None:
        if count == 10:
            victim_of(llama_mesh, entry, "last").kill()

    loud = read(entry, wanted, strike)
    assert len(loud["usage"]["mesh"]["recoveries"]) >= 1
    assert quiet["tokens"] == again["tokens"] == loud["tokens"]


def test_64_streams_run_the_next_wait_and_beyond_that_429(llama_mesh: LocalMesh) -> None:
    entry, wanted = llama_mesh.nodes[0], body(80, **GREEDY)
    expected = read(entry, wanted)["tokens"]
    with ThreadPoolExecutor(68) as pool:
        streams = [pool.submit(read, entry, wanted) for _ in range(68)]
        llama_mesh.wait(
            lambda: (s := sessions(entry))["running"] == 64 and s["waiting"] == 4, "64 to run and 4 to wait", 60.0
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            http_request(f"{entry.api}/v1/completions", method="POST", body=body(4))
        assert refused.value.code == 429
        assert float(refused.value.headers["Retry-After"]) > 0
        assert json.loads(refused.value.read())["error"]["code"] == "rate_limit_exceeded"
        assert all(future.result()["tokens"] == expected for future in streams)


def test_a_client_that_hangs_up_frees_its_pages(llama_mesh: LocalMesh) -> None:
    chunks = stream(llama_mesh.nodes[1].api, "/v1/completions", body(400, **GREEDY))
    next(chunks)
    assert sessions(llama_mesh.nodes[1])["running"] == 1
    began = time.monotonic()
    chunks.close()  # type: ignore[attr-defined]
    llama_mesh.wait(lambda: engines_are_idle(llama_mesh), "the session to be freed", 10.0)
    assert time.monotonic() - began < 10.0


def test_the_coordinator_dies_and_another_is_elected_while_a_stream_runs(llama_mesh: LocalMesh) -> None:
    status = llama_mesh.nodes[0].get("/mesh/status")
    names = {member["id"]: member["name"] for member in status["members"]}
    leader = next(node for node in llama_mesh.nodes if node.name == names[status["coordinator"]])
    entry = next(node for node in llama_mesh.nodes if node is not leader)
    quiet = read(entry, body(40, **GREEDY))
    done: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: done.append(read(entry, body(40, **GREEDY))))
    reader.start()
    leader.kill()
    llama_mesh.wait(
        lambda: entry.get("/mesh/status")["coordinator"] not in (None, status["coordinator"]), "a coordinator", 20.0
    )
    reader.join(60.0)
    assert done[0]["tokens"] == quiet["tokens"]


def test_a_restarted_node_comes_back_as_itself(llama_mesh: LocalMesh) -> None:
    node, other = llama_mesh.nodes[3], llama_mesh.nodes[0]
    before = node.get("/mesh/status")["node_id"]
    node.kill()
    node.start()
    llama_mesh.wait_ready()
    assert node.get("/mesh/status")["node_id"] == before
    members = [member for member in other.get("/mesh/status")["members"] if member["name"] == node.name]
    assert [member["state"] for member in members] == ["alive"]


def test_garbage_on_the_doors_changes_nothing(llama_mesh: LocalMesh) -> None:
    node = llama_mesh.nodes[0]
    host, _, port = node.peer.rpartition(":")
    for junk in (b"\0" * 2000, b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 8):
        with socket.create_connection((host, int(port)), timeout=5.0) as tcp:
            tcp.sendall(junk)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.sendto(junk[:1400], (host, int(port)))
    assert node.running
    assert read(node, body(4, **GREEDY))["finish"] == "length"


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "gone"}, 404, "model_not_found"),
        ({"max_tokens": -1}, 400, None),
        ({"prompt": [3] * 5000}, 400, "context_length_exceeded"),
        ({"prompt": [3, None]}, 400, None),
        # No node of that name will ever come up: a mistake, not a route that is missing now.
        ({"mesh": {"allowed_nodes": ["nobody"]}}, 400, "node_not_found"),
    ],
)
def test_bad_requests_get_a_clear_body(
    llama_mesh: LocalMesh, change: dict[str, Any], status: int, code: str | None
) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        http_request(f"{llama_mesh.nodes[2].api}/v1/completions", method="POST", body=body(4) | change)
    error = json.loads(refused.value.read())["error"]
    assert refused.value.code == status
    assert error["message"]
    assert code is None or error["code"] == code


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "node", *words], cwd=ROOT, capture_output=True, text=True, timeout=60.0
    )


def test_the_command_line_asks_and_administers(llama_mesh: LocalMesh) -> None:
    folder = str(llama_mesh.nodes[1].folder)
    status = json.loads(command("status", "--json", "--data-dir", folder).stdout)
    assert len(status["members"]) == 4
    assert "node-1" in command("status", "--data-dir", folder).stdout
    brief = command("token", "create", "--ttl", "0.0003", "--data-dir", folder)  # a second: expired when it is used
    made = command("token", "create", "--uses", "2", "--data-dir", folder)
    assert made.stdout.startswith("python -m node join mesh1.")
    listed = command("token", "list", "--data-dir", str(llama_mesh.nodes[2].folder)).stdout
    token_id = next(line for line in listed.splitlines() if "uses_left=2" in line).split("id=")[1].split()[0]
    assert command("token", "revoke", token_id, "--data-dir", folder).returncode == 0
    for token, why in ((made, "revoked"), (brief, "expired")):
        refused = command("join", token.stdout.split()[-1], "--role", "witness", "--listen", "127.0.0.1:0",
                          "--api", "127.0.0.1:0", "--data-dir", str(llama_mesh.folder / "stranger"))  # fmt: skip
        assert (refused.returncode, why in refused.stderr) == (2, True), refused.stderr


def test_leaving_is_no_failure(llama_mesh: LocalMesh) -> None:
    node, other = llama_mesh.nodes[2], llama_mesh.nodes[0]
    left = command("leave", "--data-dir", str(node.folder))
    assert left.returncode == 0, left.stderr
    assert node.process is not None
    assert node.process.wait(20.0) == 0
    states = {member["name"]: member["state"] for member in other.get("/mesh/status")["members"]}
    assert states[node.name] == "left"
    assert read(other, body(8, **GREEDY))["finish"] == "length"
