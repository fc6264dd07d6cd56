"""Where models' files are on this node: folders that are offered whole, and replicas that hold a part.

A replica, ``<data>/models/<manifest id>/``, looks like the model's folder: the small files, and for each
safetensors file a sparse file of the same size in which only the header and some tensors are filled.  The ledger
``verified`` lists the tensors whose SHA-256 was checked, one JSON string a line; a name is appended only after the
tensor's bytes were fsynced, so after a crash everything it lists is there, and only the rest is fetched again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

from mesh.errors import ConfigError, MeshError, PeerError
from node.journal import write_durably
from node.weights.manifest import (
    LEDGER_NAME,
    MANIFEST_NAME,
    Manifest,
    SmallFile,
    Tensor,
    TensorFile,
    decode,
    is_manifest_id,
)

SPARE_BYTES = 64 * 1024 * 1024
"""Left free on the disk."""


class WeightsError(MeshError):
    """Weights could not be brought here or kept here; the message says what, how much and why."""

    status = 503
    code = "weights_unavailable"
    retry_after_s = 5.0


class Files:
    """A model's files on this node; ``whole`` ones are served as they are."""

    whole = True

    def __init__(self, manifest: Manifest, manifest_id: str, folder: Path) -> None:
        self.manifest = manifest
        self.id = manifest_id
        self.folder = folder
        self.sizes: dict[str, int] = {small.name: small.size for small in manifest.small}
        self.sizes.update((file.name, file.size) for file in manifest.files)

    def have(self) -> frozenset[str]:
        """Names of the tensors that are here."""
        return frozenset(tensor.name for file in self.manifest.files for tensor in file.tensors)

    def readable(self, name: str, begin: int, end: int) -> bool:
        """Whether bytes [begin, end) of file ``name`` are here and verified."""
        return 0 <= begin <= end <= self.sizes.get(name, -1)


class Replica(Files):
    """A part of a model's files, filled tensor by tensor.  Its methods do file work: call them off the event loop."""

    whole = False

    def __init__(self, manifest: Manifest, manifest_id: str, folder: Path) -> None:
        super().__init__(manifest, manifest_id, folder)
        self._tensors = manifest.tensors()
        self._whole_files = {small.name for small in manifest.small if self._is_intact(small)}
        self._headers = {file.name for file in manifest.files if self._has_header(file)}
        self._have = self._read_ledger()
        self._ranges: dict[str, list[tuple[int, int]]] = {}

    # --- what is here

    def have(self) -> frozenset[str]:
        return frozenset(self._have)

    def holds(self, name: str) -> bool:
        """Whether this tensor is here."""
        return name in self._have

    def readable(self, name: str, begin: int, end: int) -> bool:
        if name in self._whole_files:
            return super().readable(name, begin, end)
        ranges = self._ranges.get(name) or self._ranges.setdefault(name, self._filled(name))
        index = bisect_right(ranges, (begin, self.sizes.get(name, 0))) - 1
        return 0 <= begin <= end and index >= 0 and ranges[index][0] <= begin and end <= ranges[index][1]

    def missing_small(self) -> list[SmallFile]:
        return [small for small in self.manifest.small if small.name not in self._whole_files]

    def missing_headers(self) -> list[TensorFile]:
        return [file for file in self.manifest.files if file.name not in self._headers]

    def missing(self, names: Iterable[str]) -> list[tuple[TensorFile, Tensor]]:
        """The named tensors that are not here, in the order of their files; raises ``WeightsError`` on unknown ones."""
        unknown = [name for name in names if name not in self._tensors]
        if unknown:
            raise WeightsError(f"model {self.id[:12]} has no tensor {unknown[0]!r} ({len(unknown)} unknown names)")
        absent = [self._tensors[name] for name in dict.fromkeys(names) if name not in self._have]
        return sorted(absent, key=lambda pair: (pair[0].name, pair[1].begin))

    def _filled(self, name: str) -> list[tuple[int, int]]:
        """Verified ranges of a safetensors file, merged, in order."""
        file = next((file for file in self.manifest.files if file.name == name), None)
        if file is None:
            return []
        pieces = [(0, file.header_bytes)] if name in self._headers else []
        pieces += [(tensor.begin, tensor.end) for tensor in file.tensors if tensor.name in self._have]
        merged: list[tuple[int, int]] = []
        for begin, end in pieces:
            if merged and merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((begin, end))
        return merged

    # --- filling it

    def require_space(self, size: int) -> None:
        """Raise ``WeightsError`` when the disk has no room for ``size`` more bytes."""
        free = shutil.disk_usage(self.folder).free
        if free < size + SPARE_BYTES:
            raise WeightsError(
                f"the disk of {self.folder} has {free} bytes free and {size} are to be fetched: "
                "make room there, or choose another --data-dir"
            )

    def put_small(self, small: SmallFile, data: bytes) -> None:
        """Keep a small file; raises ``PeerError`` when the bytes are not its own."""
        if hashlib.sha256(data).hexdigest() != small.sha256:
            raise PeerError(f"{small.name} of model {self.id[:12]} came with other bytes than its manifest says")
        with _Disk(self.folder):
            write_durably(self.folder / small.name, data)
        self._whole_files.add(small.name)

    def put_header(self, file: TensorFile, data: bytes) -> None:
        """Make a safetensors file, sparse, with its header; raises ``PeerError`` when the bytes are not its own."""
        if hashlib.sha256(data).hexdigest() != file.header_sha256:
            raise PeerError(f"the header of {file.name} of model {self.id[:12]} came with other bytes")
        with _Disk(self.folder), (self.folder / file.name).open("ab") as stream:
            os.ftruncate(stream.fileno(), file.size)
        self.write(file, 0, data)
        self.sync(file)
        self._headers.add(file.name)
        self._ranges.pop(file.name, None)

    def write(self, file: TensorFile, offset: int, data: bytes) -> None:
        """Put bytes where they belong; they count only after ``record``."""
        with _Disk(self.folder), (self.folder / file.name).open("r+b", buffering=0) as stream:
            view, stream_offset = memoryview(data), offset
            while view:
                written = os.pwrite(stream.fileno(), view, stream_offset)
                view, stream_offset = view[written:], stream_offset + written

    def sync(self, file: TensorFile) -> None:
        with _Disk(self.folder), (self.folder / file.name).open("r+b") as stream:
            os.fsync(stream.fileno())

    def record(self, file: TensorFile, names: list[str]) -> None:
        """Enter verified tensors of ``file`` into the ledger, durably, after making their bytes durable."""
        if not names:
            return
        self.sync(file)
        with _Disk(self.folder), (self.folder / LEDGER_NAME).open("ab") as ledger:
            ledger.write(b"".join(json.dumps(name).encode() + b"\n" for name in names))
            ledger.flush()
            os.fsync(ledger.fileno())
        self._have.update(names)
        self._ranges.pop(file.name, None)

    # --- after a restart

    def _is_intact(self, small: SmallFile) -> bool:
        path = self.folder / small.name
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == small.sha256

    def _has_header(self, file: TensorFile) -> bool:
        path = self.folder / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        with path.open("rb") as stream:
            return hashlib.sha256(stream.read(file.header_bytes)).hexdigest() == file.header_sha256

    def _read_ledger(self) -> set[str]:
        """Verified tensors; a torn last line, left by a crash, is cut off."""
        path = self.folder / LEDGER_NAME
        if not path.exists():
            return set()
        raw = path.read_bytes()
        sound = raw[: raw.rfind(b"\n") + 1]
        if len(sound) < len(raw):
            os.truncate(path, len(sound))
        names = (_ledger_name(line) for line in sound.splitlines())
        return {n for n in names if n in self._tensors and self._tensors[n][0].name in self._headers}


