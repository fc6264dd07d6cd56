"""How the command line finds a node and what it makes of its answers, over real HTTP."""

from __future__ import annotations

import argparse
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import ConfigError
from node import ask
from node.ask import RUNTIME_FILE, Asker, NodeRefused


class FakeNode:
    """Answers from ``answers`` by "METHOD path"; notes what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.asked: list[tuple[str, str | None, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                what = f"{self.command} {self.path}"
                key = self.headers.get("Authorization")
                outer.asked.append((what, key, json.loads(body) if body else None))
                status, text = outer.answers.get(what, (404, b"nothing here"))
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_DELETE = _serve

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, what: str, body: Any, status: int = 200) -> None:
        self.answers[what] = (status, json.dumps(body).encode())


@pytest.fixture
def node() -> Iterator[FakeNode]:
    made = FakeNode()
    yield made
    made.server.shutdown()
    made.server.server_close()


def arguments(api: str | None = None, data_dir: Path | None = None, key: Path | None = None) -> argparse.Namespace:
    return argparse.Namespace(api=api, data_dir=data_dir, admin_key_file=key)


# -- which node --------------------------------------------------------------------------------------------------------


def test_the_node_that_runs_from_the_data_folder(tmp_path: Path) -> None:
    (tmp_path / RUNTIME_FILE).write_text(json.dumps({"pid": 1, "api": "http://h:1/"}))
    assert Asker.of(arguments(data_dir=tmp_path)).api == "http://h:1"
    assert Asker.of(arguments(api="https://other:2", data_dir=tmp_path)).api == "https://other:2"


@pytest.mark.parametrize("text", [None, "", "{", "{}", "[]", "7", '{"api": null}'])
def test_no_node_runs_there(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / RUNTIME_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"--api URL or --data-dir DIR|must be a URL"):
        Asker.of(arguments(data_dir=tmp_path))


@pytest.mark.parametrize("api", ["127.0.0.1:9000", "ftp://h", "h"])
def test_what_is_no_url(api: str) -> None:
    with pytest.raises(ConfigError, match=r"--api: .* must be a URL such as"):
        Asker.of(arguments(api=api))


# -- asking ------------------------------------------------------------------------------------------------------------


def test_a_question_needs_no_key(node: FakeNode, tmp_path: Path) -> None:
    node.answer("GET /mesh/status", {"term": 3})
    assert Asker(node.url, tmp_path, None).get("/mesh/status") == {"term": 3}
    assert node.asked == [("GET /mesh/status", None, None)]


def test_an_administrative_verb_shows_the_key_of_the_folder(node: FakeNode, tmp_path: Path) -> None:
    (tmp_path / "admin.key").write_text("mk-secret\n")
    node.answer("POST /mesh/admin/tokens", {"id": "t"})
    assert Asker(node.url, tmp_path, None).admin("POST", "tokens", {"uses": 1}) == {"id": "t"}
    assert node.asked == [("POST /mesh/admin/tokens", "Bearer mk-secret", {"uses": 1})]


def test_another_key_file_wins_and_names_are_quoted(node: FakeNode, tmp_path: Path) -> None:
    (tmp_path / "admin.key").write_text("mk-one")
    (tmp_path / "other").write_text("mk-two")
    node.answer("DELETE /mesh/admin/models/org/my%20model%3F", {"removed": True})
    assert Asker(node.url, tmp_path, tmp_path / "other").admin("DELETE", "models/org/my model?") == {"removed": True}
    assert node.asked[0][1] == "Bearer mk-two"


def test_without_a_key_nothing_is_asked(node: FakeNode, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no admin key at .*admin.key \(No such file"):
        Asker(node.url, tmp_path, None).admin("POST", "leave")
    assert node.asked == []


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (403, b'{"error": {"message": "scope admin is needed"}}', "scope admin is needed"),
        (500, b"<html>", "HTTP 500"),
        (404, b"{}", "HTTP 404"),
        (404, b"[]", "HTTP 404"),
        (404, b'{"error": null}', "HTTP 404"),
    ],
)
def test_an_error_is_one_line(status: int, body: bytes, says: str, node: FakeNode, tmp_path: Path) -> None:
    node.answers["GET /x"] = (status, body)
    with pytest.raises(NodeRefused) as caught:
        Asker(node.url, tmp_path, None).get("/x")
    assert str(caught.value) == says


def test_an_answer_that_is_no_json(node: FakeNode, tmp_path: Path) -> None:
    node.answers["GET /x"] = (200, b"<html>")
    with pytest.raises(NodeRefused, match="no node answers at"):
        Asker(node.url, tmp_path, None).get("/x")


def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nobody else gets the port, nobody answers
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(NodeRefused, match=f"no node answers at {url}: .*refused"):
            Asker(url, tmp_path, None).get("/x")


@pytest.mark.parametrize("url", ["http://h:port", "http://h h", "http://"])
def test_a_url_that_cannot_be_asked(url: str, tmp_path: Path) -> None:
    with pytest.raises(NodeRefused, match="no node answers at"):
        Asker(url, tmp_path, None).get("/x")


def test_what_speaks_no_http(tmp_path: Path) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()

        def chat() -> None:
            with door.accept()[0] as one:
                one.recv(1000)
                one.sendall(b"\x15\x03\x01 this is TLS\r\n\r\n")

        thread = threading.Thread(target=chat)
        thread.start()
        with pytest.raises(NodeRefused, match="no node answers at"):
            Asker(f"http://127.0.0.1:{door.getsockname()[1]}", tmp_path, None).get("/x")
        thread.join(5.0)


# -- waiting until it is gone ------------------------------------------------------------------------------------------


class Waiter(Asker):
    """Its node answers so many times."""

    def __init__(self, answers: int) -> None:
        super().__init__("http://h:1", Path(), None)
        self.answers = answers

    def get(self, path: str) -> Any:
        assert path == "/health"
        self.answers -= 1
        if self.answers < 0:
            raise NodeRefused("gone")


def test_waiting_until_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(ask.time, "sleep", sleep)
    monkeypatch.setattr(ask.time, "monotonic", lambda: now)
    Waiter(3).wait_gone()
    assert now == pytest.approx(0.6)
    with pytest.raises(NodeRefused, match="still runs after 5 s"):
        Waiter(10_000).wait_gone(5.0)
    assert now == pytest.approx(5.6, abs=0.3)
