"""Same bits: alone or in a batch, in any chunks, at any number of stages and threads, replayed or live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mesh.types import SamplingParams
from tests.node.engine.chain import Chain

KINDS = ("llama", "qwen3", "mixtral", "gemma2", "gpt_oss")
TOKENS = 10
PARAMS = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=3)
"""Log-probabilities as floats stand for the logits' bits."""
WIDE = {"hidden_size": 448, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 7}
"""Wide enough that products are packed."""

Trace = list[tuple[int, float, tuple[tuple[int, float], ...]]]


async def _run(
    folder: Path, prompts: Sequence[Sequence[int]], cuts: Sequence[int], **config: object
) -> tuple[list[Trace], list[bytes]]:
    """Every sequence's (token, its bits, the best others' bits), and what crossed the first boundary."""
    chain = Chain(cuts, **config)
    await chain.load(folder)
    assert all(loaded.exact for engine in chain.engines for loaded in engine.loaded)
    await chain.generate(prompts, TOKENS, PARAMS)
    keys = [f"s{i}" for i in range(len(prompts))]
    traces = [
        [(r.sampled.token, r.sampled.logprob, r.sampled.top) for r in chain.results[key] if r.sampled] for key in keys
    ]
    passed = [b"".join(chain.passed[key]) for key in keys]
    await chain.stop()
    return traces, passed


@pytest.mark.parametrize("kind", [*KINDS, "wide"])
async def test_bits_do_not_depend_on_batch_chunks_stages_or_threads(
    kind: str, tiny: Callable[..., Path], prompts: list[list[int]]
) -> None:
    folder = tiny("llama", 4, num_key_value_heads=1, **WIDE) if kind == "wide" else tiny(kind)
    long = [*prompts, prompts[1] + prompts[3] + prompts[0]]  # past one page of keys
    alone = [(await _run(folder, [prompt], (0, 4)))[0][0] for prompt in (long[0], long[4])]
    batch, _ = await _run(folder, long, (0, 4))
    assert [batch[0], batch[4]] == alone
    chunks, passed = await _run(folder, long, (0, 1, 4), step_rows=40)
    assert chunks == batch
    others, again = await _run(folder, long[::-1], (0, 1, 3, 4), step_rows=26, threads=2)
    assert others[::-1] == batch
    assert again[::-1] == passed


@pytest.mark.parametrize("kind", KINDS)
async def test_a_replay_gives_the_bits_of_the_live_run(
    kind: str, tiny: Callable[..., Path], prompts: list[list[int]]
) -> None:
    """A replacement computes in one go what the lost stage had computed token by token."""
    live = Chain((0, 2, 4))
    await live.load(tiny(kind))
    await live.generate(prompts, TOKENS, PARAMS)
    trace = [r.sampled for r in live.results["s1"] if r.sampled]
    await live.stop()

    replacement = Chain((0, 2, 4))
    await replacement.load(tiny(kind))
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
