"""Journals on disk: read back as written, sealed, whole up to where a power cut tore them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.pipeline.messages import SessionRequest
from mesh.types import ModelId, SamplingParams
from node.session_log import Head, Kept, SessionLogs, Tail

PROMPT = (7_001, 7_002, 7_003)
HEAD = Head(
    (3, "owner"), SessionRequest(model=ModelId("m"), prompt=PROMPT, sampling=SamplingParams(), form=b"secret"), 0
)


def logs(folder: Path) -> SessionLogs:
    (folder / "sessions").mkdir(exist_ok=True)
    return SessionLogs(folder / "sessions", folder / "sessions.key")


def written(folder: Path) -> Path:
    made = logs(folder)
    made.begin("s1", HEAD)
    made.append("s1", Tail((11, 12), 50.0))
    made.append("s1", Tail((13,), 40.0))
    return folder / "sessions" / "s1.session"


def test_what_was_written_is_read_by_the_next_life(tmp_path: Path) -> None:
    written(tmp_path)
    after = logs(tmp_path)
    assert after.names() == ["s1"]
    assert after.read("s1") == Kept("s1", HEAD, (11, 12, 13), 40.0)
    after.append("s1", Tail((14,), 30.0))
    assert logs(tmp_path).read("s1") == Kept("s1", HEAD, (11, 12, 13, 14), 30.0)


def test_a_head_alone_has_all_its_time(tmp_path: Path) -> None:
    made = logs(tmp_path)
    made.begin("s1", HEAD)
    assert made.read("s1") == Kept("s1", HEAD, (), 600.0)


def test_nothing_lies_there_in_clear_and_nobody_else_may_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert b"secret" not in path.read_bytes()
    assert (path.stat().st_mode & 0o777, (tmp_path / "sessions.key").stat().st_mode & 0o777) == (0o600, 0o600)


def test_a_torn_end_is_cut_off_and_written_anew(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    ends = [Kept("s1", HEAD, tokens, left) for tokens, left in (((), 600.0), ((11, 12), 50.0), ((11, 12, 13), 40.0))]
    seen = []
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = logs(tmp_path).read("s1")
        if kept not in seen:
            seen.append(kept)
    assert seen == [None, *ends]
    path.write_bytes(whole[:-5])
    again = logs(tmp_path)
    again.read("s1")
    again.append("s1", Tail((99,), 1.0))
    assert logs(tmp_path).read("s1") == Kept("s1", HEAD, (11, 12, 99), 1.0)


def test_what_was_changed_moved_or_sealed_with_another_key_is_not_believed(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert logs(tmp_path).read("s1") == Kept("s1", HEAD, (11, 12), 50.0)
    path.with_name("s2.session").write_bytes(whole)
    assert logs(tmp_path).read("s2") is None
    (tmp_path / "sessions.key").write_bytes(bytes(32))
    path.write_bytes(whole)
    assert logs(tmp_path).read("s1") is None


def test_a_length_that_lies_allocates_nothing(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_bytes(b"\xff\xff\xff\xff" + path.read_bytes())
    assert logs(tmp_path).read("s1") is None


def test_what_is_removed_is_gone(tmp_path: Path) -> None:
    path = written(tmp_path)
    made = logs(tmp_path)
    made.remove("s1")
    made.remove("s1")
    assert (path.exists(), made.names(), made.read("s1")) == (False, [], None)


@pytest.mark.parametrize("name", ["../x", "", "a/b", "a" * 200])
def test_a_name_that_is_none_is_our_bug(tmp_path: Path, name: str) -> None:
    with pytest.raises(AssertionError):
        logs(tmp_path).remove(name)
