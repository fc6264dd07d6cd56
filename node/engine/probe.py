"""What this machine computes with: how fast, and in which number format."""

from __future__ import annotations

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

    from node.engine import kernels

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    size = 2048
    weights = [torch.randn(size, size).to(kind).to(device) for _ in range(4)]  # together past most last-level caches
    can_pack = kernels.can_pack(kind, torch.device(device))
    layers = [kernels.PackedLinear(w, None) if can_pack else _linear(w) for w in weights]
    many, few = torch.randn(128, size).to(kind).to(device), torch.randn(1, size).to(kind).to(device)

    def run(rows: torch.Tensor) -> float:
        for layer in layers:
            layer(rows)
        return float(len(layers))

    with torch.inference_mode():
        per_layer_many, per_layer_few = _seconds(lambda: run(many)), _seconds(lambda: run(few))
    return Speed(2.0 * 128 * size * size / per_layer_many, size * size * kind.itemsize / per_layer_few)


def _linear(weight: object) -> Callable[[object], object]:
    import torch.nn.functional as F

    return lambda rows: F.linear(rows, weight)  # type: ignore[arg-type]


def _seconds(run: Callable[[], float]) -> float:
    """Best seconds per unit of ``run``, which returns how many units it did."""
    run()
    best, deadline = float("inf"), time.perf_counter() + BUDGET_S / 4
    while True:
        began = time.perf_counter()
        units = run()
        now = time.perf_counter()
        best = min(best, (now - began) / units)
        if now > deadline:
            return best
