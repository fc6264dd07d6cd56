import os
import stat
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import ConfigError
from node import journal
from node.journal import Journal, read_or_none, until_stored, write_durably


def test_what_was_stored_is_loaded(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "election")
    assert journal.load() is None
    journal.store(b"term 1")
    journal.store(b"")
    assert Journal(journal.path).load() == b""
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + b"x", lambda raw: b"", lambda raw: b"?" + raw]
)
def test_a_damaged_journal_is_an_error_and_not_an_empty_state(tmp_path: Path, damage: Any) -> None:
    journal = Journal(tmp_path / "election")
    journal.store(b"voted for a in term 7")
    journal.path.write_bytes(damage(journal.path.read_bytes()))
    with pytest.raises(ConfigError, match="damaged"):
        journal.load()


def test_flush_rename_flush_in_that_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b))[1])
    write_durably(tmp_path / "f", b"new")
    assert done == ["fsync", "rename", "fsync"]


def test_a_crash_before_the_rename_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_durably(path, b"old")

    def crash(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            write_durably(path, b"a longer new content")
    assert read_or_none(path) == b"old"
    write_durably(path, b"new")
    assert read_or_none(path) == b"new"


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*folder"):
        read_or_none(tmp_path / "folder")


async def test_a_disk_that_is_full_for_a_while_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "AGAIN_S", 0.0)
    full, told = [OSError(28, "No space left on device")] * 3, list[OSError]()
    kept = Journal(tmp_path / "election")

    def store() -> None:
        if full:
            raise full.pop()
        kept.store(b"term 7")

    await until_stored(store, told.append)
    assert (len(told), kept.load()) == (3, b"term 7")
