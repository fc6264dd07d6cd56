"""Session journals on disk: one file each, sealed, appended to; what a power cut tears off is drawn again.

    file     record, record, ...
    record   u32 big-endian length | nonce 96 bit | AES-256-GCM( msgpack of ``Head`` or ``Tail`` ) + tag 16 bytes
             additional data: the session's id and the record's number, so that none can be moved or left out

The first record is a ``Head``, the others add tokens.  The key lies in the data folder, readable by its owner only: it
protects a copy of the files, not against whoever can read the folder.  All calls block; nothing here is on the way of a
token.
"""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mesh.pipeline.messages import Epoch, SessionId, SessionRequest
from node.journal import fsync_folder, read_or_none, write_durably

KEY_BYTES, NONCE_BYTES = 32, 12
MAX_RECORD = 64 << 20
SUFFIX = ".session"
_LENGTH = struct.Struct("!I")


class Head(msgspec.Struct, frozen=True, tag=True):
    """What a session is, and how it stood when it was first written."""

    epoch: Epoch
    request: SessionRequest
    place: int
    """Who goes on with it first after a restart of all: 0 its owner, then the journal's holders in their order."""


class Tail(msgspec.Struct, frozen=True, tag=True):
    """Tokens that were drawn since, the seconds left until the session's deadline, and whether these are all."""

    tokens: tuple[int, ...]
    left_s: float
    ended: bool = False


class Kept(msgspec.Struct, frozen=True):
    """A session as it is read back."""

    session: SessionId
    head: Head
    drawn: tuple[int, ...]
    left_s: float
    ended: bool = False


class SessionLogs:
    """The files of one folder.  Raises ``OSError`` when the disk refuses."""

    def __init__(self, folder: Path, key_path: Path) -> None:
        self._folder, self._key_path = folder, key_path
        self._cipher: AESGCM | None = None
        self._records: dict[SessionId, int] = {}

    def names(self) -> list[SessionId]:
        return sorted(path.stem for path in self._folder.glob(f"*{SUFFIX}"))

    def age_s(self, session: SessionId) -> float:
        """Since something was written to its file."""
        return time.time() - self._path(session).stat().st_mtime

    def begin(self, session: SessionId, head: Head) -> None:
        """A new file, instead of what there was of that name; durable when this returns."""
        self._records[session] = 0
        self._write(session, [head], os.O_TRUNC)
        fsync_folder(self._folder)

    def append(self, session: SessionId, tail: Tail) -> None:
        """Durable when this returns."""
        self._write(session, [tail], os.O_APPEND)

    def remove(self, session: SessionId) -> None:
        self._records.pop(session, None)
        self._path(session).unlink(missing_ok=True)

    def read(self, session: SessionId) -> Kept | None:
        """What is whole of a file; ``None``: not even its head.  What follows a torn record is cut off."""
        raw = read_or_none(self._path(session)) or b""
        head: Head | None = None
        drawn: list[int] = []
        left_s, ended, end, number = 0.0, False, 0, 0
        for record, behind in self._open_all(session, raw):
            if isinstance(record, Head) == (head is not None):
                break
            if isinstance(record, Head):
                head, left_s = record, record.request.timeout_s
            else:
                drawn += record.tokens
                left_s, ended = record.left_s, record.ended
            end, number = behind, number + 1
        if head is None:
            return None
        if end < len(raw):
            os.truncate(self._path(session), end)
        self._records[session] = number
        return Kept(session, head, tuple(drawn), left_s, ended)

    def _open_all(self, session: SessionId, raw: bytes) -> Iterator[tuple[Head | Tail, int]]:
        at = number = 0
        while at + _LENGTH.size <= len(raw):
            (size,) = _LENGTH.unpack_from(raw, at)
            at += _LENGTH.size
            if not NONCE_BYTES < size <= min(MAX_RECORD, len(raw) - at):
                return
            sealed, at = raw[at : at + size], at + size
            try:
                plain = self._key().decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _context(session, number))
                yield msgspec.msgpack.decode(plain, type=Head | Tail), at
            except (InvalidTag, msgspec.DecodeError):
                return
            number += 1

    def _write(self, session: SessionId, records: list[Head | Tail], flag: int) -> None:
        data = b""
        for record in records:
            nonce, context = os.urandom(NONCE_BYTES), _context(session, self._records[session])
            sealed = nonce + self._key().encrypt(nonce, msgspec.msgpack.encode(record), context)
            data += _LENGTH.pack(len(sealed)) + sealed
            self._records[session] += 1
        descriptor = os.open(self._path(session), os.O_WRONLY | os.O_CREAT | flag, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _key(self) -> AESGCM:
        """Made on first use."""
        if self._cipher is None:
            raw = read_or_none(self._key_path)
            if raw is None or len(raw) != KEY_BYTES:
                raw = os.urandom(KEY_BYTES)
                write_durably(self._key_path, raw)
            self._cipher = AESGCM(raw)
        return self._cipher

    def _path(self, session: SessionId) -> Path:
        assert re.fullmatch(r"[\w-]{1,128}", session, re.ASCII), session
        return self._folder / f"{session}{SUFFIX}"


def _context(session: SessionId, number: int) -> bytes:
    return f"murmur session 1 {session} {number}".encode()
