"""What this machine computes with: how fast, and in which number format."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import msgspec

from mesh.errors import ConfigError

BUDGET_S = 0.4
"""For all measurements together."""
QUEUED = 8
"""Runs between two waits for a GPU, so that the wait is not what is measured."""


class Speed(msgspec.Struct, frozen=True):
    """Measured with this node's threads, in its serving dtype."""

    flops: float
    """Multiply-adds x 2 a second of a product of many rows: what prefill runs at."""
    bandwidth: float
    """Bytes of weights a second of a product of few rows: what decoding runs at."""


def serving_device(requested: str = "auto") -> str:
    """``cpu`` or ``cuda:N``.  ``auto`` is the CPU (docs/decisions/0079).

    Raises ``ConfigError`` where there is no such device.
    """
    if not requested.startswith("cuda"):
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} is built {f'for CUDA {built} but finds no GPU' if built else 'without CUDA'}"
        raise ConfigError(f"--device {requested}: {why}; use --device cpu, or install what is missing")
    number, count = int(requested.partition(":")[2] or 0), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(f"--device {requested}: there is no such GPU here, only cuda:0 to cuda:{count - 1}")
    return f"cuda:{number}"


def device_memory(device: str) -> int:
    """Bytes of ``device``, a GPU, that are free now."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free


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
    gpu = device.startswith("cuda")
    size, rows = (8192, 2048) if gpu else (2048, 128)
    # Together past most last-level caches, so that few rows are bound by memory.
    weights = [torch.ones(size, size, dtype=kind, device=device) for _ in range(4)]
    form = products.Float if products.can_pack(kind, torch.device(device)) else products.Plain
    layers = itertools.cycle([form(weight) for weight in weights])
    many, few = torch.ones(rows, size, dtype=kind, device=device), torch.ones(1, size, dtype=kind, device=device)
    with torch.inference_mode():
        wait = (lambda: torch.cuda.synchronize(device)) if gpu else None
        slow = _seconds(lambda: next(layers)(many, None), wait)
        fast = _seconds(lambda: next(layers)(few, None), wait)
    return Speed(2.0 * rows * size * size / slow, size * size * kind.itemsize / fast)


def _seconds(run: Callable[[], object], wait: Callable[[], object] | None) -> float:
    """The median over a quarter of the budget; at least one run after a warm-up.

    ``wait``: until a device that is only told what to do has done it; it is told ``QUEUED`` runs at a time.
    """
    runs = QUEUED if wait else 1
    wait = wait or (lambda: None)
    run()
    wait()
    taken: list[float] = []
    deadline = time.perf_counter() + BUDGET_S / 4
    while not taken or time.perf_counter() < deadline:
        began = time.perf_counter()
        for _ in range(runs):
            run()
        wait()
        taken.append((time.perf_counter() - began) / runs)
    return statistics.median(taken)