def _ledger_name(line: bytes) -> str:
    """The name on a line of the ledger; a damaged line names no tensor, so that one is fetched again."""
    try:
        return str(json.loads(line))
    except ValueError:
        return ""


class _Disk:
    """Turns the disk's refusals into ``WeightsError``, with what to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "the disk is full: make room there, or choose another --data-dir" if full else str(error)
            raise WeightsError(f"weights cannot be written to {self.folder}: {why}") from error


class Store:
    """All models' files on this node, by manifest id."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files: dict[str, Files] = {}

    def add_whole(self, manifest: Manifest, folder: Path) -> Files:
        """Serve ``folder``, which holds everything that ``manifest`` names."""
        files = Files(manifest, manifest.id, folder)
        self._files[files.id] = files
        return files

    def find(self, manifest_id: str) -> Files | None:
        """The model's files here, whole or in part; ``None``: nothing.  Reads the disk at first use of a replica."""
        known = self._files.get(manifest_id)
        if known is None and is_manifest_id(manifest_id) and (self.root / manifest_id / MANIFEST_NAME).is_file():
            try:
                manifest = decode((self.root / manifest_id / MANIFEST_NAME).read_bytes(), manifest_id)
            except PeerError:
                return None  # damaged on disk: it is fetched and written anew
            known = self._files[manifest_id] = Replica(manifest, manifest_id, self.root / manifest_id)
        return known

    def known(self, manifest_id: str) -> Files | None:
        """Like ``find``, but without touching the disk: what was offered, fetched or found since the start."""
        return self._files.get(manifest_id)

    def create(self, manifest_id: str, raw: bytes) -> Files:
        """Begin a replica from its manifest's bytes; raises ``PeerError`` when they are not this manifest's."""
        found = self.find(manifest_id)
        if found is not None:
            return found
        manifest, folder = decode(raw, manifest_id), self.root / manifest_id
        with _Disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(folder / MANIFEST_NAME, raw)
        replica = self._files[manifest_id] = Replica(manifest, manifest_id, folder)
        return replica

    def open_all(self) -> list[str]:
        """Find all replicas on the disk (at start, off the event loop); their manifest ids."""
        if not self.root.is_dir():
            return []
        return [path.name for path in sorted(self.root.iterdir()) if self.find(path.name) is not None]

    def remove(self, manifest_id: str) -> None:
        """Delete a replica; raises ``ConfigError`` for a folder that is offered, which is not ours to delete."""
        files = self.find(manifest_id)
        if files is not None and files.whole:
            raise ConfigError(f"model {manifest_id[:12]} is offered from {files.folder}: it is not deleted")
        self._files.pop(manifest_id, None)
        if is_manifest_id(manifest_id):
            shutil.rmtree(self.root / manifest_id, ignore_errors=True)
