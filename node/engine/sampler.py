"""Draws tokens.  No random state: the number drawn is a function of (seed, position), so any node draws the same.

Per row: bias, penalties and bans, then the grammar's mask, then temperature; the most likely tokens in order are cut
by top-k, min-p and top-p (each keeps a prefix of that order), and the number drawn picks one by the cumulated
probabilities.  The first 256 tokens nearly always decide; a row whose cut lies past them is sorted whole.  Every
operation works on rows apart, so that a row's token does not depend on the batch.

Scores are shaped and put in order where the logits lie; of the ordered ones the first 256 come to the CPU, where the
token is picked: the same arithmetic on every device, and no device is asked for a handful of tiny products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mesh.types import SamplingParams
from node.engine.sequence import Sampled, TokenScore
from node.engine.sequence import Sequence as Open

FIRST = 256
"""Tokens of a row that are put in order at first."""
_MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """In [0, 1), 53 bits, by two rounds of splitmix64's finalizer over seed and position."""
    x = _mix((seed & _MASK64) ^ 0x9E3779B97F4A7C15)
    return (_mix((x + (position + 1) * 0xBF58476D1CE4E5B9) & _MASK64) >> 11) * (1.0 / (1 << 53))


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


class Row:
    """One row to draw from: token number ``position`` of a sequence whose tokens before are ``tokens``."""

    __slots__ = ("allowed", "params", "position", "prompt_length", "tokens")

    def __init__(
        self,
        params: SamplingParams,
        position: int,
        tokens: Sequence[int] = (),
        prompt_length: int = 0,
        allowed: torch.Tensor | None = None,
    ) -> None:
        self.params, self.position, self.prompt_length = params, position, prompt_length
        self.tokens = tokens
        self.allowed = allowed
        """By the grammar: bool [V], at least one of them True; ``None``: every token."""

    @staticmethod
    def of(sequence: Open, position: int) -> Row:
        """The row behind ``position - 1`` of ``sequence``."""
        spec, guide = sequence.spec, sequence.guide
        assert spec.sampling is not None, spec.key
        assert guide is None or (guide.mask is not None and guide.position == position), (spec.key, position)
        mask = guide.mask if guide else None
        return Row(spec.sampling, position, sequence.tokens[:position], spec.prompt_length, mask)


