"""What the other tests show on the CPU, on a GPU: the same tokens as transformers, and bits that keep their promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.node.engine.chain import Chain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: nothing of this has run"),
]
KINDS = ("llama", "qwen3", "gemma2", "gpt_oss", "mixtral")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(0, 4), (0, 2, 4)])
async def test_the_same_tokens_as_generate(
    tiny: Callable[..., Path],
    prompts: list[list[int]],
    expected: Callable[[str], list[list[int]]],
    kind: str,
    cuts: tuple[int, ...],
) -> None:
    chain = Chain(cuts, device="cuda:0", exact="off")
    await chain.load(tiny(kind))
    assert await chain.generate(prompts) == expected(kind)
    for engine in chain.engines:
        engine.assert_idle()
    await chain.stop()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_who_says_exact_gives_the_same_bits_in_any_company(
    tiny: Callable[..., Path], prompts: list[list[int]], dtype: str
) -> None:
    """Where the self-test finds no rule, nothing is advertised: then only the hardware class is looked at."""
    chain = Chain((0, 2, 4), device="cuda:0", exact="auto")
    await chain.load(tiny("llama", dtype=dtype), dtype=dtype)
    assert chain.engines[0].hardware.startswith("cuda/")
    if all(engine.exact for engine in chain.engines):
        alone = await chain.generate(prompts[:1])
        bits = b"".join(chain.passed["s0"])
        assert (await chain.generate(prompts))[:1] == alone
        assert b"".join(chain.passed["s0"]) == bits
    await chain.stop()


async def test_engines_on_every_device_make_one_chain(
    tiny: Callable[..., Path], prompts: list[list[int]], expected: Callable[[str], list[list[int]]]
) -> None:
    """One engine a device, as one node a device in a mesh."""
    from node.engine.engine import Engine, EngineConfig

    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"{count} CUDA device here, two are wanted")
    engines = [Engine(EngineConfig(device=f"cuda:{i}", exact="off")) for i in range(2)]
    chain = Chain((0, 2, 4), engines)
    await chain.load(tiny("llama"))
    assert await chain.generate(prompts) == expected("llama")
    await chain.stop()
