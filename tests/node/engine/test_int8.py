"""Weights in 8 bits: how far they are from the weights, what they take, and that rows do not feel their company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mesh.types import LayerSpan, SamplingParams
from node.engine.engine import Engine, EngineConfig
from node.engine.int8 import Int8, Int8Embedding, can_quantize, quantize
from tests.node.engine.chain import MODEL, Chain, info


def weights(out: int, width: int) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(out)) * 0.05


@pytest.mark.parametrize("shape", [(96, 64), (257, 448), (5000, 32)])
def test_a_weight_is_kept_to_half_a_step_of_its_channel(shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    whole, scales = quantize(weight)
    step = scales.float()[:, None]
    assert ((whole.float() * step - weight).abs() <= 0.51 * step + 0.004 * weight.abs()).all()
    assert (step[:, 0] <= weight.abs().amax(1) / 127 * 1.01).all()


def test_a_channel_of_zeros_stays_zero() -> None:
    assert not Int8(torch.zeros(4, 64)).dense().any()


@pytest.mark.parametrize("shape", [(96, 64), (257, 448), (2048, 768)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_company(shape: tuple[int, int], threads: int) -> None:
    product, rows = Int8(weights(*shape)), torch.randn(67, shape[1])
    torch.set_num_threads(1)
    alone = torch.cat([product(row[None], None) for row in rows])
    torch.set_num_threads(threads)
    try:
        for n in (1, 2, 3, 4, 5, 7, 8, 16, 31, 67):
            assert torch.equal(torch.cat([product(part, None) for part in rows.split(n)]), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_weight_as_kept(dtype: torch.dtype) -> None:
    product, x, bias = Int8(weights(96, 64).to(dtype)), torch.randn(2, 3, 64).to(dtype), torch.randn(96).to(dtype)
    expected = x.bfloat16().float() @ product.dense().float().t() + bias.float()
    found = product(x, bias)
    assert found.shape == (2, 3, 96)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.01 * expected.abs().max()


def test_widths_that_the_kernel_cannot_read_are_left_alone() -> None:
    assert not can_quantize(torch.randn(8, 40))
    assert can_quantize(torch.randn(8, 96))


class Scaled(nn.Embedding):
    """As some families have it."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 8.0


@pytest.mark.parametrize(("kind", "factor"), [(nn.Embedding, 1.0), (Scaled, 8.0)])
def test_an_embedding_looks_up_its_rows(kind: type[nn.Embedding], factor: float) -> None:
    inner = kind(300, 64, padding_idx=0).requires_grad_(False)
    small = Int8Embedding(inner)
    ids = torch.tensor([[5, 299, 0], [7, 5, 1]])
    assert torch.equal(small(ids), small.weight[ids] * factor)
    assert small(ids).shape == (2, 3, 64)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "mixtral", "gpt_oss"])
async def test_a_quantized_model_says_nearly_what_it_said(
    kind: str, tiny: Callable[..., Path], prompts: list[list[int]]
) -> None:
    """Log-probabilities of the prompt's tokens, two stages, against the same engine unquantized."""
    found = []
    for form in ("", "int8"):
        chain = Chain((0, 2, 4))
        await chain.load(tiny(kind), quantize=form)
        await chain.generate(prompts, 2, SamplingParams(temperature=0.0, max_tokens=2, logprobs=0), scored=True)
        found.append([score for i in range(4) for r in chain.results[f"s{i}"] for score, _ in r.prompt_logprobs])
        await chain.stop()
    plain, small = torch.tensor(found)
    assert plain.shape == (sum(map(len, prompts)) - len(prompts),)
    # The median: a near tie in a router picks another expert, which no precision prevents.
    assert (plain - small).abs().median() < 0.05 * plain.std()
    assert not torch.equal(plain, small)


async def test_weights_take_half_of_bfloat16(tiny: Callable[..., Path]) -> None:
    folder = tiny("llama", 4, hidden_size=256, intermediate_size=512, vocab_size=1024, head_dim=64)
    engine = Engine(EngineConfig(exact="off"))
    await engine.load(info(quantize="int8"), folder, LayerSpan(MODEL, 0, 4))
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))  # float32
    assert engine.stats().weight_bytes <= 0.55 * stored / 2
    await engine.stop()
