"""The sampler: the right distribution, the same token in any batch, and penalties as a plain reference has them."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch

from mesh.types import SamplingParams
from node.engine.sampler import Row, draw, score, uniform

PLAIN = SamplingParams(temperature=1.0)


def one(logits: torch.Tensor, params: SamplingParams, position: int = 7, **row: object) -> int:
    return draw(logits[None], [Row(params, position, **row)])[0].token  # type: ignore[arg-type]


def counts_of(logits: torch.Tensor, params: SamplingParams, draws: int = 4000) -> torch.Tensor:
    rows = [Row(params, position) for position in range(draws)]
    tokens = [s.token for s in draw(logits.expand(draws, -1), rows)]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[0])


def chi_square(counts: torch.Tensor, chances: torch.Tensor) -> float:
    expected = chances * counts.sum()
    used = expected > 0
    assert not counts[~used].any(), "a token was drawn that may not be"
    return float(((counts[used] - expected[used]) ** 2 / expected[used]).sum())


def limit(kinds: int) -> float:
    """Chi-square's 99.9 % point, about (Wilson and Hilferty)."""
    df = kinds - 1
    return df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3


def test_uniform_is_uniform_over_positions_and_seeds() -> None:
    for numbers in ([uniform(42, p) for p in range(4000)], [uniform(s, 3) for s in range(4000)]):
        counts = torch.bincount((torch.tensor(numbers) * 20).long(), minlength=20)
        assert chi_square(counts, torch.full((20,), 1 / 20)) < limit(20)
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)
    assert 0 <= min(uniform(s, s) for s in range(1000)) < max(uniform(s, s) for s in range(1000)) < 1


@pytest.mark.parametrize("vocabulary", [24, 600])
def test_tokens_are_drawn_as_often_as_softmax_says(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(vocabulary, generator=generator)
    params = SamplingParams(temperature=0.7, seed=9)
    chances = (logits / 0.7).softmax(-1)
    if vocabulary > 256:  # rare tokens in one class, for the test's own sake
        top = chances.argsort(descending=True)
        counts = counts_of(logits, params)[top]
        chances, counts = chances[top], counts
        chances = torch.cat([chances[:60], chances[60:].sum()[None]])
        counts = torch.cat([counts[:60], counts[60:].sum()[None]])
        assert chi_square(counts, chances) < limit(61)
    else:
        assert chi_square(counts_of(logits, params), chances) < limit(vocabulary)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(temperature=1.0, top_k=3), 3),
        (SamplingParams(temperature=1.0, top_p=0.6), 2),  # .5 is short of .6, .5 + .25 is not
        (SamplingParams(temperature=1.0, top_p=0.01), 1),
        (SamplingParams(temperature=1.0, min_p=0.2), 3),  # at least a fifth of .5
        (SamplingParams(temperature=1.0, top_k=4, top_p=0.9, min_p=0.01), 4),
    ],
)
def test_cuts_keep_the_most_likely_and_their_proportions(params: SamplingParams, kept: int) -> None:
    chances = torch.tensor([0.03125, 0.5, 0.0625, 0.25, 0.125, 0.03125])
    order = chances.argsort(descending=True)[:kept]
    allowed = torch.zeros(6)
    allowed[order] = chances[order] / chances[order].sum()
    assert chi_square(counts_of(chances.log(), params), allowed) < (limit(kept) if kept > 1 else 1e-6)


