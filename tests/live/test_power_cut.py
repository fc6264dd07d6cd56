"""The whole mesh is killed and started again: class ``batch`` goes on where it was, with the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.local_mesh import LocalMesh, http_json
from tests.live.conftest import launch, tokens_of
from tests.live.test_entry_dies import events, text_of

pytestmark = pytest.mark.live

PROMPT = [(11 * i) % 253 + 3 for i in range(30)]
TOKENS = 300


@pytest.fixture
def mesh(models: dict[str, Path]) -> Iterator[LocalMesh]:
    with launch(3, {"llama": models["llama"]}, 0.75) as mesh:
        mesh.wait_holders(1)
        yield mesh


def body(**more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 1.0, "seed": 5,
            "mesh": {"class": "batch", "max_layers": 4, "timeout": 600}, **more}  # fmt: skip


def test_batch_goes_on_after_a_power_cut_of_all(mesh: LocalMesh) -> None:
    entry = mesh.nodes[1]
    expected = tokens_of(
        http_json(f"{entry.api}/v1/completions", method="POST", body=body(), timeout=120.0)["choices"][0]["text"]
    )
    key = {"Idempotency-Key": "power-cut"}
    stream = events(entry, "POST", "/v1/completions", body(stream=True), **key)
    session = next(stream)[1]
    journal = entry.folder / "sessions" / f"{session}.session"
    size = journal.stat().st_size  # on disk before it was accepted
    shown = [next(stream) for _ in range(20)]  # whoever reads no further holds the session where it is
    mesh.wait(lambda: journal.stat().st_size > size, "tokens on disk", 20.0)
    for node in mesh.nodes:
        node.kill()
    for node in mesh.nodes:
        node.start()
    mesh.wait_ready()
    other = mesh.nodes[2]
    path = f"/v1/sessions/{session}/events"
    mesh.wait(lambda: f"session={session}" in entry.log.read_text().split("sessions on disk")[-1], "it to go on", 60.0)
    rest = list(events(other, "GET", path, **{"Last-Event-ID": shown[-1][0]}))[1:]
    assert tokens_of(text_of(shown + rest)) == expected, "not a token twice, none missing, the same"
    again = list(events(other, "POST", "/v1/completions", body(stream=True), **key))
    assert (again[0][1], tokens_of(text_of(again[1:]))) == (session, expected), "its key is known again"
