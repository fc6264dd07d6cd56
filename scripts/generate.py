"""transformers' own ``generate`` in a process of its own, as whoever uses it alone has it.

In one process its pool of threads and the engine's would be more than there are processors, and both slow.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

from scripts.streams import prompt

_model: Any = None


class Generator:
    """One padded batch at a time, greedy, EOS not looked at."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _load, (folder, dtype, threads))

    def seconds(self, streams: int, length: int, draws: int) -> float:
        """For ``draws`` tokens of each of ``streams`` prompts of ``length``."""
        return self._pool.submit(_seconds, streams, length, draws).result()

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()


def _load(folder: Path, dtype: str, threads: int) -> None:
    global _model
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    _model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    _model.eval()


def _seconds(streams: int, length: int, draws: int) -> float:
    import torch

    ids = torch.tensor([prompt(length, number) for number in range(streams)])
    began = time.perf_counter()
    out = _model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, eos_token_id=None,
        min_new_tokens=draws, max_new_tokens=draws,
    )  # fmt: skip
    assert out.shape == (streams, length + draws)
    return time.perf_counter() - began
