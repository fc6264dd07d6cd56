"""Greedy tokens of chained engines equal those of transformers' own ``generate``, whatever the kind and the cuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.node.engine.chain import Chain

PACKED = (
    *("llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "mixtral", "phi3", "gpt_oss", "qwen3_moe"),
    *("mistral", "olmo2", "gpt_neox"),
)
COMPAT = ("bloom", "falcon", "trocr")


@pytest.mark.parametrize("cuts", [(0, 4), (0, 2, 4), (0, 1, 3, 4)], ids=["1 stage", "2 stages", "3 stages"])
@pytest.mark.parametrize("kind", PACKED + COMPAT)
async def test_tokens_equal_those_of_transformers(
    kind: str,
    cuts: tuple[int, ...],
    tiny: Callable[..., Path],
    prompts: list[list[int]],
    expected: Callable[[str], list[list[int]]],
) -> None:
    chain = Chain(cuts, step_rows=48, exact="off")  # less than the longest prompt: chunks beside single rows
    await chain.load(tiny(kind))
    assert {loaded.mode for e in chain.engines for loaded in e.loaded} == {"packed" if kind in PACKED else "compat"}
    assert await chain.generate(prompts) == expected(kind)
    await chain.stop()
    for engine in chain.engines:
        engine.assert_idle()
