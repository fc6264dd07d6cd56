"""What the other tests show on the CPU, on a GPU: the tokens of transformers, torch's kernel over pages, graphs, bits
that keep their promise, and pinned memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import masking_utils

from node.engine import holding
from node.engine.attention import MaskRule
from node.engine.engine import Engine, EngineConfig
from node.engine.graphs import Graphs, Outcome, capture_on
from node.engine.loading import prepare
from node.engine.span import Part
from node.engine.transfer import host_empty, to_host
from tests.node.engine.chain import Chain
from tests.node.engine.test_graphs import follow
from tests.node.engine.test_paged import STEPS, both

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: nothing of this has run"),
]
DEVICE = "cuda:0"
KINDS = ("llama", "qwen3", "gemma2", "gpt_oss", "mixtral")
HALVES = (torch.bfloat16, torch.float16)
LONG = [*STEPS, [(0, 1500), (1, 700)], [(0, 1), (1, 1), (2, 1), (3, 3)], [(i, 1) for i in range(4)]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(0, 4), (0, 2, 4)])
async def test_the_same_tokens_as_generate(
    tiny: Callable[..., Path],
    prompts: list[list[int]],
    expected: Callable[[str], list[list[int]]],
    kind: str,
    cuts: tuple[int, ...],
) -> None:
    """In float32, which torch's paged kernel does not take: over pages, written out."""
    chain = Chain(cuts, device=DEVICE, exact="off")
    await chain.load(tiny(kind))
    assert await chain.generate(prompts) == expected(kind)
    await chain.stop()  # what was closed is closed on the device's thread, too
    for engine in chain.engines:
        engine.assert_idle()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", [0, 7, 300])
def test_the_kernel_over_pages(dtype: torch.dtype, size: int, window: int) -> None:
    rule = MaskRule(masking_utils.sliding_window_causal_mask_function(window)) if window else None
    both(LONG, rule, torch.device(DEVICE), dtype, size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_steps_by_graphs(tiny: Callable[..., Path], dtype: str) -> None:
    shard = prepare(tiny("llama", dtype=dtype), Part.of_span(0, 4, 4), dtype, "off", 1, "", DEVICE).shard
    capture = capture_on(shard.device)
    assert capture is not None
    follow(shard, capture)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
async def test_an_engine_decodes_by_graphs(
    tiny: Callable[..., Path], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The hidden states of one run with graphs and one without, token for token as far as the tokens agree."""
    runs: list[bool] = []
    run = Graphs.run

    def noted(self: Graphs, *args: object) -> Outcome | None:
        outcome = run(self, *args)  # type: ignore[arg-type]
        runs.append(outcome is not None)
        return outcome

    monkeypatch.setattr(Graphs, "run", noted)
    found = []
    for wanted in (True, False):
        if not wanted:
            monkeypatch.setattr(holding, "capture_on", lambda device: None)
        chain = Chain((0, 2, 4), device=DEVICE, exact="off")
        await chain.load(tiny(kind, dtype="bfloat16"), dtype="bfloat16")
        for _ in range(2):
            tokens = await chain.generate(prompts[:1])
        found.append((tokens[0], torch.frombuffer(bytearray(b"".join(chain.passed["s0"])), dtype=torch.bfloat16)))
        await chain.stop()
    assert any(runs)
    (tokens, hidden), (other_tokens, other) = found
    same = next((i for i, (a, b) in enumerate(zip(tokens, other_tokens, strict=True)) if a != b), len(tokens))
    rows = 64 * (len(prompts[0]) + same)
    assert same > 0
    assert torch.allclose(hidden[:rows].float(), other[:rows].float(), atol=0.05 * float(other.float().abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_who_says_exact_gives_the_same_bits_in_any_company(
    tiny: Callable[..., Path], prompts: list[list[int]], dtype: str
) -> None:
    """Where the self-test finds no rule, nothing is advertised: then only the hardware class is looked at."""
    chain = Chain((0, 2, 4), device=DEVICE, exact="auto")
    await chain.load(tiny("llama", dtype=dtype), dtype=dtype)
    assert chain.engines[0].hardware.startswith(torch.device(DEVICE).type + "/")
    if all(engine.exact for engine in chain.engines):
        alone = await chain.generate(prompts[:1])
        bits = b"".join(chain.passed["s0"])
        for _ in range(2):  # the second time by graphs
            assert (await chain.generate(prompts))[:1] == alone
            assert b"".join(chain.passed["s0"]) == bits
    await chain.stop()


def test_pinned_memory_is_not_used_again_before_it_was_copied() -> None:
    device, shape = torch.device(DEVICE), (1 << 20,)
    assert host_empty(shape, torch.float32, device).is_pinned()
    there = []
    for number in range(200):
        here = host_empty(shape, torch.float32, device)
        here.fill_(float(number))
        there.append(here.to(device, non_blocking=True))
        del here
    for number, tensor in enumerate(there):
        back = to_host(tensor)
        assert back.is_pinned()
        assert back.unique().tolist() == [float(number)]


async def test_engines_on_every_device_make_one_chain(
    tiny: Callable[..., Path], prompts: list[list[int]], expected: Callable[[str], list[list[int]]]
) -> None:
    """One engine a device, as one node a device in a mesh."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"{count} CUDA device here, two are wanted")
    engines = [Engine(EngineConfig(device=f"cuda:{i}", exact="off")) for i in range(2)]
    chain = Chain((0, 2, 4), engines)
    await chain.load(tiny("llama"))
    assert await chain.generate(prompts) == expected("llama")
    await chain.stop()
