"""A mesh of real processes on this machine: start, ask, kill, stop.  For launch_local, demo, benchmarks and live tests.

What a node is asked goes over its public API, as anyone would ask it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from email.message import Message
from pathlib import Path
from typing import Any, TypeVar

from mesh.capacity import DTYPE_BYTES

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
STOP_S = 20.0
ENDED = (None, 0, -9)
"""Runs, left, or was killed: anything else is a failure of the node."""


class MeshFailure(RuntimeError):
    """A node did not do what it was started for; the message carries the end of its log."""


class LocalNode:
    """One ``python -m node join`` process."""

    def __init__(self, name: str, folder: Path, api_port: int, peer_port: int, flags: list[str]) -> None:
        self.name, self.folder, self.flags = name, folder, flags
        self.api, self.peer = f"http://127.0.0.1:{api_port}", f"127.0.0.1:{peer_port}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, token: str = "") -> None:
        """Start, or start again with the same data folder."""
        command = [sys.executable, "-m", "node", "join", *([token] if token else [])]
        command += ["--name", self.name, "--data-dir", str(self.folder)]
        command += ["--listen", self.peer, "--api", self.api.removeprefix("http://"), *self.flags]
        environment = dict(os.environ, HF_HUB_OFFLINE=os.environ.get("HF_HUB_OFFLINE", "1"))
        # Library pools that spin are up to ten times slower with more threads than cores over all processes.
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        if self.running:
            assert self.process is not None
            self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def tail(self, lines: int = 25) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def within(self, act: Callable[[], T]) -> T:
        """``act()`` from where the node's API can be reached; here from anywhere."""
        return act()

    def get(self, path: str, timeout: float = 5.0) -> Any:
        return http_json(self.api + path, timeout=timeout)

    def metric(self, name: str) -> float:
        """The sum of the samples whose names, labels included, begin so."""
        with urllib.request.urlopen(f"{self.api}/metrics", timeout=10.0) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        key = (self.folder / "admin.key").read_text().strip()
        return http_json(self.api + path, method=method, body=body, key=key, timeout=30.0)

    def ready(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return bool(self.get("/ready").get("ready", True))
        return False

    def answers(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            self.get("/health")
            return True
        return False


class LocalMesh:
    """``nodes`` processes; the first founds the mesh and offers the models."""

    def __init__(
        self,
        nodes: int,
        models: list[str],
        *,
        base_port: int = 0,
        folder: Path | None = None,
        flags: list[str] | None = None,
        threads: int | None = None,
        patience_s: float = 120.0,
        devices: Sequence[str] = (),
    ) -> None:
        """``patience_s``: how long to wait for the nodes to start, unless a verb says otherwise; ``devices``: what
        nodes compute on, in turn."""
        self.patience_s = patience_s
        self._own_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="murmur-"))
        threads = threads or max(1, (os.cpu_count() or 1) // nodes)
        common = ["--threads", str(threads), *(flags or [])]
        ports = _ports(base_port, nodes)
        self.nodes = [
            LocalNode(f"node-{i}", self.folder / f"node-{i}", api, peer, common) for i, (api, peer) in enumerate(ports)
        ]
        for i, node in enumerate(self.nodes):
            node.flags = [*common, *(("--device", devices[i % len(devices)]) if devices else ())]
        self.nodes[0].flags += [flag for model in models for flag in ("--model", model)]
        self.token = ""

    def start(self, timeout: float | None = None) -> None:
        """Until every node is ready to serve every model."""
        self.nodes[0].start()
        self.wait(lambda: self.nodes[0].answers(), "the founder to answer", timeout)
        self.token = self.new_token()
        for node in self.nodes[1:]:
            node.start(self.token)
        self.wait_ready(timeout)

    def new_token(self) -> str:
        """A founder answers a moment before it is elected, and only a coordinator makes tokens."""
        made: list[str] = []

        def try_making() -> bool:
            try:
                answer = self.nodes[0].admin("POST", "/mesh/admin/tokens", {"ttl_s": 86400, "uses": None})
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
                return False
            made.append(str(answer["token"]))
            return True

        self.wait(try_making, "a coordinator to make a token")
        return made[0]

    def wait_ready(self, timeout: float | None = None) -> None:
        """All running nodes see each other, and each can serve."""
        running = [node for node in self.nodes if node.running]

        def settled() -> bool:
            return all(node.ready() for node in running) and all(self.alive(node) == len(running) for node in running)

        self.wait(settled, f"{len(running)} nodes to be ready", timeout)

    def wait_holders(self, holders: int, timeout: float | None = None) -> None:
        """Every layer of every model is loaded at so many live nodes, as the first running node sees it."""

        def held() -> bool:
            try:
                status = next(node for node in self.nodes if node.running).get("/mesh/status")
            except OSError:  # it is busy: ask again
                return False
            alive = [member for member in status["members"] if member["state"] == "alive"]
            return all(
                sum(any(covers(span, model["id"], layer) for span in member["spans"]) for member in alive) >= holders
                for model in status["placement"]["models"]
                for layer in range(model["layers"])
            )

        self.wait(held, f"{holders} holders of every layer", timeout)

    @staticmethod
    def alive(node: LocalNode) -> int:
        with contextlib.suppress(OSError, ValueError):
            return sum(member["state"] == "alive" for member in node.get("/mesh/status")["members"])
        return 0

    def wait(self, condition: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        """Poll ``condition``; a node that ends meanwhile, or the time-out, raises with its log."""
        end = time.monotonic() + (self.patience_s if timeout is None else timeout)
        while not condition():
            dead = [node for node in self.nodes if node.process is not None and node.process.poll() not in ENDED]
            if dead or time.monotonic() > end:
                node = dead[0] if dead else self.nodes[0]
                why = f"{node.name} ended" if dead else "time-out"
                raise MeshFailure(f"{why} while waiting for {what}\n{node.name}: {node.tail()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """SIGTERM to all, SIGKILL to what is left, and nothing stays behind."""
        for node in self.nodes:
            node.signal(signal.SIGCONT)
            node.signal(signal.SIGTERM)
        end = time.monotonic() + STOP_S
        for node in self.nodes:
            if node.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    node.process.wait(max(0.1, end - time.monotonic()))
                node.kill()
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> LocalMesh:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def describe(self) -> dict[str, Any]:
        """What ``launch_local --json`` prints."""
        nodes = [
            {"name": n.name, "pid": n.pid, "api": n.api, "peer": n.peer, "data_dir": str(n.folder)} for n in self.nodes
        ]
        return {"nodes": nodes, "token": self.token}


def covers(span: dict[str, Any], model: str, layer: int) -> bool:
    return bool(span["model"] == model and span["start"] <= layer < span["end"])


def _ports(base: int, nodes: int) -> list[tuple[int, int]]:
    """(API, peer door) of each node: from ``base`` on, or whatever is free."""
    if base:
        return [(base + i, base + 100 + i) for i in range(nodes)]
    with contextlib.ExitStack() as held:
        return [(_free_port(held), _free_port(held)) for _ in range(nodes)]


def _free_port(held: contextlib.ExitStack) -> int:
    """A port free for TCP and UDP; held until all are drawn, so that none is drawn twice."""
    while True:
        tcp = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        tcp.bind(("127.0.0.1", 0))
        udp = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with contextlib.suppress(OSError):
            udp.bind(tcp.getsockname())
            return int(tcp.getsockname()[1])


def http_json(url: str, *, method: str = "GET", body: Any = None, key: str = "", timeout: float = 30.0) -> Any:
    """The JSON answer to one request; an error answer raises ``urllib.error.HTTPError`` (an ``OSError``)."""
    return http_request(url, method=method, body=body, key=key, timeout=timeout)[0]


def http_request(
    url: str, *, method: str = "GET", body: Any = None, key: str = "", timeout: float = 30.0
) -> tuple[Any, Message]:
    """As ``http_json``, with the answer's headers."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = json.dumps(body).encode() if body is not None else (b"{}" if method == "POST" else None)
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.loads(answer.read() or b"null"), answer.headers


def chat(api: str, messages: list[dict[str, str]], timeout: float = 120.0, **params: Any) -> dict[str, Any]:
    """A chat completion, not streamed."""
    body = {"model": params.pop("model", "demo"), "messages": messages, "temperature": 0, **params}
    answer: dict[str, Any] = http_json(f"{api}/v1/chat/completions", method="POST", body=body, timeout=timeout)
    return answer


def stream(api: str, path: str, body: dict[str, Any], timeout: float = 120.0) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed completion; an error event raises ``MeshFailure``."""
    data = json.dumps({**body, "stream": True}).encode()
    request = urllib.request.Request(api + path, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        for line in answer:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise MeshFailure(f"the stream failed: {chunk['error']['message']}")
                yield chunk


def split_weights(model: Path, share: float = 0.75, device: str = "cpu") -> int:
    """Bytes of weight memory at which no node can hold all of ``model``, so that it must be split.

    In the dtype that a founder with ``device`` offers it in: half the bytes where the processor multiplies bfloat16.
    """
    from node.engine.probe import serving_dtype

    config = json.loads((model / "config.json").read_text())
    stored = DTYPE_BYTES.get(config.get("dtype", config.get("torch_dtype")), 4)
    files = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return int(files / stored * DTYPE_BYTES[serving_dtype("auto", device)] * share)
