"""Which layers run in the lean form, and that a wrong guess of it is noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from node.engine.lean import LeanAttention, LeanLayer, RmsNorm
from node.engine.loading import prepare
from node.engine.span import Part

WHOLE = Part.of_span(0, 2, 2)


DTYPES = ("float32", "bfloat16", "float16")


def _lean(folder: Path, dtype: str = "float32") -> list[LeanLayer | None]:
    prepared = prepare(folder, WHOLE, dtype, "off", 1)
    assert prepared.mode == "packed"
    return [slot.lean for slot in prepared.shard._layers]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "mixtral", "qwen3_moe"])
def test_the_common_block_is_lean(kind: str, tiny: Callable[..., Path]) -> None:
    assert all(_lean(tiny(kind, 2)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "mixtral"])  # gemma's norm rounds behind its weight
def test_it_is_in_half_precision_where_it_has_the_bits_of_the_layer(
    kind: str, dtype: str, tiny: Callable[..., Path]
) -> None:
    assert all(_lean(tiny(kind, 2), dtype))


@pytest.mark.parametrize(
    ("kind", "over"),
    [
        ("gemma2", {}),  # norms behind attention and MLP
        ("granite", {"residual_multiplier": 0.5}),
        ("olmo", {"clip_qkv": 0.5}),
        ("gpt_oss", {}),  # sinks
        ("ernie4_5", {}),  # the same names, but pairs of neighbours are turned: only the numbers tell
        ("gpt_neox", {}),
    ],
)
def test_a_block_that_does_anything_else_is_not(kind: str, over: dict[str, object], tiny: Callable[..., Path]) -> None:
    assert not any(_lean(tiny(kind, 2, **over)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_guess_is_noticed(dtype: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made = LeanAttention.__init__

    def slightly_wrong(self: LeanAttention, *args: object) -> None:
        made(self, *args)  # type: ignore[arg-type]
        self.scale *= 1.01

    monkeypatch.setattr(LeanAttention, "__init__", slightly_wrong)
    assert not any(_lean(tiny("llama", 2), dtype))


class _Shifted(nn.RMSNorm):
    """Gemma's: the weight is kept less one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(x, self.normalized_shape, self.weight + 1.0, self.eps)


class _Halved(nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize("kind", [nn.RMSNorm, _Shifted])
def test_a_norm_is_recognised_by_what_it_computes(kind: type[nn.RMSNorm]) -> None:
    module = kind(48, eps=1e-6).requires_grad_(False)
    module.weight.copy_(torch.linspace(0.5, 2.0, 48))
    found = RmsNorm.of(module)
    assert found is not None
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found(x), module(x))


def test_what_computes_something_else_is_no_norm() -> None:
    assert RmsNorm.of(_Halved(48, eps=1e-6).requires_grad_(False)) is None
    assert RmsNorm.of(nn.LayerNorm(48).requires_grad_(False)) is None
    assert RmsNorm.of(nn.Linear(4, 4)) is None


@pytest.mark.parametrize("width", [16, 64, 768, 2051])
def test_a_norm_gives_a_row_the_same_bits_in_any_company(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(67, width, generator=generator)
    norm = RmsNorm(torch.rand(width, generator=generator), 1e-6)
    together = norm(x)
    for size in (1, 2, 3, 4, 5, 13):
        assert torch.equal(torch.cat([norm(rows) for rows in x.split(size)]), together)
