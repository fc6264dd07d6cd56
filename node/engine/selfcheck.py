"""Before a span serves: does our way of running this model give what the model itself gives?

The packed mode (two chunks, then single rows) and, failing that, the compat mode are held against one plain forward of
the same layers.  A model that fits neither is refused by name: nothing is ever served on trust.  Lean layers are held
against the packed forward without them, and far more strictly: a guess may not hide in what rounding may do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import structlog
import torch

from mesh.errors import ConfigError
from node.engine import attention
from node.engine.batch import Packed
from node.engine.cells import Rows
from node.engine.compat import CompatState
from node.engine.direct import Direct
from node.engine.shard import Shard

Mode = Literal["packed", "compat"]
CHUNKS = (13, 9, 1, 1)
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference, as a share of the largest value of the plain forward."""
LEAN_TOLERANCE = 10.0
"""In float32 lean layers must be this much closer.  In half precision they round where the model does: to the bit."""
TIPPED = 0.25
"""Share of rows that rounding may give to other experts, in a layer."""
PACKABLE = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
Outcome = tuple[torch.Tensor, torch.Tensor | None]


class Served(msgspec.Struct, frozen=True):
    """How layers [start, end) are served."""

    mode: Mode
    layer_bytes: tuple[int, ...]
    """Keys and values of one position, of each layer."""
    why: str = ""
    """Why not packed."""


def check(shard: Shard, start: int, end: int) -> Served:
    """Learn how to serve [start, end), which ``shard`` holds.  Raises ``ConfigError`` naming kind and reason."""
    kind = shard.config.model_type
    try:
        shard.use("eager")
        shard.learn_form(start)
        given, expected = _inputs(shard, start), None
        expected = _plain(shard, start, end, given)
    except Exception as error:
        # Whatever a model does on a plain forward of a part of it, it is the model that cannot be cut.
        raise ConfigError(f"{kind}: does not run in parts: {_line(error)}") from error
    why_not = _why_not_packed(shard)
    if not why_not:
        shard.use(attention.NAME)
        outcome = _try_packed(shard, start, end, given, expected)
        if not isinstance(outcome, str):
            return Served("packed", outcome)
        why_not = outcome
    shard.use("eager")
    for shard.masked in (True, False):
        outcome = _try_compat(shard, start, end, given, expected)
        if not isinstance(outcome, str):
            break
    if isinstance(outcome, str):
        raise ConfigError(f"{kind}: cannot be served in parts (packed: {why_not}; one by one: {outcome})")
    return Served("compat", outcome, why_not)


def find_direct(shard: Shard, runs: Sequence[tuple[int, int]]) -> None:
    """Have lean layers of ``runs`` run without the model around them, if that gives the same bits."""
    if shard.paged or any(None in shard.lean_layers(start, end) for start, end in runs):
        return
    given = [_inputs(shard, start) for start, _ in runs]
    expected = [_packed(shard, *run, each)[0] for run, each in zip(runs, given, strict=True)]
    try:
        shard.direct = Direct.of(shard)
        found = [_packed(shard, *run, each)[0] for run, each in zip(runs, given, strict=True)]
    except Exception as error:  # what a model is made of around its layers is its authors' affair: its own forward runs
        shard.direct = None
        structlog.get_logger().info("no direct forward", model=shard.config.model_type, why=_line(error))
        return
    pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)]
    if shard.direct is not None and not all(torch.equal(a[0], b[0]) for a, b in pairs):
        shard.direct = None
    elif shard.direct is not None:
        shard.direct.heads = all(torch.equal(a[1], b[1]) for a, b in pairs if a[1] is not None and b[1] is not None)


def _inputs(shard: Shard, start: int) -> torch.Tensor:
    """Random ids [T] for layer 0, random hidden states [T, H] for others."""
    generator = torch.Generator().manual_seed(start)
    total = sum(CHUNKS)
    if start == 0:
        return torch.randint(0, shard.config.get_text_config(decoder=True).vocab_size, (total,), generator=generator)
    return torch.randn(total, shard.hidden_size, generator=generator).to(shard.dtype)


def _plain(shard: Shard, start: int, end: int, given: torch.Tensor) -> Outcome:
    total = given.shape[0]
    options = {
        "position_ids": torch.arange(total)[None],
        "attention_mask": torch.ones(1, total, dtype=torch.long),
        "use_cache": False,
    }
    rows = torch.arange(total) if end == shard.layout.n_layers else None
    with torch.inference_mode():
        hidden, logits = shard.run(start, end, given[None], options, rows)
    if hidden.shape != (1, total, shard.hidden_size):
        raise ConfigError(f"its layers pass on {tuple(hidden.shape)}")
    return hidden[0], logits


def _why_not_packed(shard: Shard) -> str:
    text = shard.config.get_text_config(decoder=True)
    strange = sorted(set(getattr(text, "layer_types", None) or ()) - PACKABLE)
    if strange:
        return f"layers of {strange[0]}"
    if kind := _turns_by_length(text):
        return f"rotary embeddings that depend on the longest sequence of a forward ({kind})"
    return "" if shard.model._supports_attention_backend else "attention of its own"


def _turns_by_length(text: Any) -> str:
    """The kind of rotary embeddings that are made anew from the positions of a forward; empty: none."""
    found = getattr(text, "rope_parameters", None) or {}
    each = [found, *(one for one in found.values() if isinstance(one, dict))]
    kinds = [str(one.get("rope_type", "")) for one in each]
    return next((kind for kind in kinds if kind == "longrope" or "dynamic" in kind), "")


def _try_packed(shard: Shard, start: int, end: int, given: torch.Tensor, expected: Outcome) -> tuple[int, ...] | str:
    try:
        outcomes, batch = _packed(shard, start, end, given, lean=False)
        difference = _difference(outcomes, expected, TOLERANCE[shard.precision])
        if difference and shard.precision != torch.float32:
            difference = _by_layers(shard, start, end, given)
    except Exception as error:
        return _line(error)
    if set(batch.seen) != set(range(start, end)):
        return "not every layer keeps keys and values"
    if difference:
        return difference
    if any(shard.lean_layers(start, end)) and not _lean_agrees(shard, start, end, given, outcomes):
        shard.give_up_lean()
    item = shard.dtype.itemsize
    shard.learn_windows(batch)
    return tuple(sum(h * d for h, d in batch.seen[i]) * item for i in range(start, end))


def _by_layers(shard: Shard, start: int, end: int, given: torch.Tensor) -> str:
    """How the packed forward of any one layer differs from the layer's own; empty: none does.

    In half precision what is rounded otherwise adds up over the layers, and tips which experts a row is given to: then
    all that follows in the row is another sum.  So layers with experts may differ in a few rows.
    """
    layers, tolerance = shard.model.get_submodule(shard.layout.layers), TOLERANCE[shard.precision]
    for index in range(start, end):
        routed = any(name.endswith("experts") for name, _ in layers[index].named_modules())
        shard.use("eager")
        expected = _plain(shard, index, index + 1, given)
        shard.use(attention.NAME)
        outcomes, _ = _packed(shard, index, index + 1, given, lean=False)
        if difference := _difference(outcomes, expected, tolerance, TIPPED if routed else 0.0):
            return f"layer {index}: {difference}"
        given = expected[0]
    return ""


def _lean_agrees(shard: Shard, start: int, end: int, given: torch.Tensor, outcomes: list[Outcome]) -> bool:
    """Whether lean layers give what ``outcomes`` of the packed forward without them are."""
    try:
        found, _ = _packed(shard, start, end, given)
    except Exception as error:  # a guess of what layers are made of may break on those that are made otherwise
        structlog.get_logger().info("no lean layers", model=shard.config.model_type, why=_line(error))
        return False
    expected = _joined(outcomes)
    if shard.dtype == torch.float32:
        return not _difference(found, expected, TOLERANCE[shard.precision] / LEAN_TOLERANCE)
    return all(a is b or torch.equal(a, b) for a, b in zip(_joined(found), expected, strict=True))


def _joined(outcomes: list[Outcome]) -> Outcome:
    """Of all chunks: hidden states [T, H] and logits [T, V]."""
    hidden, logits = zip(*outcomes, strict=True)
    return torch.cat(hidden), None if logits[0] is None else torch.cat(logits)


def _packed(shard: Shard, start: int, end: int, given: torch.Tensor, lean: bool = True) -> tuple[list[Outcome], Packed]:
    """The packed forward in chunks, and the last one's batch."""
    place = shard.cache().open(start, end, sum(CHUNKS))
    outcomes, first = [], 0
    shard.lean = lean
    try:
        for n in CHUNKS:
            batch = shard.batch([Rows(place, first, n)])
            rows = torch.arange(n) if end == shard.layout.n_layers else None
            outcomes.append(shard.packed(start, end, given[first : first + n], batch, rows))
            first += n
    finally:
        shard.lean = True
    return outcomes, batch


def _try_compat(shard: Shard, start: int, end: int, given: torch.Tensor, expected: Outcome) -> tuple[int, ...] | str:
    state = CompatState(shard, start, end)
    outcomes = []
    try:
        for n in CHUNKS:
            rows = torch.arange(n) if expected[1] is not None else None
            outcomes.append(state.forward(given[state.length : state.length + n], rows))
    except Exception as error:
        return _line(error)
    per_layer = state.bytes // state.length // (end - start)
    return _difference(outcomes, expected, TOLERANCE[shard.precision]) or (per_layer,) * (end - start)


def _difference(outcomes: list[Outcome], expected: Outcome, tolerance: float, spared: float = 0.0) -> str:
    """``spared``: share of the rows, those that differ most, that is not looked at."""
    for what, found, wanted in zip(("hidden states", "logits"), _joined(outcomes), expected, strict=True):
        if found is None or wanted is None:
            continue
        rows = (found.float() - wanted.float()).abs().amax(-1).sort().values
        share = rows[-1 - int(spared * len(rows))] / wanted.float().abs().max().clamp_min(1e-9)
        if not (share <= tolerance and rows[-1].isfinite()):
            return f"{what} differ by {float(share):.1e}"
    return ""


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__
