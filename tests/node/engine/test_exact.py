"""Same bits: alone or in a batch, in any chunks, at any number of stages and threads, replayed or live."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mesh.errors import ConfigError
from mesh.types import LayerSpan, SamplingParams
from node.engine import exact, products
from node.engine.engine import Engine, EngineConfig
from node.engine.loading import prepare
from node.engine.probe import serving_dtype
from node.engine.span import Part
from tests.node.engine.chain import MODEL, Chain, info

KINDS = ("llama", "qwen3", "mixtral", "gemma2", "gpt_oss")
HALF = pytest.param(
    "bfloat16",
    marks=pytest.mark.skipif(serving_dtype() != "bfloat16", reason="nothing is served in bfloat16 by this processor"),
)
DTYPES = ("float32", HALF)
TOKENS = 7
PARAMS = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=3)
"""Log-probabilities as floats stand for the logits' bits."""
WIDE = {"hidden_size": 448, "intermediate_size": 1088, "head_dim": 64, "num_attention_heads": 7}
"""Wide enough that products are packed, and that a kernel may sum a single row's in an order of its own."""
FORMS: dict[str, dict[str, object]] = {"wide": {}, "wide, in half": {"dtype": "bfloat16"}}
"""Packed in float32 and, where the weights allow it and the machine can, in half precision."""

Trace = list[tuple[int, float, tuple[tuple[int, float], ...]]]


async def _loaded(folder: Path, cuts: Sequence[int], dtype: str, quantize: str = "", **config: object) -> Chain:
    chain = Chain(cuts, **config)
    await chain.load(folder, dtype=dtype, quantize=quantize)
    assert all(loaded.exact for engine in chain.engines for loaded in engine.loaded)
    return chain


async def _run(chain: Chain, prompts: Sequence[Sequence[int]]) -> list[Trace]:
    """Every sequence's (token, its bits, the best others' bits)."""
    await chain.generate(prompts, TOKENS, PARAMS)
    sampled = [[r.sampled for r in chain.results[f"s{i}"] if r.sampled] for i in range(len(prompts))]
    return [[(s.token, s.logprob, s.top) for s in row] for row in sampled]


def _folder(kind: str, tiny: Callable[..., Path]) -> Path:
    if kind in FORMS:
        return tiny("llama", 4, num_key_value_heads=1, **WIDE, **FORMS[kind])
    return tiny(kind.removeprefix("int8 "))


def _quantize(kind: str) -> str:
    return "int8" if kind.startswith("int8 ") else ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, *FORMS, "int8 llama", "int8 mixtral"])
async def test_bits_do_not_depend_on_batch_chunks_or_stages(
    kind: str, dtype: str, tiny: Callable[..., Path], prompts: list[list[int]]
) -> None:
    folder = _folder(kind, tiny)
    long = [*prompts, prompts[1] + prompts[3] + prompts[0]]  # past one page of keys
    whole = await _loaded(folder, (0, 4), dtype, _quantize(kind))
    batch = await _run(whole, long)
    assert [(await _run(whole, [prompt]))[0] for prompt in (long[0], long[4])] == [batch[0], batch[4]]
    await whole.stop()
    parts = await _loaded(folder, (0, 1, 3, 4), dtype, _quantize(kind), step_rows=26)
    assert (await _run(parts, long[::-1]))[::-1] == batch
    await parts.stop()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", *FORMS, "int8 llama"])
async def test_bits_do_not_depend_on_threads(
    kind: str, dtype: str, tiny: Callable[..., Path], prompts: list[list[int]]
) -> None:
    folder = _folder(kind, tiny)
    found = []
    for threads in (1, 2):
        chain = await _loaded(folder, (0, 4), dtype, _quantize(kind), threads=threads)
        found.append(await _run(chain, prompts[:2]))
        await chain.stop()
    assert found[0] == found[1]


async def test_a_broken_rule_is_noticed(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without whole fours a small model's products differ from batch to batch: the self-test must say so."""
    monkeypatch.setattr(exact, "RULES", (1,))
    monkeypatch.setattr(products, "forms_of", lambda *_: ("plain",))
    engine = Engine(EngineConfig())
    loaded = await engine.load(info(), tiny("llama"), LayerSpan(MODEL, 1, 2))
    assert not loaded.exact
    assert not engine.exact
    await engine.stop()
    strict = Engine(EngineConfig(exact="on"))
    with pytest.raises(ConfigError, match="llama: not exact"):
        await strict.load(info(), tiny("llama"), LayerSpan(MODEL, 1, 2))
    await strict.stop()


def test_a_small_model_that_is_not_exact_in_one_form_is_in_the_next(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX-512 plain products of some sizes need more rows than are worth it."""
    monkeypatch.setattr(exact, "RULES", (1,))
    found = prepare(tiny("llama"), Part.of_span(1, 2, 4), "float32", "on", 1)
    assert found.exact
    assert found.shard.form == "packed"


def test_a_row_alone_is_tried(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that has a stage to itself decodes in rows alone: a kernel of its own may be behind them."""
    right = products.Float.__call__

    def another(self: products.Float, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return right(self, x, bias) * (1 + 1e-6 * (x.numel() == x.shape[-1]))

    monkeypatch.setattr(products.Float, "__call__", another)
    monkeypatch.setattr(products, "least_rows", lambda *_: 1)
    monkeypatch.setattr(products, "forms_of", lambda *_: ("packed",))
    found = prepare(tiny("llama"), Part.of_span(1, 2, 4), "float32", "auto", 1)
    assert found.exact
    assert found.shard.multiple == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_replay_gives_the_bits_of_the_live_run(
    kind: str, dtype: str, tiny: Callable[..., Path], prompts: list[list[int]]
) -> None:
    """A replacement computes in one go what the lost stage had computed token by token."""
    live = Chain((0, 2, 4))
    await live.load(tiny(kind), dtype=dtype)
    await live.generate(prompts, TOKENS, PARAMS)
    trace = [r.sampled for r in live.results["s1"] if r.sampled]
    await live.stop()

    replacement = Chain((0, 2, 4))
    await replacement.load(tiny(kind), dtype=dtype)
    known = prompts[1] + live.drawn["s1"][:-1]
    replacement.open("again", known, PARAMS, 1)
    replacement.feed("again", 0, known, scored=True)
    await replacement.finished()
    rows = [row for result in replacement.results["again"] for row in result.prompt_logprobs]
    last = replacement.results["again"][-1].sampled
    await replacement.stop()

    assert last is not None
    assert b"".join(live.passed["s1"]) == b"".join(replacement.passed["again"])
    assert (last.token, last.logprob, last.top) == (trace[-1].token, trace[-1].logprob, trace[-1].top)
    assert rows[len(prompts[1]) - 1 :] == [(s.logprob, s.top) for s in trace[:-1]]


@pytest.mark.skipif(not products.can_halve(torch.float32, torch.device("cpu")), reason="no FBGEMM on this machine")
def test_a_layer_whose_weights_have_another_form_is_tested_by_itself(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Its kernels are others, though its modules are the same."""
    shutil.copytree(tiny("llama", 4, num_key_value_heads=1, dtype="bfloat16", **WIDE), tmp_path / "mixed")
    for file in (tmp_path / "mixed").glob("*.safetensors"):
        weights = {name: weight.float() for name, weight in load_file(file).items()}
        if (name := "model.layers.1.mlp.down_proj.weight") in weights:
            weights[name] *= 1.001  # numbers that half precision does not hold
        save_file(weights, file, {"format": "pt"})
    shard = prepare(tmp_path / "mixed", Part.of_span(0, 4, 4), "float32", "off", 1).shard
    assert exact._one_of_each_kind(shard, 0, 4) == [0, 1, 3]
