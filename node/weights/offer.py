"""Offering a model: from a Hugging Face folder (or hub id) to its manifest and its figures.

All of it is file work and hashing (about 1.8 GB/s a core), so it runs on threads; what was hashed is remembered
by path, size and modification time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import msgspec

from mesh.errors import ConfigError
from mesh.types import ModelInfo
from node.journal import write_durably
from node.weights.manifest import (
    MAX_HEADER_BYTES,
    MAX_SMALL_FILE_BYTES,
    HeaderTensor,
    Manifest,
    SmallFile,
    Tensor,
    TensorFile,
    check,
    check_shape,
    is_file_name,
    parse_header,
)
from node.weights.sizes import model_info, read_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SMALL_SUFFIXES = {".json", ".txt", ".model", ".jinja"}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
HASH_THREADS = min(4, os.cpu_count() or 1)
CHUNK = 4 * 1024 * 1024

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Offer(msgspec.Struct, frozen=True):
    """A model that this node holds whole."""

    folder: Path
    manifest: Manifest
    info: ModelInfo


async def offer(source: str | Path, name: str, dtype: str, cache: Path, quantize: str = "") -> Offer:
    """Read the model at ``source``, a folder or a hub id, to be served as ``name`` in ``dtype``, perhaps quantized.

    ``cache`` is a folder for remembered hashes.  Raises ``ConfigError`` that names what is wrong with the source.
    """
    return await asyncio.to_thread(_offer, source, name, dtype, cache, quantize)


def default_name(source: str | Path) -> str:
    """The name of a model that was given none: the last part of its path or hub id."""
    return Path(str(source).rstrip("/")).expanduser().resolve().name if _is_path(source) else str(source).split("/")[-1]


def check_source(source: str | Path) -> list[Path]:
    """The safetensors files of the model at ``source``; a quick look, before anything is imported or hashed.

    Raises ``ConfigError`` that names what is wrong with the source.
    """
    folder = find_folder(source)
    read_config(folder)
    files = [folder / file for file in _tensor_files(folder)]
    _require_tokenizer(folder)
    return files


def _offer(source: str | Path, name: str, dtype: str, cache: Path, quantize: str) -> Offer:
    files = check_source(source)
    folder = files[0].parent
    manifest = Manifest(_small_files(folder), tuple(_remembered(path, cache) for path in files))
    try:
        check(manifest)
    except ValueError as error:
        raise ConfigError(f"model folder {folder}: {error}") from None
    _require_indexed(folder, manifest)
    return Offer(folder, manifest, model_info(name, folder, manifest, dtype, quantize))


def _is_path(source: str | Path) -> bool:
    return isinstance(source, Path) or Path(source).expanduser().exists() or not _HUB_ID.fullmatch(source)


def find_folder(source: str | Path) -> Path:
    """The folder of a model: as named, or brought from the hub."""
    if not _is_path(source):
        return _from_hub(str(source))
    folder = Path(source).expanduser()
    if not folder.exists():
        raise ConfigError(f"model {str(source)!r}: there is no such folder, and it has not the form of a hub id")
    if not folder.is_dir():
        raise ConfigError(f"model {str(source)!r} is not a folder; name the folder with config.json in it")
    return folder.resolve()


def _from_hub(hub_id: str) -> Path:
    """Download (or find in the hub's own cache) the files that are served; never code, never pickled weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [f"*{suffix}" for suffix in sorted(SMALL_SUFFIXES)] + ["*.safetensors"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConfigError(
            f"model {hub_id!r} is not a folder here, and the hub cannot be reached "
            f"(no network, or HF_HUB_OFFLINE is set): {_first_line(error)}"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(f"model {hub_id!r} could not be fetched from the hub: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _tensor_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold the model, in order."""
    if (folder / INDEX).exists():
        return sorted(set(_weight_map(folder).values()))
    if (folder / SINGLE).exists():
        return [SINGLE]
    others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"})
    has = f"it has {', '.join(others[:4])}, but only safetensors are accepted" if others else "it holds no weights"
    raise ConfigError(f"model folder {folder} has neither {SINGLE} nor {INDEX}: {has}")


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        table = json.loads((folder / INDEX).read_text())["weight_map"]
        table = msgspec.convert(table, dict[str, str])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / INDEX} is not an index of tensors: {error}") from None
    for name in table.values():
        if not is_file_name(name) or not (folder / name).is_file():
            raise ConfigError(f"{folder / INDEX} names {name!r}, which is not in the folder")
    return table


def _require_indexed(folder: Path, manifest: Manifest) -> None:
    if (folder / INDEX).exists():
        here = {tensor.name: file.name for file in manifest.files for tensor in file.tensors}
        for name, file in _weight_map(folder).items():
            if here.get(name) != file:
                raise ConfigError(f"{folder / INDEX} says that {file} holds tensor {name}, but it does not")


def _require_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ConfigError(f"model folder {folder} has no tokenizer (one of {', '.join(TOKENIZERS)})")


def _small_files(folder: Path) -> tuple[SmallFile, ...]:
    """Everything small that loading and tokenizing may need; code and other frameworks' weights are left out."""
    small = []
    for path in sorted(folder.iterdir()):
        if path.suffix in SMALL_SUFFIXES and path.is_file() and is_file_name(path.name) and ".bin." not in path.name:
            data = path.read_bytes() if path.stat().st_size <= MAX_SMALL_FILE_BYTES else b""
            if data:
                small.append(SmallFile(path.name, len(data), hashlib.sha256(data).hexdigest()))
    return tuple(small)


class _Remembered(msgspec.Struct, frozen=True):
    path: str
    size: int
    mtime_ns: int
    file: TensorFile


def _remembered(path: Path, cache: Path) -> TensorFile:
    """``hash_file``, unless the same path was hashed with the same size and modification time."""
    stat, full = path.stat(), str(path.resolve())
    note = cache / f"{hashlib.sha256(full.encode()).hexdigest()}.json"
    try:
        known = msgspec.json.decode(note.read_bytes(), type=_Remembered)
        if (known.path, known.size, known.mtime_ns) == (full, stat.st_size, stat.st_mtime_ns):
            return known.file
    except (OSError, msgspec.MsgspecError):
        pass  # not hashed before, or the note is torn: hash it now
    file = hash_file(path)
    cache.mkdir(parents=True, exist_ok=True)
    write_durably(note, msgspec.json.encode(_Remembered(full, stat.st_size, stat.st_mtime_ns, file)))
    return file


def hash_file(path: Path) -> TensorFile:
    """Check a safetensors file's header and hash each of its tensors; raises ``ConfigError``."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ConfigError(f"{path} is not a safetensors file: its header would have {length} of {size} bytes")
        raw = stream.read(length)
        try:
            table = sorted(parse_header(raw).items(), key=lambda item: item[1].data_offsets)
            _check_table(table, size - 8 - length)
        except ValueError as error:
            raise ConfigError(f"{path} has a corrupt header: {error}") from None
        ranges = [(8 + length + t.data_offsets[0], 8 + length + t.data_offsets[1]) for _, t in table]
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            digests = list(pool.map(lambda r: _hash_range(stream.fileno(), *r), ranges))
    tensors = tuple(
        Tensor(name, entry.dtype, entry.shape, begin, end, digest)
        for (name, entry), (begin, end), digest in zip(table, ranges, digests, strict=True)
    )
    header = length.to_bytes(8, "little") + raw
    return TensorFile(path.name, size, len(header), hashlib.sha256(header).hexdigest(), tensors)


def _check_table(table: Iterable[tuple[str, HeaderTensor]], data_bytes: int) -> None:
    entries = list(table)
    for name, entry in entries:
        begin, end = entry.data_offsets
        if not 0 <= begin <= end <= data_bytes:
            raise ValueError(f"tensor {name[:80]} lies at [{begin}, {end}) of {data_bytes} bytes")
        check_shape(f"tensor {name[:80]}", entry.dtype, entry.shape, end - begin)
    for (a, before), (b, after) in pairwise(entries):
        if after.data_offsets[0] < before.data_offsets[1]:
            raise ValueError(f"tensors {a[:80]} and {b[:80]} overlap")


def _hash_range(descriptor: int, begin: int, end: int) -> str:
    digest = hashlib.sha256()
    while begin < end:
        data = os.pread(descriptor, min(CHUNK, end - begin), begin)
        if not data:
            raise ConfigError("a weight file became shorter while it was read")
        digest.update(data)
        begin += len(data)
    return digest.hexdigest()
