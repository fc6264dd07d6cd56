"""Greedy output through real nodes equals ``transformers`` ``generate`` on the same folder, token for token."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scripts.local_mesh import LocalMesh, http_request
from tests.live.conftest import FAMILIES, LAYERS, launch, tokens_of

pytestmark = pytest.mark.live

PROMPTS = 8
NEW_TOKENS = 24


def prompts(seed: int) -> list[list[int]]:
    """Of unequal length, some longer than a sliding window."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 256) for _ in range(rng.choice((5, 17, 40, 90)))] for _ in range(PROMPTS)]


def reference(folder: Path, wanted: list[list[int]]) -> list[list[int]]:
    """The tokens that plain transformers generates, one prompt at a time; special ones are not shown in text."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in wanted:
        ids = torch.tensor([prompt])
        drawn = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append([token for token in drawn[0, len(prompt) :].tolist() if token >= 3])
    return found


def complete(mesh: LocalMesh, index: int, model: str, prompt: list[int], max_layers: int) -> tuple[list[int], str]:
    """(tokens, route) through node ``index``."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "mesh": {"max_layers": max_layers},
    }
    node = mesh.nodes[index % len(mesh.nodes)]
    answer, headers = http_request(f"{node.api}/v1/completions", method="POST", body=body, timeout=120.0)
    return tokens_of(answer["choices"][0]["text"]), headers["x-mesh-route"]


@pytest.fixture(scope="module")
def mesh(models: dict[str, Path]) -> Iterator[LocalMesh]:
    """Four nodes that all hold all of five families; a request says how finely its route shall be split."""
    with launch(4, models, 1.3) as started:
        started.wait_holders(4)
        yield started


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_equals_generate(mesh: LocalMesh, models: dict[str, Path], family: str) -> None:
    """At 1, 2, 3 and 4 stages, eight requests at once through all the nodes."""
    wanted = prompts(FAMILIES.index(family))
    expected = reference(models[family], wanted)
    for stages in (1, 2, 3, 4):
        with ThreadPoolExecutor(PROMPTS) as pool:
            asked: list[Any] = [
                pool.submit(complete, mesh, i, family, prompt, math.ceil(LAYERS / stages))
                for i, prompt in enumerate(wanted)
            ]
            found = [future.result() for future in asked]
        assert [tokens for tokens, _ in found] == expected, stages
        assert [route.count(":") for _, route in found] == [stages] * PROMPTS
