"""Every verb: what it asks of a node, what it prints, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.errors import ConfigError
from node import cli
from node.ask import NodeRefused
from node.cli import TAKEN_OVER_HERE, main


class FakeNode:
    """Stands for ``Asker``: notes what is asked, answers by verb."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {}
        self.refuses: Exception | None = None
        self.gone = False

    def of(self, arguments: Any) -> FakeNode:
        self.arguments = arguments
        return self

    def get(self, path: str) -> Any:
        self.asked.append(("GET", path))
        return self._answer(path)

    def admin(self, method: str, verb: str, body: Any = None) -> Any:
        self.asked.append((method, verb, body))
        return self._answer(verb)

    def _answer(self, what: str) -> Any:
        if self.refuses:
            raise self.refuses
        return self.answers.get(what, {"ok": True})

    def wait_gone(self) -> None:
        assert self.asked, "before it was asked to leave"
        self.gone = True


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> FakeNode:
    made = FakeNode()
    monkeypatch.setattr(cli, "Asker", made)
    return made


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("status --json", ("GET", "/mesh/status")),
        ("leave", ("POST", "leave", {})),
        ("takeover", ("POST", "takeover", {})),
        ("revoke ann", ("POST", "revoke", {"node": "ann"})),
        ("token create", ("POST", "tokens", {"ttl_s": 86_400.0, "uses": 1})),
        ("token create --ttl 0.5 --uses 3", ("POST", "tokens", {"ttl_s": 1800.0, "uses": 3})),
        ("token create --uses 0", ("POST", "tokens", {"ttl_s": 86_400.0, "uses": None})),
        ("token list", ("GET", "tokens", None)),
        ("token revoke t1", ("DELETE", "tokens/t1", None)),
        ("key create", ("POST", "keys", {"scopes": ["infer"], "ttl_s": None, "name": ""})),
        (
            "key create --scope rag --scope admin --name ci --ttl 2",
            ("POST", "keys", {"scopes": ["rag", "admin"], "ttl_s": 7200.0, "name": "ci"}),
        ),
        ("key create --ttl 0", ("POST", "keys", {"scopes": ["infer"], "ttl_s": 0.0, "name": ""})),
        ("key list", ("GET", "keys", None)),
        ("key revoke k1", ("DELETE", "keys/k1", None)),
        ("models list", ("GET", "models", None)),
        ("models add org/name", ("POST", "models", {"path": "org/name", "name": "name"})),
        ("models add org/name=mine", ("POST", "models", {"path": "org/name", "name": "mine"})),
        ("models remove org/name", ("DELETE", "models/org/name", None)),
    ],
)
def test_what_a_verb_asks(words: str, asked: tuple[Any, ...], node: FakeNode) -> None:
    node.answers = {"tokens": {"command": "c", "data": []}, "keys": {"key": "k", "data": []}, "models": {"data": []}}
    assert main(words.split()) == 0
    assert node.asked == [asked]
    assert node.gone is (words == "leave")


def test_a_local_folder_is_offered_by_its_whole_path(
    node: FakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["models", "add", "llama"]) == 0
    assert node.asked == [("POST", "models", {"path": str(tmp_path / "llama"), "name": "llama"})]


@pytest.mark.parametrize(
    ("words", "answer", "printed"),
    [
        ("status --json", {"term": 3}, '{"term": 3}\n'),
        ("takeover", {"epoch": 2, "term": 3}, f"epoch=2  term=3\n{TAKEN_OVER_HERE}\n"),
        ("token create", {"command": "python -m node join t"}, "python -m node join t\n"),
        ("key create", {"key": "mk-secret", "id": "k"}, "mk-secret\n"),
        ("key list", {"data": [{"id": "k", "name": "ci"}, {"id": "l", "name": ""}]}, "id=k  name=ci\nid=l  name=\n"),
        ("leave", {}, "leaving: sessions are drained and layers handed over\nleft\n"),
    ],
)
def test_what_a_verb_prints(
    words: str, answer: Any, printed: str, node: FakeNode, capsys: pytest.CaptureFixture[str]
) -> None:
    node.answers = dict.fromkeys(("/mesh/status", "takeover", "tokens", "keys", "leave"), answer)
    assert main(words.split()) == 0
    assert capsys.readouterr().out == printed


def test_where_the_node_is_can_be_said_with_every_verb_that_asks(node: FakeNode) -> None:
    where = ["--api", "http://h:1", "--data-dir", "/d", "--admin-key-file", "/k"]
    for verb in (["takeover"], ["token", "revoke", "t"], ["models", "remove", "m"]):
        assert main([*verb, *where]) == 0
        found = node.arguments
        assert (found.api, found.data_dir, found.admin_key_file) == ("http://h:1", Path("/d"), Path("/k"))


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("no admin key at /d"), 2, "node: no admin key at /d\n"),
        (NodeRefused("no node answers"), 1, "node: no node answers\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 130, ""),
    ],
)
def test_failures_are_one_line_and_a_status(
    error: Exception, status: int, line: str, node: FakeNode, capsys: pytest.CaptureFixture[str]
) -> None:
    node.refuses = error
    assert main(["takeover"]) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("source", ["=x", "/a="])
def test_an_offer_that_is_none(source: str, node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "add", source]) == 2
    assert capsys.readouterr().err.startswith(f"node: {source!r} must be PATH or HUB_ID")
    assert node.asked == []


@pytest.mark.parametrize(
    "words", ["", "dance", "token", "revoke", "key create --scope root", "token create --uses x", "status --colour"]
)
def test_what_is_no_verb(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert "usage: python -m node" in capsys.readouterr().err


def test_status_is_watched_until_interrupted(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.time, "sleep", sleep)
    assert main(["status", "--watch", "--json"]) == 130
    assert (len(node.asked), slept) == (3, [2.0] * 3)


def test_status_for_people(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    table = SimpleNamespace(print_status=lambda document, clear: shown.append((document, clear)))
    monkeypatch.setitem(sys.modules, "node.table", table)
    assert main(["status"]) == 0
    assert shown == [({"ok": True}, False)]


def test_join_reads_its_settings_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setitem(sys.modules, "node.run", SimpleNamespace(run=lambda config: ran.append(config) or 3))
    monkeypatch.setenv("MESH_NAME", "ann")
    assert main(["join", "mesh1.x", "--threads", "2", "--model", "/a", "--model", "/b"]) == 3
    (config,) = ran
    assert (config.token, config.threads, config.name) == ("mesh1.x", 2, "ann")
    assert [offer.name for offer in config.model] == ["a", "b"]


def test_a_wrong_setting_is_a_line_and_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "node.run", SimpleNamespace(run=lambda config: pytest.fail("ran")))
    assert main(["join", "--role", "boss"]) == 2
    assert capsys.readouterr().err == "node: --role: 'boss' must be one of any, stage, entry, witness\n"


def test_the_command_line_is_light() -> None:
    """What only a running node needs is not imported to print a status."""
    code = "import node.cli, sys, json; print(json.dumps(sorted(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, timeout=60.0)
    assert not {"torch", "aiohttp", "cryptography", "transformers", "numpy"} & set(json.loads(done.stdout))
