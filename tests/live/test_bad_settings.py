"""What a person gets wrong at the start of a node: one clear line, exit status 2, and no traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from node.security.token import JoinToken
from scripts.local_mesh import ROOT, LocalMesh

pytestmark = pytest.mark.live


def join(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    given = ["--listen", "127.0.0.1:0", "--api", "127.0.0.1:0", "--data-dir", str(folder), *words]
    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    return subprocess.run(
        [sys.executable, "-m", "node", "join", *given],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120.0,
    )  # fmt: skip


def check(done: subprocess.CompletedProcess[str], *says: str) -> None:
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert last.startswith("node: "), done.stderr
    for text in says:
        assert text in last, last


def test_help_is_quick() -> None:
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "node", "--help"], cwd=ROOT, check=True, capture_output=True)
    ours = time.monotonic() - began
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], cwd=ROOT, check=True, capture_output=True)
    assert ours < 0.5 or ours < (time.monotonic() - began) / 2, "the command line pays for torch"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mesh1.garbage"], ["join token"]),
        (["not-a-token"], ["join token", "mesh1."]),
        (["--memory", "12Gx"], ["--memory", "12Gx"]),
        (["--role", "boss"], ["--role", "witness"]),
        (["--listen", "0.0.0.0:0"], ["--advertise"]),
        (["--device", "cuda:0"], ["--device cuda:0", "--device cpu"]),
        (["--role", "witness", "--api", "0.0.0.0:0"], ["--api-advertise"]),
        (["--role", "witness", "--api", "0.0.0.0:0", "--api-advertise", "http://10.0.0.9:9000"], ["API key"]),
    ],
)
def test_settings(tmp_path: Path, words: list[str], says: list[str]) -> None:
    check(join(tmp_path / "node", *words), *says)


def test_models(tmp_path: Path) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (other / "pytorch_model.bin").write_bytes(b"pickled")
    check(join(tmp_path / "a", "--model", str(tmp_path / "nowhere")), "nowhere")
    check(join(tmp_path / "b", "--model", str(empty)), "config.json")
    check(join(tmp_path / "c", "--model", str(other)), "safetensors")
    check(join(tmp_path / "d", "--model", "someone/some-model"), "someone/some-model")


def test_a_kind_of_model_that_no_mode_serves(tmp_path: Path) -> None:
    from tests.tiny_models import write_tiny

    folder = write_tiny("llama", tmp_path / "odd", 2, tokenizer=True)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "bert", "architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    check(join(tmp_path / "node", "--model", str(folder)), "bert")


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        check(join(tmp_path / "a", "--role", "witness", "--listen", address), address, "in use")
        check(join(tmp_path / "b", "--role", "witness", "--api", address), address)


def test_a_seed_that_does_not_answer(tmp_path: Path) -> None:
    token = JoinToken("a" * 32, ("127.0.0.1:9",), b"c" * 32, "0" * 16, b"s" * 32).encode()  # type: ignore[arg-type]
    check(join(tmp_path / "node", token, "--role", "witness"), "could not join", "127.0.0.1:9")


def test_a_data_folder_of_another_mesh(tmp_path: Path) -> None:
    witness = ["--role", "witness"]
    with LocalMesh(1, [], flags=witness) as one, LocalMesh(1, [], flags=witness) as two:
        token = two.new_token()
        check(join(one.nodes[0].folder, token, *witness), "in use")
        one.nodes[0].kill()
        check(join(one.nodes[0].folder, token, *witness), "another --data-dir")
