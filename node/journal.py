"""Durable files: what was written before a crash is there after it, whole or not at all.

One way to write (etcd, Raft section 5.1): a temporary file beside the target, fsync, rename, fsync of the folder.  A
reader sees the old content or the new, never a mixture, also after a power cut.  All calls block for two disk flushes
(measured 8 ms on a shared virtual disk), which is the price of a vote; nothing on the path of a token is written here.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from mesh.errors import ConfigError

MAGIC = b"murmur journal 1\n"
DIGEST_BYTES = 32
AGAIN_S = 1.0
"""A disk that refused is tried again after this long."""


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``; when this returns, a power cut does not undo it.  Raises ``OSError``."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        os.fchmod(descriptor, mode)  # a left-over temporary keeps its old mode otherwise
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames and creations in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_or_none(path: Path) -> bytes | None:
    """The content of ``path``; ``None`` where there is no such file.  Raises ``ConfigError`` when it is unreadable."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


class Journal:
    """One durable value of bytes in one file, with a checksum against a disk that lies.

    The election's state lives in one: a term or vote that silently went back would break its safety (R2), so a damaged
    file is an error that stops the node, not an empty state.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> bytes | None:
        """What was stored last; ``None`` before the first ``store``.  Raises ``ConfigError`` when damaged."""
        raw = read_or_none(self.path)
        if raw is None:
            return None
        head = len(MAGIC) + DIGEST_BYTES
        data = raw[head:]
        if raw[:head] != MAGIC + hashlib.sha256(data).digest():
            raise ConfigError(f"{self.path} is damaged: a node must not vote from it; start with a new data folder")
        return data

    def store(self, data: bytes) -> None:
        """Durable when this returns.  Raises ``OSError`` when the disk refuses: the caller must not act on ``data``."""
        write_durably(self.path, MAGIC + hashlib.sha256(data).digest() + data)


async def until_stored(store: Callable[[], None], refused: Callable[[OSError], None]) -> None:
    """Run ``store`` in a thread until it succeeds; ``refused`` hears of every ``OSError``."""
    while True:
        try:
            return await asyncio.to_thread(store)
        except OSError as error:
            refused(error)
            await asyncio.sleep(AGAIN_S)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
