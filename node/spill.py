"""Checkpointed rows that memory has no room for: one sealed file each, written and read off the loop.

    file    AES-256-GCM( rows ) + tag 16 bytes; nonce: the file's number, 96 bit

Rows are what layers made of private prompts.  The key is drawn when the process starts and is nowhere but in its
memory, so what a lost or copied disk holds of them says nothing.  Files are not synced: they are of no use to a later
life, which begins by removing them.  One thread does everything, in the order in which it was asked.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from node.telemetry import get_logger

AGAIN_S = 10.0
"""A disk that refused is not written to for so long."""

T = TypeVar("T")


class SpillFiles:
    """The files of one folder, which is for nothing else."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Removes what an earlier life left in ``folder``."""
        self._folder, self._clock = folder, clock
        self._cipher = AESGCM(AESGCM.generate_key(256))
        self._thread = ThreadPoolExecutor(1, "spill")
        self._again_at, self._closed = 0.0, False
        self.read_bytes = 0
        """Of rows that were asked for, and were there."""
        self._log = get_logger("spill")
        self._clear()

    def write(self, number: int, rows: tuple[memoryview, ...], answer: Callable[[bool], None]) -> None:
        """``answer`` is told on the loop whether they are there.  ``number`` names nothing else in this life."""
        self._ask(lambda: self._write(number, rows), answer)

    def read(self, number: int, answer: Callable[[bytes | None], None]) -> None:
        """``answer`` is told on the loop; ``None``: they cannot be read."""
        self._ask(lambda: self._read(number), answer)

    def remove(self, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            self._thread.submit(self._unlink, self._path(number))

    def close(self) -> None:
        """Blocks until what is under way is done.  Nobody is answered any more, and nothing is left."""
        self._closed = True
        self._thread.shutdown(cancel_futures=True)
        self._clear()

    def _ask(self, act: Callable[[], T], answer: Callable[[T], None]) -> None:
        done = asyncio.get_running_loop().run_in_executor(self._thread, act)
        done.add_done_callback(lambda future: None if self._closed else answer(future.result()))

    def _write(self, number: int, rows: tuple[memoryview, ...]) -> bool:
        if self._clock() < self._again_at:
            return False
        sealed = self._cipher.encrypt(_nonce(number), b"".join(rows), None)
        try:
            with open(os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(sealed)
        except OSError as error:
            self._again_at = self._clock() + AGAIN_S
            self._log.warning("checkpoints are not on disk", why=str(error))
            self._unlink(self._path(number))
            return False
        return True

    def _read(self, number: int) -> bytes | None:
        try:
            rows = self._cipher.decrypt(_nonce(number), self._path(number).read_bytes(), None)
        except (OSError, InvalidTag) as error:
            self._log.warning("checkpoints cannot be read", why=str(error) or "the file was changed")
            return None
        self.read_bytes += len(rows)
        return rows

    def _clear(self) -> None:
        for path in self._folder.iterdir():
            self._unlink(path)

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._log.warning("checkpoints are left on disk", why=str(error))

    def _path(self, number: int) -> Path:
        return self._folder / str(number)


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")