@torch.inference_mode()
def draw(logits: torch.Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """One token for each of ``logits`` [len(rows), V]."""
    raw = logits.float()
    shaped = [i for i, row in enumerate(rows) if _shapes(row)]
    scores = raw
    if shaped:
        scores = raw.clone()
        for i in shaped:
            _shape(scores[i], rows[i])
    tokens = scores.argmax(-1).tolist()
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        picked = _pick(scores[drawn], [rows[i] for i in drawn])
        for i, token in zip(drawn, picked, strict=True):
            tokens[i] = token
    return _with_logprobs(raw, rows, tokens)


# -- what changes a row's scores ---------------------------------------------------------------------------------------


def _shapes(row: Row) -> bool:
    p = row.params
    penalized = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
    return bool(penalized or p.logit_bias or row.allowed is not None or _too_short(row))


def _too_short(row: Row) -> bool:
    return bool(row.params.stop_token_ids) and row.position - row.prompt_length < row.params.min_tokens


def _shape(scores: torch.Tensor, row: Row) -> None:
    """Change ``scores`` [V] in place.

    Repetition counts the prompt and what was generated, presence and frequency what was generated (as in vLLM).
    """
    p = row.params
    size = scores.shape[0]
    if p.repetition_penalty != 1.0 and row.tokens:
        seen = torch.tensor(sorted({t for t in row.tokens if 0 <= t < size}), dtype=torch.long).to(scores.device)
        known = scores[seen]
        scores[seen] = torch.where(known > 0, known / p.repetition_penalty, known * p.repetition_penalty)
    generated = row.tokens[row.prompt_length :]
    if (p.presence_penalty or p.frequency_penalty) and generated:
        counts = torch.bincount(torch.tensor(generated, dtype=torch.long), minlength=size)[:size].to(scores.device)
        scores -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
    for token, bias in p.logit_bias.items():
        if 0 <= token < size:
            scores[token] += bias
    if _too_short(row):
        scores[[t for t in p.stop_token_ids if 0 <= t < size]] = float("-inf")
    if row.allowed is not None:
        scores.masked_fill_(~row.allowed.to(scores.device), float("-inf"))


# -- picking -----------------------------------------------------------------------------------------------------------


def _pick(scores: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """Draw from ``scores`` [n, V] by each row's temperature, top-k, top-p, min-p, seed and position."""
    temperatures = torch.tensor([row.params.temperature for row in rows], dtype=torch.float32).clamp_min(1e-5)
    scores = scores / temperatures.to(scores.device)[:, None]
    total = scores.logsumexp(-1, keepdim=True).cpu()
    top, order = (t.cpu() for t in scores.topk(min(FIRST, scores.shape[1]), -1))
    tokens, open_rows = _from_ordered(top, order, total, rows, whole=top.shape[1] == scores.shape[1])
    for i in open_rows:
        ranked, order = (t.cpu() for t in torch.sort(scores[i : i + 1], dim=-1, descending=True, stable=True))
        tokens[i] = _from_ordered(ranked, order, total[i : i + 1], [rows[i]], whole=True)[0][0]
    return tokens


def _from_ordered(
    top: torch.Tensor, order: torch.Tensor, total: torch.Tensor, rows: Sequence[Row], whole: bool
) -> tuple[list[int], list[int]]:
    """Draw each row from its ``top`` scores [n, K] in falling order; second, the rows that K tokens do not decide."""
    width = top.shape[1]
    chances = (top - total).exp().double()
    sums = chances.cumsum(-1)
    top_k = torch.tensor([row.params.top_k or width + 1 for row in rows])[:, None]
    top_p = torch.tensor([row.params.top_p for row in rows], dtype=torch.float64)[:, None]
    min_p = torch.tensor([row.params.min_p for row in rows], dtype=torch.float64)[:, None]
    kept = (
        (torch.arange(width) < top_k)
        & ((sums - chances < top_p) | (top_p >= 1))
        & (chances >= min_p * chances[:, :1])
        & (chances > 0)  # what a grammar forbids is not drawn even where rounding reaches the end of the sums
    )
    kept[:, 0] = True
    count = kept.sum(-1)
    cut = (count < width) | (top_k[:, 0] <= width) | torch.tensor(whole)
    mass = torch.where(cut, sums.gather(1, (count - 1)[:, None])[:, 0], 1.0)
    wanted = torch.tensor([uniform(row.params.seed, row.position) for row in rows], dtype=torch.float64) * mass
    found = torch.searchsorted(sums, wanted[:, None], right=True)[:, 0]
    # Without a cut the mass is 1: a number that falls into the first K is decided whatever comes after them.
    free = torch.tensor([_is_free(row) for row in rows])
    decided = cut | (free & (found < width))
    found = torch.minimum(found, count - 1)
    tokens = order.gather(1, found[:, None])[:, 0].tolist()
    return tokens, [i for i, sure in enumerate(decided.tolist()) if not sure]


def _is_free(row: Row) -> bool:
    """Nothing is cut off: every token may be drawn."""
    p = row.params
    return p.top_k == 0 and p.top_p >= 1 and p.min_p == 0


# -- log-probabilities -------------------------------------------------------------------------------------------------


def _with_logprobs(raw: torch.Tensor, rows: Sequence[Row], tokens: list[int]) -> list[Sampled]:
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs >= 0]
    scored: dict[int, TokenScore] = {}
    if wanted:
        counts = [rows[i].params.logprobs for i in wanted]
        scored = dict(zip(wanted, score(raw[wanted], [tokens[i] for i in wanted], counts), strict=True))
    none: TokenScore = (0.0, ())
    return [Sampled(row.position, tokens[i], *scored.get(i, none)) for i, row in enumerate(rows)]


@torch.inference_mode()
def score(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenScore]:
    """Log-probabilities, before temperature and penalties, of ``tokens`` and of each row's ``counts`` most likely."""
    chances = logits.float() - logits.float().logsumexp(-1, keepdim=True)
    own = chances.gather(1, torch.tensor(list(tokens)).to(chances.device)[:, None])[:, 0].tolist()
    most = min(max(counts, default=0), chances.shape[1])
    values, order = (t.tolist() for t in chances.topk(most, -1))
    tops = [tuple(zip(order[i][:n], values[i][:n], strict=True)) for i, n in enumerate(counts)]
    return list(zip(own, tops, strict=True))
