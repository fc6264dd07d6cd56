"""The forward without the model around its layers: the same bits, past every edge, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from node.engine import direct
from node.engine.batch import Rows
from node.engine.loading import prepare
from node.engine.shard import Shard
from node.engine.span import Part

LEAN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "mixtral")
OTHER = ("gemma2", "gpt2", "gpt_oss", "granite")
CHUNKS = (13, 21, 1, 1, 5, 1)
IDS = torch.arange(sum(CHUNKS)) * 7 % 250 + 3


def _shard(folder: Path, part: Part) -> Shard:
    return prepare(folder, part, "float32", "auto", 1).shard


def _play(shard: Shard, start: int, end: int, given: torch.Tensor) -> list[torch.Tensor]:
    """Chunk after chunk: hidden states, and logits behind the last layer."""
    place = shard.cache().open(start, end, len(given))
    found, first = [], 0
    for n in CHUNKS:
        rows = torch.arange(n) if end == shard.layout.n_layers else None
        batch = shard.batch([Rows(place, first, n)])
        found += [one for one in shard.packed(start, end, given[first : first + n], batch, rows) if one is not None]
        first += n
    return found


def _plays_the_same(shard: Shard, start: int, end: int, given: torch.Tensor) -> bool:
    with_it = _play(shard, start, end, given)
    found, shard.direct = shard.direct, None
    without = _play(shard, start, end, given)
    shard.direct = found
    return all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


@pytest.mark.parametrize("kind", LEAN)
def test_lean_models_run_by_it_with_the_models_own_bits(
    kind: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "CHUNK", 16)  # tables grow in the middle of a chunk, more than once
    shard = _shard(tiny(kind), Part.of_span(0, 4, 4))
    assert shard.direct is not None
    assert shard.direct.ready(0, 4, True)
    assert _plays_the_same(shard, 0, 4, IDS)
    hidden = torch.randn(len(IDS), shard.hidden_size)
    assert _plays_the_same(shard, 1, 3, hidden)
    assert _plays_the_same(shard, 3, 4, hidden)


@pytest.mark.parametrize("kind", OTHER)
def test_other_models_run_as_they_were_written(kind: str, tiny: Callable[..., Path]) -> None:
    assert _shard(tiny(kind), Part.of_span(0, 4, 4)).direct is None


def test_layers_that_come_and_go_are_seen(tiny: Callable[..., Path]) -> None:
    shard = _shard(tiny("gemma"), Part.of_span(1, 3, 4))
    assert shard.direct is not None
    assert shard.direct.ready(1, 3, False)
    assert not shard.direct.ready(0, 3, False)
    shard.adopt(_shard(tiny("gemma"), Part((0, 3), embed=True, head=True)))
    assert shard.direct.ready(0, 4, True)
    assert _plays_the_same(shard, 0, 4, IDS)
    shard.keep(Part((0, 1), embed=True))
    assert shard.direct.ready(0, 2, False)
    assert not shard.direct.ready(0, 3, False)
    shard.adopt(_without(_shard(tiny("gemma"), Part.of_span(2, 4, 4))))
    assert shard.direct is None, "what is adopted did not pass the test"


def _without(shard: Shard) -> Shard:
    shard.direct = None
    return shard


def test_a_head_of_another_form_is_the_models_own(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = Shard.logits
    monkeypatch.setattr(Shard, "logits", lambda *args: plain(*args) * 1.001)
    shard = _shard(tiny("llama"), Part.of_span(0, 4, 4))
    assert shard.direct is not None
    assert not shard.direct.ready(0, 4, True)
    assert shard.direct.ready(0, 4, False)
    assert _plays_the_same(shard, 0, 4, IDS)


def test_other_hidden_states_are_noticed(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "signed", lambda sin: sin)
    assert _shard(tiny("llama"), Part.of_span(0, 4, 4)).direct is None
