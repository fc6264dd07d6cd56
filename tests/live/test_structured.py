"""Structured output through real nodes with the shipped model: valid, and the same after the sampler is killed.

The model is small and knows no JSON: what it writes is odd, and valid because of the masks alone.
"""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from scripts.local_mesh import ROOT, LocalMesh, LocalNode, http_json, http_request, stream

pytestmark = pytest.mark.live

SCHEMA = {
    "type": "object",
    "properties": {
        "story": {"type": "string", "minLength": 30, "maxLength": 60},
        "mood": {"enum": ["calm", "wild"]},
        "stars": {"type": "array", "items": {"enum": [1, 2, 3, 4, 5]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["story", "mood", "stars"],
    "additionalProperties": False,
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "review", "strict": True, "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "rate", "strict": True, "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def mesh() -> Iterator[LocalMesh]:
    with LocalMesh(3, [str(ROOT / "models" / "demo")], flags=["--memory", "512MiB"]) as running:
        running.wait_holders(3)
        yield running


def body(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What colour is the sky?"}]
    wanted = {"model": "demo", "messages": messages, "max_tokens": 600, "temperature": 1.0, "mesh": {"max_layers": 4}}
    return {**wanted, **more}


def chat(node: LocalNode, **more: Any) -> dict[str, Any]:
    answer = http_json(f"{node.api}/v1/chat/completions", method="POST", body=body(**more), timeout=120.0)
    return dict(answer["choices"][0])


def sampler_of(mesh: LocalMesh, entry: LocalNode) -> LocalNode:
    status = entry.get("/mesh/status")
    names = {member["id"]: member["name"] for member in status["members"]}
    last = names[status["sessions"]["items"][0]["route"][-1]["node"]]
    return next(node for node in mesh.nodes if node.name == last)


def test_answers_are_valid_wherever_they_enter(mesh: LocalMesh) -> None:
    for seed, node in enumerate(mesh.nodes):
        choice = chat(node, response_format=FORMAT, seed=seed)
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        (call,) = chat(node, tools=[TOOL], tool_choice="required", seed=seed)["message"]["tool_calls"]
        assert call["function"]["name"] == "rate"
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    free = chat(mesh.nodes[0], response_format={"type": "json_object"}, temperature=0, max_tokens=30)
    assert free["finish_reason"] == "length" or isinstance(json.loads(free["message"]["content"]), dict)
    cut = chat(mesh.nodes[0], response_format=FORMAT, max_tokens=12)
    assert cut["finish_reason"] == "length"
    assert cut["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}, "response_format"),
        ({"mesh": {"allowed_nodes": ["nobody"]}}, "mesh.allowed_nodes"),
        ({"logit_bias": {"1024": 1}}, "logit_bias"),
        ({"stop_token_ids": [1024]}, "stop_token_ids"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(mesh: LocalMesh, change: dict[str, Any], param: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        http_request(f"{mesh.nodes[1].api}/v1/chat/completions", method="POST", body=body(**change))
    assert refused.value.code == 400
    assert json.loads(refused.value.read())["error"]["param"] == param


def test_the_killed_samplers_substitute_draws_the_same_under_the_same_masks(mesh: LocalMesh) -> None:
    """Last: it leaves the mesh with a node less."""
    entry, others = mesh.nodes[0], [node.name for node in mesh.nodes[1:]]
    away = {"allowed_nodes": others}  # the sampler is another process than the entry
    wanted = {"response_format": FORMAT, "seed": 11, "stream": True, "mesh": away}
    struck: list[LocalNode] = []
    texts: list[str] = []
    for kill in (False, True):
        text = ""
        for chunk in stream(entry.api, "/v1/chat/completions", body(**wanted)):
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
            if kill and not struck and len(text) > 25:
                struck.append(sampler_of(mesh, entry))
                struck[0].kill()
        texts.append(text)
    assert struck
    assert texts[1] == texts[0]
    jsonschema.validate(json.loads(texts[1]), SCHEMA)
