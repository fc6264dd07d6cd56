"""The models that benchmarks run, and the form of their figures."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from scripts.figures import ROOT


class Models:
    """Benchmark models in one folder, written when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def get(self, shape: str, dtype: str) -> Path:
        """A folder of ``make_bench_model``."""
        path = self.folder / f"{shape}-{dtype}" / "model"
        return path if (path / "config.json").exists() else _script("make_bench_model").write(shape, path, dtype)

    def words(self, shape: str, dtype: str) -> Path:
        """As ``get``, with a tokenizer that names every token: each token of a stream is a piece of its own."""
        from tests.tiny_models import write_words

        path = self.folder / f"{shape}-{dtype}-words" / "model"
        if not (path / "tokenizer.json").exists():
            config = json.loads((_script("make_bench_model").write(shape, path, dtype) / "config.json").read_text())
            write_words(path, config["vocab_size"])
        return path

    def tiny(self, layers: int) -> Path:
        """A tiny Llama with a tokenizer."""
        from tests.tiny_models import write_tiny

        path = self.folder / f"tiny-{layers}" / "model"
        return path if path.exists() else write_tiny("llama", path, layers, tokenizer=True)

    def windowed(self, window: int, context: int) -> Path:
        """A tiny Gemma 3 of 12 layers, 5 of 6 with ``window``; 0: none has one."""
        from tests.tiny_models import write_tiny

        path = self.folder / f"windowed-{window}" / "model"
        kinds = {"sliding_window": window} if window else {"layer_types": ["full_attention"] * 12}
        more: dict[str, Any] = {"max_position_embeddings": context, **kinds}
        return path if path.exists() else write_tiny("gemma3_text", path, 12, tokenizer=True, **more)

    def tiny_words(self, layers: int) -> Path:
        """A tiny Llama with a tokenizer that names every token."""
        from tests.tiny_models import write_tiny, write_words

        path = self.folder / f"tiny-{layers}-words" / "model"
        return path if path.exists() else write_words(write_tiny("llama", path, layers))


def served(dtype: str) -> str:
    """What a checkpoint in ``dtype`` is served in here: float32 as it is, whatever this processor would prefer."""
    from node.engine.probe import serving_dtype

    return dtype if dtype == "float32" else serving_dtype("auto")


def _script(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "scripts" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


def figure(what: str, value: float, unit: str, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    """A ratio or a time, its goal and whether it holds."""
    goal = f">= {least:g}" if least is not None else f"<= {most:g}"
    holds = (least is None or value >= least) and (most is None or value <= most)
    return {"what": what, "value": round(value, 3), "unit": unit, "goal": goal, "holds": holds}
