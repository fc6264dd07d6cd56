"""Decoding and prefill beside the limits of the device, for ``scripts/bench_gpu``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from scripts.bench_models import Models
from scripts.figures import report
from scripts.streams import Streams, prompt

DTYPE = "bfloat16"
MODELS = ("1b", "8b")
STREAMS = (1, 8, 64, 256)
DECODE_GOAL, PREFILL_GOAL = 0.7, 0.5
NO_DEVICE = 4

Figures = dict[str, dict[str, Any]]


class Limits(msgspec.Struct, frozen=True):
    """What the device does with nothing in the way."""

    bandwidth: float
    """Bytes a second, read and written."""
    flops: float


class Cost(msgspec.Struct, frozen=True):
    """What a Llama-shaped model has to move and to compute, at the least."""

    weights: int
    """Of all layers and the head; of the embedding only rows are read."""
    head: int
    """Weights of the head alone."""
    kv_bytes: int
    """Keys and values of one position."""
    seen: int
    """FLOPs of a query's attention for each position that it sees."""
    item: int
    """Bytes of a weight."""

    @staticmethod
    def of(config: dict[str, Any], item: int = 2) -> Cost:
        """By the model's config.json."""
        layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
        size, key_heads = config.get("head_dim") or hidden // heads, config["num_key_value_heads"]
        layer = hidden * size * (2 * heads + 2 * key_heads) + 3 * hidden * config["intermediate_size"]
        head = hidden * config["vocab_size"]
        kv_bytes = 2 * layers * key_heads * size * item
        return Cost(layers * layer + head, head, kv_bytes, 4 * layers * heads * size, item)

    def decode(self, limits: Limits, streams: int, context: float) -> tuple[float, float]:
        """Tokens a second that bandwidth, and FLOPs, allow to ``streams`` sequences of ``context`` positions."""
        moved = self.weights * self.item + streams * context * self.kv_bytes
        return streams * limits.bandwidth / moved, limits.flops / (2 * self.weights + self.seen * context)

    def prefill(self, limits: Limits, length: int) -> tuple[float, float]:
        """The same for one prompt, of whose last position alone logits are wanted."""
        moved = self.weights * self.item + length * self.kv_bytes
        flops = 2 * (self.weights - self.head) * length + 2 * self.head + self.seen * length * (length + 1) / 2
        return length * limits.bandwidth / moved, length * limits.flops / flops


class Rates(msgspec.Struct, frozen=True):
    """Tokens a second."""

    decode: dict[int, float]
    """By streams."""
    prefill: float


# -- the device --------------------------------------------------------------------------------------------------------


def waiter(device: str) -> Callable[[], None]:
    """What waits until the device has done what it was told."""
    import torch

    return (lambda: torch.cuda.synchronize(device)) if device.startswith("cuda") else (lambda: None)


def measure_limits(device: str, rounds: int = 10) -> Limits:
    """The best of ``rounds``: nothing is faster than a limit."""
    import torch

    on_gpu = device.startswith("cuda")
    count, size, again = (1 << 30, 8192, 8) if on_gpu else (1 << 24, 512, 1)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    square = torch.ones(size, size, dtype=getattr(torch, DTYPE), device=device)
    copying = _fastest(lambda: target.copy_(source), waiter(device), again, rounds)
    product = _fastest(lambda: torch.nn.functional.linear(square, square), waiter(device), again, rounds)
    return Limits(2 * count / copying, 2 * size**3 / product)


def _fastest(run: Callable[[], object], wait: Callable[[], None], again: int, rounds: int) -> float:
    """Seconds of a run, told ``again`` times between two waits."""
    taken = []
    for _ in range(rounds + 1):  # the first one warms up
        began = time.perf_counter()
        for _ in range(again):
            run()
        wait()
        taken.append((time.perf_counter() - began) / again)
    return min(taken[1:])


# -- the engine and what stands beside it ------------------------------------------------------------------------------


async def engine_rates(folder: Path, cost: Cost, options: argparse.Namespace) -> Rates:
    from node.engine.pages import paged_width, width_of

    wide = options.prompt + options.tokens
    positions = max(max(options.streams) * max(paged_width(wide), width_of(wide)), 2 * options.prefill)
    config = {"kv_bytes": 2 * positions * cost.kv_bytes, "device": options.device, "threads": options.threads}
    streams = await Streams.load(folder, DTYPE, **config)
    decode = {}
    for count in options.streams:
        await streams.decode_seconds(count, options.prompt, options.tokens)  # graphs are made, pools grow
        taken = [await streams.decode_seconds(count, options.prompt, options.tokens) for _ in range(options.rounds)]
        decode[count] = count * (options.tokens - 1) / statistics.median(taken)
    await streams.seconds(1, options.prefill, 1)
    taken = [await streams.seconds(1, options.prefill, 1) for _ in range(options.rounds)]
    await streams.engine.stop()
    return Rates(decode, options.prefill / statistics.median(taken))


