"""The blocking client and the terminal one."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import client
from client import MeshClient
from client.__main__ import main
from tests.client.conftest import Served

REPLY = "Hello there, how are you?"
HI = [{"role": "user", "content": "Hi"}]


def test_answers_and_streams(threaded: Served) -> None:
    with MeshClient(threaded.url) as mesh:
        assert mesh.chat(HI).text == REPLY
        assert mesh.complete("Once", max_tokens=50).text == REPLY
        assert "".join(piece.text for piece in mesh.chat(HI, stream=True)) == REPLY
        assert mesh.models() == ["demo"]
        assert mesh.status()["name"] == "ann"
    mesh.close()


def test_many_threads(threaded: Served) -> None:
    answers: list[str] = []
    with MeshClient([threaded.url]) as mesh:
        threads = [threading.Thread(target=lambda: answers.append(mesh.chat(HI).text)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [REPLY] * 8


def test_leaving_a_stream_early(threaded: Served) -> None:
    threaded.service.hold_after = 3
    with MeshClient([threaded.url]) as mesh:
        with mesh.chat(HI, stream=True) as stream:
            next(stream)
        with mesh.chat(HI, stream=True):
            pass


def test_the_terminal(threaded: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    api = ["--api", threaded.url]
    assert main(["chat", *api, "--system", "Be brief", "--temperature", "0", "Hi"]) == 0
    assert capsys.readouterr().out == REPLY + "\n"
    assert threaded.service.opened[0].request.sampling.temperature == 0
    assert main(["complete", *api, "--max-tokens", "50", "--json", "Once"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["text"], told["finish_reason"], told["model"]) == (REPLY, "stop", "demo")
    assert told["usage"]["completion_tokens"] > 0
    assert main(["models", *api]) == 0
    assert capsys.readouterr().out == "demo\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    monkeypatch.setenv("MESH_API", threaded.url)
    assert main(["chat", "-"]) == 0


def test_a_conversation(threaded: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nAnd you?\n"))
    assert main(["chat", "--api", threaded.url]) == 0
    assert capsys.readouterr().out == f"{REPLY}\n{REPLY}\n"
    first, second = (generation.request.prompt for generation in threaded.service.opened)
    assert second[: len(first)] == first
    assert len(second) > len(first) + 10


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [(["--temperature", "9"], 1, "temperature must be"), (["--model", "x"], 1, "does not exist"),
     (["--api", "ftp://x"], 2, "not a URL"), (["--ca", "/nowhere.pem"], 2, "No such file or directory: '/nowhere.pem'"),
     (["--ca", __file__], 2, "test_sync.py: no certificates")],
)  # fmt: skip
def test_one_clear_line(
    threaded: Served, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    assert main(["chat", "--api", threaded.url, *arguments, "Hi"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_help_is_cheap() -> None:
    code = "import sys; from client.__main__ import parser; parser().format_help(); print('aiohttp' in sys.modules)"
    root = Path(client.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_name_is_there() -> None:
    assert all(getattr(client, name) for name in client.__all__)
    with pytest.raises(AttributeError):
        client.nothing  # noqa: B018
