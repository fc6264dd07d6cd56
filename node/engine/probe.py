"""What this machine computes with: how fast, and in which number format."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import msgspec

BUDGET_S = 0.4
"""For all measurements together."""


class Speed(msgspec.Struct, frozen=True):
    """Measured with this node's threads, in its serving dtype."""

    flops: float
    """Multiply-adds x 2 a second of a product of many rows: what prefill runs at."""
    bandwidth: float
    """Bytes of weights a second of a product of few rows: what decoding runs at."""


def serving_dtype(requested: str = "auto", device: str = "cpu") -> str:
    """The number format to serve in: ``float32``, ``bfloat16`` or ``float16``.

    ``auto`` is bfloat16 on a GPU and on a CPU that multiplies it (avx512_bf16, amx); on other CPUs bfloat16 products
    are emulated at a fraction of the speed, so weights are held in float32 there (docs/decisions/0011).
    """
    if requested != "auto":
        return requested
    import torch

    if device.startswith("cuda"):
        return "bfloat16"
    # oneDNN also says yes to plain AVX-512, where it emulates: ask for the instructions.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def probe(threads: int, dtype: str, device: str = "cpu") -> Speed:
    """Measure; takes under half a second, imports of torch not counted.  Not for the event loop's thread."""
    import torch

    from node.engine import products

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    size, rows = 2048, 128
    # Together past most last-level caches, so that few rows are bound by memory.
    weights = [torch.ones(size, size, dtype=kind, device=device) for _ in range(4)]
    form = products.Float if products.can_pack(kind, torch.device(device)) else products.Plain
    layers = itertools.cycle([form(weight) for weight in weights])
    many, few = torch.ones(rows, size, dtype=kind, device=device), torch.ones(1, size, dtype=kind, device=device)
    with torch.inference_mode():
        slow, fast = _seconds(lambda: next(layers)(many, None)), _seconds(lambda: next(layers)(few, None))
    return Speed(2.0 * rows * size * size / slow, size * size * kind.itemsize / fast)


def _seconds(run: Callable[[], object]) -> float:
    """The median over a quarter of the budget; at least one run after a warm-up."""
    run()
    taken: list[float] = []
    deadline = time.perf_counter() + BUDGET_S / 4
    while not taken or time.perf_counter() < deadline:
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