def generate_rates(folder: Path, options: argparse.Namespace) -> Rates:
    """Of ``generate``, by the times at which it asks whether to stop: behind every token."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteriaList

    how = {"dtype": getattr(torch, DTYPE), "attn_implementation": "sdpa"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **how).eval().to(options.device)
    wait = waiter(options.device)

    def timed(count: int, length: int, tokens: int) -> list[float]:
        """Seconds until each of ``tokens`` was there."""
        ids = torch.tensor([prompt(length, number) for number in range(count)]).to(options.device)
        found: list[float] = []

        def note(so_far: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            wait()
            found.append(time.perf_counter() - began)
            return torch.zeros(len(so_far), dtype=torch.bool, device=so_far.device)

        began = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, eos_token_id=None,
            min_new_tokens=tokens, max_new_tokens=tokens, stopping_criteria=StoppingCriteriaList([note]),
        )  # fmt: skip
        return found

    decode = {}
    for count in options.streams:
        timed(count, options.prompt, options.tokens)
        rounds = [timed(count, options.prompt, options.tokens) for _ in range(options.rounds)]
        decode[count] = count * (options.tokens - 1) / statistics.median(times[-1] - times[0] for times in rounds)
    timed(1, options.prefill, 1)
    first = statistics.median(timed(1, options.prefill, 1)[0] for _ in range(options.rounds))
    return Rates(decode, options.prefill / first)


def give_back(device: str) -> None:
    """Memory of what nobody holds any more."""
    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


# -- figures -----------------------------------------------------------------------------------------------------------


def measure(shape: str, folder: Path, options: argparse.Namespace) -> Figures:
    limits, cost = measure_limits(options.device), Cost.of(json.loads((folder / "config.json").read_text()))
    give_back(options.device)
    print(f"{shape}: {limits.bandwidth / 1e9:.0f} GB/s, {limits.flops / 1e12:.2f} TFLOP/s on {name_of(options.device)}")
    ours = asyncio.run(engine_rates(folder, cost, options))
    give_back(options.device)
    theirs = generate_rates(folder, options)
    give_back(options.device)
    found: Figures = {
        f"bandwidth_{shape}": noted("copies of the device", limits.bandwidth / 1e9, "GB/s"),
        f"flops_{shape}": noted(f"{DTYPE} products of the device", limits.flops / 1e12, "TFLOP/s"),
    }
    for count in options.streams:
        allowed = cost.decode(limits, count, options.prompt + options.tokens / 2)
        goal = (DECODE_GOAL, None) if count == 1 else (None, None)
        what = f"{shape}, decoding {count} streams"
        found[f"decode_{shape}_{count}"] = shares(what, ours.decode[count], allowed, theirs.decode[count], goal)
    allowed, goal = cost.prefill(limits, options.prefill), (None, PREFILL_GOAL)
    what = f"{shape}, prefill of {options.prefill} tokens"
    found[f"prefill_{shape}"] = shares(what, ours.prefill, allowed, theirs.prefill, goal)
    return found


def shares(
    what: str, rate: float, allowed: tuple[float, float], beside: float, goal: tuple[float | None, float | None]
) -> dict[str, Any]:
    """``allowed``: tokens a second by bandwidth and by FLOPs; ``goal``: least share of each."""
    of_bandwidth, of_flops = (rate / most for most in allowed)
    names = ("the bandwidth limit", "the FLOP limit")
    goals = [f">= {least:g} of {name}" for least, name in zip(goal, names, strict=True) if least is not None]
    print(
        f"{what}: {rate:.0f} tokens/s, {of_bandwidth:.1%} of {names[0]}, {of_flops:.1%} of {names[1]}; "
        f"generate {beside:.0f}", flush=True,
    )  # fmt: skip
    holds = all(least is None or share >= least for least, share in zip(goal, (of_bandwidth, of_flops), strict=True))
    return {
        "what": what,
        "value": {
            "tokens_per_s": round(rate, 1),
            "of_bandwidth": round(of_bandwidth, 4),
            "of_flops": round(of_flops, 4),
            "generate_tokens_per_s": round(beside, 1),
        },
        "unit": "tokens/s, shares of the limits",
        "goal": ", ".join(goals),
        "holds": holds,
    }


def noted(what: str, value: float, unit: str) -> dict[str, Any]:
    """A figure without a goal."""
    return {"what": what, "value": round(value, 3), "unit": unit, "goal": "", "holds": True}


def name_of(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "the CPU"


def parse(arguments: Sequence[str], text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="cuda, cuda:N, or cpu [cuda:0]")
    parser.add_argument("--model", default="all", choices=["all", *MODELS, "tiny"], help="shape [all: 1b and 8b]")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS), help="[1 8 64 256]")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a stream's prompt [128]")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that a stream draws, at least 2 [128]")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt for prefill [2048]")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is the figure [3]")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU [1]")
    parser.add_argument("--folder", type=Path, help="where models are written and kept [a temporary one]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.tokens < 2 or min(*options.streams, options.prompt - 1, options.prefill, options.rounds) < 1:
        parser.error("--tokens and --prompt must be at least 2, the other numbers at least 1")
    return options


def main(arguments: Sequence[str], text: str = "") -> int:
    options = parse(arguments, text)
    from mesh.errors import ConfigError
    from node.engine.probe import serving_device

    try:
        options.device = serving_device(options.device)
    except ConfigError as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        return NO_DEVICE
    import torch

    torch.set_num_threads(options.threads)
    found: Figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        models = Models(options.folder or Path(temporary))
        for shape in MODELS if options.model == "all" else (options.model,):
            folder = models.tiny(4) if shape == "tiny" else models.get(shape, DTYPE)
            found |= measure(shape, folder, options)
    return report(found, seed=0, as_json=options.json)
