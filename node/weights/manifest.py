"""The manifest: what a model's files are, byte for byte, down to each tensor.

Its SHA-256 is the model's identity in the mesh: whoever has the manifest can take any tensor from anybody and know
that it is the right one.  Manifests come from peers, so everything that the rest of this package relies on
(names without paths, ranges inside their files, sizes that agree with shapes) is checked in ``decode``.
"""

from __future__ import annotations

import hashlib
import re
from math import prod
from typing import Any

import msgspec

from mesh.errors import PeerError

MAX_MANIFEST_BYTES = 64 * 1024 * 1024
"""A model of 100,000 tensors needs some 20 MB."""
MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file; the format's own limit."""
MAX_SMALL_FILE_BYTES = 256 * 1024 * 1024
MANIFEST_NAME = "manifest.json"
LEDGER_NAME = "verified"
RESERVED = {MANIFEST_NAME, LEDGER_NAME}
"""Names in a replica's folder that are not the model's."""

ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
"""Bytes of one element, by safetensors' names."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor; [begin, end) are offsets in its file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    sha256: str

    @property
    def size(self) -> int:
        return self.end - self.begin


class SmallFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that every holder keeps whole: configuration, tokenizer, chat template, index."""

    name: str
    size: int
    sha256: str


class TensorFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A safetensors file: its header is the first ``header_bytes`` (the length field included)."""

    name: str
    size: int
    header_bytes: int
    header_sha256: str
    tensors: tuple[Tensor, ...]
    """In order of ``begin``."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All files of a model, sorted by name."""

    small: tuple[SmallFile, ...]
    files: tuple[TensorFile, ...]
    version: int = 1

    def encode(self) -> bytes:
        """The canonical bytes: JSON, fields in the order declared."""
        return msgspec.json.encode(self)

    @property
    def id(self) -> str:
        """SHA-256 of the canonical bytes, hex."""
        return hashlib.sha256(self.encode()).hexdigest()

    def tensors(self) -> dict[str, tuple[TensorFile, Tensor]]:
        """Every tensor with its file, by name."""
        return {tensor.name: (file, tensor) for file in self.files for tensor in file.tensors}


class HeaderTensor(msgspec.Struct, frozen=True):
    """An entry of a safetensors header; offsets count from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def decode(raw: bytes, manifest_id: str) -> Manifest:
    """The manifest with this id; raises ``PeerError`` when the bytes are another's or break a rule."""
    if len(raw) > MAX_MANIFEST_BYTES:
        raise PeerError(f"manifest of {len(raw)} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
    if hashlib.sha256(raw).hexdigest() != manifest_id:
        raise PeerError(f"the bytes are not manifest {manifest_id[:12]}: their SHA-256 differs")
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
        check(manifest)
    except (msgspec.MsgspecError, ValueError) as error:
        raise PeerError(f"manifest {manifest_id[:12]} breaks a rule: {error}") from None
    return manifest


def is_manifest_id(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def is_file_name(text: str) -> bool:
    """Whether ``text`` may name a file of a model: no path, nothing hidden."""
    return _FILE_NAME.fullmatch(text) is not None


def check(manifest: Manifest) -> None:
    """Raise ``ValueError`` unless names, digests and ranges are what the rest of this package relies on."""
    names = [small.name for small in manifest.small] + [file.name for file in manifest.files]
    tensors = [tensor.name for file in manifest.files for tensor in file.tensors]
    _require(manifest.version == 1, f"version {manifest.version} is not known")
    _require(len(set(names)) == len(names) and RESERVED.isdisjoint(names), "file names are repeated or reserved")
    _require(len(set(tensors)) == len(tensors), "tensor names are repeated")
    for name in names:
        _require(is_file_name(name), f"{name[:80]!r} is not a plain file name")
    for small in manifest.small:
        _require(0 <= small.size <= MAX_SMALL_FILE_BYTES, f"{small.name} has {small.size} bytes")
        _require(is_manifest_id(small.sha256), f"{small.name} has no SHA-256")
    for file in manifest.files:
        _check_file(file)


def _check_file(file: TensorFile) -> None:
    _require(8 <= file.header_bytes <= min(file.size, MAX_HEADER_BYTES + 8), f"{file.name}: bad header length")
    _require(is_manifest_id(file.header_sha256), f"{file.name}: no SHA-256 of the header")
    reached = file.header_bytes
    for tensor in file.tensors:
        where = f"{file.name}: tensor {tensor.name[:80]}"
        _require(is_manifest_id(tensor.sha256), f"{where} has no SHA-256")
        _require(reached <= tensor.begin <= tensor.end <= file.size, f"{where} lies outside the file or overlaps")
        check_shape(where, tensor.dtype, tensor.shape, tensor.size)
        reached = tensor.end


def check_shape(where: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
    """Raise ``ValueError`` unless a tensor of this type and shape has ``size`` bytes."""
    _require(dtype in ITEM_BYTES, f"{where} has the unknown type {dtype[:20]!r}")
    _require(all(n >= 0 for n in shape), f"{where} has a negative dimension")
    _require(prod(shape) * ITEM_BYTES[dtype] == size, f"{where} has {size} bytes, which its shape {shape} contradicts")


def parse_header(raw: bytes) -> dict[str, HeaderTensor]:
    """Entries of a safetensors header (JSON, without the length field); raises ``ValueError``."""
    try:
        table: dict[str, Any] = msgspec.json.decode(raw, type=dict[str, Any])
        table.pop("__metadata__", None)
        return msgspec.convert(table, dict[str, HeaderTensor])
    except msgspec.MsgspecError as error:
        raise ValueError(f"the header is not a table of tensors: {error}") from None


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)
