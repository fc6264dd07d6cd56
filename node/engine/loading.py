"""Makes a part of a model ready to serve: load, pack, check, test for exactness.  Runs beside the device thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from mesh.errors import ConfigError
from node.engine import attention, exact, experts, products
from node.engine.memory import trim
from node.engine.pages import LayerRoom
from node.engine.selfcheck import Mode, check, find_direct
from node.engine.shard import Shard
from node.engine.span import ONE_AT_A_TIME, Part, load_part, read_config

PIECE_BYTES = 1 << 28
"""Of weights on the disk that are read before they are laid out."""


class Prepared(msgspec.Struct, frozen=True):
    """A part that has passed its checks."""

    shard: Shard
    mode: Mode
    layers: dict[int, LayerRoom]
    """What each takes of a sequence."""
    exact: bool
    hardware: str
    """Nodes of one hardware class give the same bits."""
    why: str = ""
    """Why it is not packed."""


def prepare(
    folder: Path, part: Part, dtype: str, exactness: str, threads: int, quantize: str = "", device: str = "cpu"
) -> Prepared:
    """Load ``part`` from ``folder`` onto ``device``.

    Raises ``ConfigError`` naming the model's kind and why it cannot serve.
    """
    with ONE_AT_A_TIME:
        try:
            return _prepare(folder, part, dtype, exactness, threads, quantize, torch.device(device))
        except (ConfigError, AssertionError):
            raise
        except Exception as error:  # a model's code is its authors': whatever it raises, this node cannot serve it
            raise ConfigError(f"{Path(folder).name} cannot be loaded: {type(error).__name__}: {error}") from error


def _prepare(
    folder: Path, part: Part, dtype: str, exactness: str, threads: int, quantize: str, device: torch.device
) -> Prepared:
    if quantize and device.type != "cpu":
        raise ConfigError(f"{Path(folder).name}: {quantize} weights are computed on the CPU only, not on {device}")
    torch.set_num_threads(threads)
    attention.register()
    experts.register()
    config = read_config(folder)
    served = getattr(torch, dtype)
    size = config.get_text_config(decoder=True).hidden_size
    for form in products.forms_of(size, served, torch.device(device), quantize):
        prepared = _in_form(folder, config, part, served, form, device, exactness, threads)
        if prepared.exact or prepared.mode == "compat" or exactness == "off":
            break
    if exactness == "on" and not prepared.exact:
        raise ConfigError(f"{config.model_type}: not exact on this machine, and --exact on asks for it")
    trim()
    return prepared


def _in_form(
    folder: Path,
    config: Any,
    part: Part,
    dtype: torch.dtype,
    form: products.Form,
    device: torch.device,
    exactness: str,
    threads: int,
) -> Prepared:
    shard = _load(folder, config, part, dtype, form, device)
    runs = _runs(part.layers)
    checks = [check(shard, start, end) for start, end in runs]
    mode: Mode = "packed" if all(c.mode == "packed" for c in checks) else "compat"
    sizes = {i: b for (start, end), c in zip(runs, checks, strict=True) for i, b in _numbered(start, end, c)}
    layers = {i: shard.room_of(i, size) if mode == "packed" else LayerRoom(size) for i, size in sizes.items()}
    shard.use(attention.NAME if mode == "packed" else "eager")
    if mode == "packed":
        find_direct(shard, runs)
    same = mode == "packed" and exactness != "off" and all(exact.make_exact(shard, a, b, threads) for a, b in runs)
    why = next((c.why for c in checks if c.why), "")
    return Prepared(shard, mode, layers, same, exact.hardware_class(device, dtype), why)


def _load(
    folder: Path, config: Any, part: Part, dtype: torch.dtype, form: products.Form, device: torch.device
) -> Shard:
    """Piece by piece: each is laid out before the next is read, so that a second copy is never one of the whole."""
    shard: Shard | None = None
    for piece in _pieces(part, _layer_bytes(folder, config)):
        loaded = Shard(load_part(folder, config, piece, dtype), piece, form, device)
        if shard is None:
            shard = loaded
        else:
            shard.adopt(loaded)
        del loaded
        trim()  # or the holes that packing left in malloc's heap come to half a copy
    assert shard is not None
    return shard


def _layer_bytes(folder: Path, config: Any) -> int:
    """Of a layer on the disk, roughly."""
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return files // int(config.get_text_config(decoder=True).num_hidden_layers)


def _pieces(part: Part, layer_bytes: int) -> list[Part]:
    """Of about ``PIECE_BYTES``; embedding and head, which may be tied, are in one."""
    n = max(1, PIECE_BYTES // max(1, layer_bytes))
    pieces = [Part(part.layers[i : i + n]) for i in range(0, len(part.layers), n)] or [Part(())]
    return [Part(pieces[0].layers, part.embed, part.head), *pieces[1:]]


def _numbered(start: int, end: int, served: Any) -> list[tuple[int, int]]:
    return list(zip(range(start, end), served.layer_bytes, strict=True))


def _runs(layers: tuple[int, ...]) -> list[tuple[int, int]]:
    """Neighbouring layers as ranges."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs
