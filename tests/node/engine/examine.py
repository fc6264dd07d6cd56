"""A process that is given names of architectures on stdin and answers what became of each, as a line of JSON.

Child of ``scripts/check_models``, which replaces it when an architecture brings it down.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from node.engine.span import read_config
from tests.node.engine.parity import compare, find_truth, make_prompts
from tests.tiny_models import tiny_config, write_tiny

LAYERS = 6
STAGES = ((0, 3, 6), (0, 2, 4, 6))


def main() -> None:
    """Until stdin ends."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    # Whatever libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(examine(line.strip())), file=answers, flush=True)


def examine(kind: str) -> dict[str, Any]:
    """Build, run, compare."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = tiny_config(kind, LAYERS)
            features = _write(kind, Path(folder) / "as-is")
        except Exception as error:
            return {"verdict": "not built", "why": _line(error)}
        runs: dict[str, Any] = {}
        try:
            runs["2 stages"], runs["3 stages"] = _compare(Path(folder) / "as-is", *STAGES)
            tied = getattr(config.get_text_config(decoder=True), "tie_word_embeddings", None)
            if isinstance(tied, bool) and tied == features["tied"]:
                other = _write(kind, Path(folder) / "other", tie_word_embeddings=not tied)
                if other["tied"] != tied:
                    runs["untied" if tied else "tied"] = _compare(Path(folder) / "other", STAGES[0])[0]
        except Exception as error:
            return {"verdict": "not built", "why": f"transformers alone: {_line(error)}", **features}
    return {"verdict": _verdict(runs), "runs": runs, **features}


def _write(kind: str, folder: Path, **over: Any) -> dict[str, Any]:
    write_tiny(kind, folder, LAYERS, **over)
    config = read_config(folder)
    with torch.device("meta"):
        return _features(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config))


def _compare(folder: Path, *cuts: tuple[int, ...]) -> list[dict[str, Any]]:
    truths = find_truth(folder, make_prompts())
    verdicts = [asyncio.run(compare(folder, truths, each)) for each in cuts]
    return [msgspec.to_builtins(msgspec.structs.replace(v, error=float(f"{v.error:.1e}"))) for v in verdicts]


def _features(model: Any) -> dict[str, Any]:
    """What is special about a model, read off its structure."""
    text = model.config.get_text_config(decoder=True)
    names = [name for name, _ in model.named_parameters()]
    kinds = sorted({str(t) for t in getattr(text, "layer_types", None) or ()})
    marks = {
        "experts": any("expert" in name for name in names),
        "window": any("sliding" in t or "chunked" in t for t in kinds)
        or (not kinds and bool(getattr(text, "sliding_window", None))),
        "softcap": any("softcap" in name and value for name, value in vars(text).items()),
        "sinks": any("sink" in name for name in names),
    }
    return {
        "class": type(model).__name__,
        "tied": bool(getattr(model, "all_tied_weights_keys", None)),
        "features": [name for name, has in marks.items() if has],
        "layer_types": kinds,
    }


def _verdict(runs: dict[str, Any]) -> str:
    modes = {run["mode"] for run in runs.values()}
    if modes == {"refused"}:
        return "refused"
    if any(run["wrong"] for run in runs.values()):
        return "WRONG"
    return "packed" if modes == {"packed"} else "compat"


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"


if __name__ == "__main__":
    main()