def test_a_cut_past_the_first_tokens_sorts_the_row_whole() -> None:
    """Flat over 1,000 tokens: the nucleus of one half is 500 wide."""
    logits = torch.linspace(1e-3, 0, 1000)
    counts = counts_of(logits, SamplingParams(temperature=1.0, top_p=0.5), draws=1500)
    assert not counts[505:].any()
    assert counts[256:495].sum() > 500


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 700, generator=generator) * 2
    rows = [
        Row(
            SamplingParams(
                temperature=(0.0, 0.5, 1.3)[i % 3],
                top_k=(0, 40, 300)[i % 3],
                top_p=(1.0, 0.9, 0.999)[i // 3 % 3],
                min_p=0.01 * (i % 2),
                frequency_penalty=0.3 * (i % 2),
                repetition_penalty=1.2 if i % 4 == 1 else 1.0,
                seed=i,
                logprobs=i % 3 - 1,
            ),
            position=20 + i,
            tokens=list(range(i, i + 20)),
        )
        for i in range(12)
    ]
    together = draw(logits, rows)
    assert together == [draw(logits[i : i + 1], [rows[i]])[0] for i in range(12)]
    assert together == draw(logits.flip(0), rows[::-1])[::-1]


def test_temperature_0_is_greedy() -> None:
    assert one(torch.tensor([0.1, 3.0, 2.9]), SamplingParams(temperature=0.0)) == 1


def reference(logits: list[float], tokens: list[int], prompt: int, p: SamplingParams) -> list[float]:
    """Penalties, word by word."""
    made = list(logits)
    for token in set(tokens):
        made[token] = made[token] / p.repetition_penalty if made[token] > 0 else made[token] * p.repetition_penalty
    for token in set(tokens[prompt:]):
        made[token] -= p.frequency_penalty * tokens[prompt:].count(token) + p.presence_penalty
    for token, bias in p.logit_bias.items():
        made[token] += bias
    return made


def test_penalties_equal_a_plain_reference() -> None:
    generator = torch.Generator().manual_seed(2)
    base = SamplingParams(temperature=0.0)
    for case in range(60):
        logits = torch.randn(20, generator=generator) * 2
        tokens = torch.randint(0, 20, (12,), generator=generator).tolist()
        values = torch.rand(3, generator=generator).tolist()
        params = msgspec.structs.replace(
            base,
            presence_penalty=values[0] * 2 - 1,
            frequency_penalty=values[1] * 2 - 1,
            repetition_penalty=0.5 + values[2],
            logit_bias={case % 20: 1.5},
        )
        made = reference(logits.tolist(), tokens, 5, params)
        found = one(logits, params, 12, tokens=tokens, prompt_length=5)
        assert made[found] == pytest.approx(max(made), abs=1e-5)


def test_a_banned_token_is_not_drawn_and_a_biased_one_is() -> None:
    logits = torch.tensor([5.0, 4.0, 3.0])
    assert one(logits, SamplingParams(temperature=0.0, logit_bias={0: -100.0})) == 1
    assert one(logits, SamplingParams(temperature=1.0, logit_bias={2: 100.0})) == 2
    assert one(logits, SamplingParams(temperature=0.0, logit_bias={99999: 100.0})) == 0


def test_stop_tokens_wait_for_min_tokens() -> None:
    params = SamplingParams(temperature=0.0, stop_token_ids=(0,), min_tokens=3)
    logits = torch.tensor([5.0, 4.0, 3.0])
    assert [one(logits, params, 10 + i, prompt_length=10) for i in range(5)] == [1, 1, 1, 0, 0]


def test_a_grammars_mask_is_obeyed() -> None:
    allowed = torch.tensor([False, False, True])
    for params in (PLAIN, SamplingParams(temperature=0.0), SamplingParams(top_k=2, logit_bias={0: 100.0})):
        row = Row(params, 4, [1, 2, 8, 9], 2, allowed)
        assert draw(torch.tensor([[9.0, 9.0, -9.0]]), [row])[0].token == 2


def test_what_a_mask_forbids_is_never_drawn() -> None:
    """Among many tokens, with the number drawn at the very end of the sums as well."""
    logits = torch.randn(600, generator=torch.Generator().manual_seed(8)) * 4
    allowed = torch.zeros(600, dtype=torch.bool)
    allowed[::40] = True
    for params in (SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.9), SamplingParams(seed=3, top_k=300)):
        rows = [Row(params, position, allowed=allowed) for position in range(2000)]
        assert all(s.token % 40 == 0 for s in draw(logits.expand(2000, -1), rows))


def test_a_masked_row_is_drawn_by_its_own_chances(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([3.0, 1.0, 2.0, 0.5])
    allowed = torch.tensor([False, True, False, True])
    rows = [Row(PLAIN, position, allowed=allowed) for position in range(4000)]
    counts = torch.bincount(torch.tensor([s.token for s in draw(logits.expand(4000, -1), rows)]), minlength=4)
    assert chi_square(counts, logits.masked_fill(~allowed, float("-inf")).softmax(-1)) < limit(2)
    monkeypatch.setattr("node.engine.sampler.uniform", lambda seed, position: 1.0 - 2**-53)
    assert draw(logits[None], [Row(PLAIN, 1, allowed=allowed)])[0].token == 3


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    plain = logits.log_softmax(-1)[0].tolist()
    params = SamplingParams(temperature=0.0, logit_bias={0: 100.0}, logprobs=2)
    drawn = draw(logits, [Row(params, 3)])[0]
    assert (drawn.position, drawn.token) == (3, 0)
    assert drawn.logprob == pytest.approx(plain[0], abs=1e-6)
    assert [token for token, _ in drawn.top] == [1, 2]
    assert [value for _, value in drawn.top] == pytest.approx([plain[1], plain[2]], abs=1e-6)
    assert draw(logits, [Row(PLAIN, 3)])[0].top == ()


def test_scores_of_given_tokens() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
    (first, top), (second, none) = score(logits, [1, 2], [2, 0])
    assert first == pytest.approx(logits.log_softmax(-1)[0, 1].item(), abs=1e-6)
    assert second == pytest.approx(-math.log(3), abs=1e-6)
    assert [token for token, _ in top] == [1, 2]
    assert none == ()
