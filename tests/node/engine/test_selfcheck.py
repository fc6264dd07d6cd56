"""What a span is held against before it serves, where rounding is coarse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from node.engine import selfcheck
from node.engine.batch import Batch
from node.engine.loading import prepare
from node.engine.shard import Shard
from node.engine.span import Part

WHOLE = Part.of_span(0, 4, 4)
ROUTED = ("mixtral", "granitemoe", "qwen3_moe")
"""In a row that rounding gives to other experts all that follows is another sum."""


@pytest.mark.parametrize("kind", ROUTED)
def test_experts_that_rounding_tips_are_no_reason_to_run_one_by_one(kind: str, tiny: Callable[..., Path]) -> None:
    found = prepare(tiny(kind), WHOLE, "bfloat16", "off", 1)
    assert (found.mode, found.why) == ("packed", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", *ROUTED])
def test_attention_that_is_wrong_is_noticed(
    kind: str, dtype: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _blind(monkeypatch)
    found = prepare(tiny(kind), WHOLE, dtype, "off", 1)
    assert found.mode == "compat"
    assert "differ by" in found.why


def test_a_model_that_runs_in_no_single_layers_is_run_one_by_one(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = selfcheck._plain

    def plain(shard: Shard, start: int, end: int, given: Any) -> Any:
        if end - start == 1:
            raise RuntimeError("a layer reads what another wrote")
        return whole(shard, start, end, given)

    _blind(monkeypatch)
    monkeypatch.setattr(selfcheck, "_plain", plain)
    found = prepare(tiny("llama"), WHOLE, "bfloat16", "off", 1)
    assert (found.mode, found.why) == ("compat", "RuntimeError: a layer reads what another wrote")


def _blind(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Batch.attend

    def blind(self: Batch, layer: int, query: Any, key: Any, value: Any, rule: Any, *more: Any) -> Any:
        """To which value belongs to which key."""
        return right(self, layer, query, key, value.roll(1, 0), rule, *more)

    monkeypatch.setattr(Batch, "attend", blind)
