"""Loading beside a check: a node offers one model while it loads another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import ConfigError
from node.engine import span
from node.engine.loading import prepare
from node.engine.span import Part, needed_tensors
from tests.tiny_models import write_tiny


def test_a_model_whose_code_fails_on_a_part_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path, 2)

    def broken(*_: Any) -> Any:
        raise AttributeError("'Skipped' object has no attribute 'shared_transformer'")

    monkeypatch.setattr(span, "_prune", broken)
    with pytest.raises(ConfigError, match="llama: cannot be cut into spans: 'Skipped' object"):
        needed_tensors(folder, ["lm_head.weight"], 0, 1)


def test_models_that_are_loaded_at_the_same_time_do_not_spoil_each_other(tmp_path: Path) -> None:
    """Tied heads were lost for good when two threads were in transformers at once."""
    folders = [write_tiny(kind, tmp_path / kind, 2) for kind in ("gpt2", "gemma3_text", "llama")]
    whole, first = Part.of_span(0, 2, 2), Part.of_span(0, 1, 2)

    def load(at: int) -> bool:
        part = whole if at % 2 else first
        names = needed_tensors(folders[at % 3], ["transformer.wte.weight"], 0, 1)
        return prepare(folders[at % 3], part, "float32", "off", 1).mode == "packed" and names is not None

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(load, range(12)))
