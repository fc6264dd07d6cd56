"""Is what chained engines compute what the model itself computes?  One comparison for every architecture.

The truth is transformers' own forward of the whole model over the whole text, without any cache: its greedy tokens, and
the log-probability of every token of the text.  The engines get all prompts at once, in chunks beside single rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from mesh.errors import ConfigError
from mesh.types import SamplingParams
from tests.node.engine.chain import Chain
from tests.tiny_models import VOCABULARY

LENGTHS = (23, 70, 5, 41)
"""Of the prompts: below and beyond the tiny models' windows of 24 positions."""
STEP_ROWS = 48
"""Less than the longest prompt: chunks go beside single rows."""
TOKENS = 6
CLOSE = 5e-3
"""Largest difference of a log-probability that float32 and another order of summation may make in these models."""
SCORED = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=0)


class Truth(msgspec.Struct, frozen=True):
    """What transformers makes of one prompt."""

    prompt: list[int]
    drawn: list[int]
    scores: list[float]
    """Log-probability of every token of prompt and continuation but the first."""
    doubt: float
    """The smallest lead of a drawn token over the next best one, in logits: below 1e-3 it is a toss-up."""


class Verdict(msgspec.Struct, frozen=True):
    """What the engines made of it, at one way of cutting the model."""

    mode: str
    """``packed``, ``compat`` or ``refused``."""
    wrong: str = ""
    """What is wrong; empty: all is well."""
    error: float = 0.0
    """Largest difference of a log-probability."""
    reason: str = ""
    """Why it is not packed."""


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


@torch.inference_mode()
def find_truth(folder: Path, prompts: Sequence[Sequence[int]]) -> list[Truth]:
    """The model's own greedy continuations (EOS ignored, as the engine leaves it to the session) and scores."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from node.engine.span import read_config

    config = read_config(folder)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = kind.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager").eval()
    return [_continue(model, list(prompt)) for prompt in prompts]


def _continue(model: object, prompt: list[int]) -> Truth:
    text, doubt = list(prompt), float("inf")
    for _ in range(TOKENS):
        best = _logits(model, text)[-1].topk(2)
        doubt = min(doubt, float(best.values[0] - best.values[1]))
        text.append(int(best.indices[0]))
    scores = _logits(model, text)[:-1].log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    return Truth(prompt, text[len(prompt) :], scores.tolist(), doubt)


def _logits(model: object, text: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([text]), use_cache=False).logits[0].float()  # type: ignore[operator,no-any-return]


async def compare(folder: Path, truths: Sequence[Truth], cuts: Sequence[int]) -> Verdict:
    """Engines in a row over ``cuts`` against the truth."""
    chain = Chain(cuts, step_rows=STEP_ROWS, exact="off")
    try:
        await chain.load(folder, cuts[-1])
        modes = {loaded.mode for engine in chain.engines for loaded in engine.loaded}
        mode = "packed" if modes == {"packed"} else "compat"
        reason = next((loaded.why for engine in chain.engines for loaded in engine.loaded if loaded.why), "")
        drawn, scores = await _run(chain, truths)
    except ConfigError as error:
        return Verdict("refused", reason=str(error))
    finally:
        await chain.stop()
    for engine in chain.engines:
        engine.assert_idle()
    return msgspec.structs.replace(_judge(mode, truths, drawn, scores), reason=reason)


async def _run(chain: Chain, truths: Sequence[Truth]) -> tuple[list[list[int]], list[list[float]]]:
    drawn = await chain.generate([t.prompt for t in truths], TOKENS, SCORED, scored=True)
    scores = []
    for i in range(len(truths)):
        results = chain.results[f"s{i}"]
        prompt = [score for r in results for score, _ in r.prompt_logprobs]
        scores.append(prompt + [r.sampled.logprob for r in results if r.sampled])
    return drawn, scores


def _judge(mode: str, truths: Sequence[Truth], drawn: list[list[int]], scores: list[list[float]]) -> Verdict:
    error = 0.0
    for truth, tokens, found in zip(truths, drawn, scores, strict=True):
        same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, truth.drawn, strict=True)))
        known = len(truth.prompt) - 1 + len(same)
        if len(found) != len(truth.scores):
            return Verdict(mode, f"{len(found)} scores of {len(truth.scores)} tokens")
        error = max([error, *(abs(a - b) for a, b in zip(found[:known], truth.scores[:known], strict=True))])
        if len(same) < len(tokens) and truth.doubt > 1e-3:
            return Verdict(mode, f"other tokens from number {len(same)} on", error)
    return Verdict(mode, "" if error <= CLOSE else f"log-probabilities differ by {error:.1e}", error)
