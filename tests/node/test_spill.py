"""Rows on the disk: sealed, in order, gone when nobody wants them; a disk that refuses is left alone for a while."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node import spill
from node.folder import DataFolder
from node.spill import SpillFiles

ROWS = (memoryview(b"private " * 100), memoryview(b"rows"))
PLAIN = b"private " * 100 + b"rows"


class Clock:
    now = 100.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with DataFolder(tmp_path / "data") as data:
        return data.subfolder("spill")


@pytest.fixture
def files(folder: Path, clock: Clock) -> Iterator[SpillFiles]:
    made = SpillFiles(folder, lambda: clock.now)
    yield made
    made.close()


def inside(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def move(folder: Path, to: Path) -> None:
    folder.rename(to)


async def told(ask: Any, *arguments: Any) -> Any:
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    ask(*arguments, answer.set_result)
    return await asyncio.wait_for(answer, 30.0)


async def test_what_was_written_is_read_and_the_file_says_nothing(files: SpillFiles, folder: Path) -> None:
    assert await told(files.write, 7, ROWS) is True
    (path,) = inside(folder)
    assert (mode(path), mode(folder)) == (0o600, 0o700)
    assert b"private" not in path.read_bytes()
    assert await told(files.read, 7) == PLAIN
    assert files.read_bytes == len(PLAIN)


async def test_what_is_asked_is_done_in_order(files: SpillFiles, folder: Path) -> None:
    answers: list[Any] = []
    over = asyncio.Event()
    files.write(1, ROWS, answers.append)
    files.read(1, answers.append)
    files.remove((1,))
    files.read(1, lambda found: (answers.append(found), over.set()))
    await asyncio.wait_for(over.wait(), 30.0)
    assert (answers, inside(folder)) == ([True, PLAIN, None], [])


@pytest.mark.parametrize("harm", ["flip", "cut", "other"])
async def test_a_file_that_was_changed_is_not_read(harm: str, files: SpillFiles, folder: Path) -> None:
    await told(files.write, 1, ROWS)
    await told(files.write, 2, ROWS)
    raw = (folder / "1").read_bytes()
    changed = {"flip": bytes([raw[0] ^ 1]) + raw[1:], "cut": raw[:9], "other": (folder / "2").read_bytes()}[harm]
    (folder / "1").write_bytes(changed)
    assert await told(files.read, 1) is None
    assert await told(files.read, 2) == PLAIN


async def test_another_life_can_read_nothing_and_removes_it(files: SpillFiles, folder: Path) -> None:
    await told(files.write, 1, ROWS)
    raw = (folder / "1").read_bytes()
    other = SpillFiles(folder)
    assert inside(folder) == []
    (folder / "1").write_bytes(raw)
    assert await told(other.read, 1) is None
    other.close()


async def test_a_disk_that_refuses_is_asked_again_later(files: SpillFiles, folder: Path, clock: Clock) -> None:
    move(folder, folder.with_name("away"))
    assert await told(files.write, 1, ROWS) is False
    move(folder.with_name("away"), folder)
    assert await told(files.write, 2, ROWS) is False
    clock.now += spill.AGAIN_S
    assert await told(files.write, 3, ROWS) is True


async def test_a_disk_that_is_full_keeps_no_half_of_a_file(
    files: SpillFiles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "1").symlink_to("/dev/full")  # stands for a disk without room: opening works, writing does not
    monkeypatch.setattr("node.spill.os.O_EXCL", 0)
    assert await told(files.write, 1, ROWS) is False
    assert inside(folder) == []


async def test_who_is_closed_answers_nobody_and_leaves_nothing(files: SpillFiles, folder: Path) -> None:
    answers: list[Any] = []
    for number in range(20):
        files.write(number, ROWS, answers.append)
    await asyncio.to_thread(files.close)
    seen = len(answers)
    await asyncio.sleep(0)
    assert (inside(folder), len(answers)) == ([], seen)
