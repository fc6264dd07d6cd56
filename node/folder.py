"""A node's data folder: one process at a time, private to its owner, the same node after every restart.

    lock          held (flock) by the running process
    identity.key  Ed25519 and X25519 private keys, raw, 64 bytes
    incarnation   the last one used, in decimal
    admin.key     what the command line shows to administer this node
    mesh.pem      leaf certificate, CA certificate(s), leaf private key: the membership (node.security.membership)
    election      the election's durable state (a Journal)
    sessions.key  what sessions/, the journals of class batch, are sealed with (node.session_log)

Other parts keep subfolders here (models/, sessions/, spill/, collections); this module knows none of them.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from pathlib import Path
from types import TracebackType

from mesh.errors import ConfigError
from node.identity import KEY_BYTES, Identity
from node.journal import Journal, read_or_none, write_durably
from node.security.keys import ADMIN_PREFIX, new_admin_key
from node.security.membership import Membership


class DataFolder:
    """An opened, locked data folder.  ``close`` (or leaving ``with``) lets another process have it."""

    def __init__(self, path: Path) -> None:
        """Create ``path`` (0700) where missing, and lock it.  Raises ``ConfigError`` in one clear line."""
        self.path = path
        _make_private(path)
        self._lock = _lock(path)

    def identity(self) -> Identity:
        """The node's keys, made on first use.  Raises ``ConfigError`` when damaged or readable by others."""
        path = self.path / "identity.key"
        raw = read_or_none(path)
        if raw is None:
            identity = Identity.generate()
            write_durably(path, b"".join(identity.secrets()))
            return identity
        _refuse_open_mode(path)
        if len(raw) != 2 * KEY_BYTES:
            raise ConfigError(f"{path} is damaged; restore it, or start with a new --data-dir as a new node")
        return Identity.from_secrets(raw[:KEY_BYTES], raw[KEY_BYTES:])

    def next_incarnation(self, now_ms: int | None = None) -> int:
        """A number above every one that this folder ever gave; durable when this returns, so a restart always wins."""
        path = self.path / "incarnation"
        raw = read_or_none(path)
        now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
        try:
            stored = int(raw) if raw is not None else 0
        except ValueError:
            raise ConfigError(f"{path} is damaged: it must hold one whole number") from None
        incarnation = max(stored + 1, now_ms)
        write_durably(path, b"%d\n" % incarnation)
        return incarnation

    def keep_incarnation(self, incarnation: int) -> None:
        """Remember a higher one that a refutation took while running."""
        write_durably(self.path / "incarnation", b"%d\n" % incarnation)

    def admin_key(self) -> str:
        """The key of the administrative verbs, made on first use."""
        path = self.path / "admin.key"
        if read_or_none(path) is None:
            write_durably(path, f"{new_admin_key()}\n".encode())
        return read_admin_key(path)

    def membership(self) -> Membership | None:
        """The mesh that this folder belongs to; ``None`` for a fresh one.  Raises ``ConfigError`` when damaged."""
        raw = read_or_none(self.membership_path)
        if raw is None:
            return None
        _refuse_open_mode(self.membership_path)
        try:
            return Membership.from_pem(raw)
        except ValueError as error:
            raise ConfigError(f"{self.membership_path} is damaged: {error}") from error

    def save_membership(self, membership: Membership) -> None:
        """Durable when this returns."""
        write_durably(self.membership_path, membership.to_pem())

    @property
    def membership_path(self) -> Path:
        """The PEM file that TLS contexts load."""
        return self.path / "mesh.pem"

    def election_journal(self) -> Journal:
        return Journal(self.path / "election")

    def subfolder(self, name: str) -> Path:
        """A private folder of that name inside, made where missing."""
        path = self.path / name
        _make_private(path)
        return path

    def close(self) -> None:
        """Give the lock back; harmless twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> DataFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_admin_key(path: Path) -> str:
    """The admin key in ``path`` (the command line reads it too).  Raises ``ConfigError``."""
    raw = read_or_none(path)
    if raw is None:
        raise ConfigError(f"no admin key at {path}: name the node's --data-dir or --admin-key-file")
    _refuse_open_mode(path)
    key = raw.decode(errors="replace").strip()
    if not key.startswith(ADMIN_PREFIX):
        raise ConfigError(f"{path} holds no admin key ({ADMIN_PREFIX}...)")
    return key


def refuse_other_mesh(folder: DataFolder, membership: Membership, mesh_id: str) -> None:
    """Raise ``ConfigError`` when ``folder`` belongs to another mesh than ``mesh_id``: meshes never merge."""
    if membership.mesh_id != mesh_id:
        raise ConfigError(
            f"data folder {folder.path} belongs to mesh {membership.mesh_id[:8]}, the token is for mesh "
            f"{mesh_id[:8]}: give another --data-dir"
        )


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o700)
    except FileExistsError:
        raise ConfigError(f"data folder {path} is a file") from None
    except OSError as error:
        raise ConfigError(f"cannot use data folder {path}: {error.strerror}") from error


def _lock(path: Path) -> int:
    """A descriptor that holds the lock; the kernel frees it with the process, so no stale lock can remain."""
    try:
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use data folder {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        by = f" (process {holder})" if holder.isdigit() else ""
        raise ConfigError(f"data folder {path} is in use by another node{by}: give another --data-dir") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    return descriptor


def _refuse_open_mode(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode:04o}): run chmod 600 on it")
