"""docs/named-cases.md is true: every case has its test, every transcript is named, and there are enough of both."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "named-cases.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (\w+)::(\w+)(?:\[[^|]*)? \|$", PAGE, re.MULTILINE)
TRANSCRIPTS = re.findall(r"`([a-z_]+)`[,.]", PAGE)


def test_every_row_is_read() -> None:
    assert len(ROWS) == sum(line.startswith("| ") and "::" in line for line in PAGE.splitlines())


def test_every_named_case_has_its_test() -> None:
    sources = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [f"{file}::{test}" for _, _, file, test in ROWS if f"def {test}(" not in sources.get(file, "")]
    assert missing == []


def test_every_transcript_is_named() -> None:
    assert sorted(path.stem for path in (ROOT / "tests" / "scenarios").glob("*.txt")) == TRANSCRIPTS


def test_there_are_at_least_eighty_and_none_twice() -> None:
    cases = [(source, case) for source, case, _, _ in ROWS]
    assert len(cases) == len(set(cases))
    assert len(cases) + len(TRANSCRIPTS) >= 80
