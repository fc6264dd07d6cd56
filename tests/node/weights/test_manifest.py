"""The manifest's gate: nothing that a peer may write into one reaches the disk unchecked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from mesh.errors import PeerError
from node.weights.manifest import Manifest, SmallFile, Tensor, TensorFile, decode

DIGEST = "0" * 64
GOOD = Manifest(
    small=(SmallFile("config.json", 2, DIGEST),),
    files=(
        TensorFile(
            "model.safetensors",
            24,
            8,
            DIGEST,
            (Tensor("a", "U8", (8,), 8, 16, DIGEST), Tensor("b", "F32", (2,), 16, 24, DIGEST)),
        ),
    ),
)


def tried(change: Callable[[dict[str, Any]], None]) -> None:
    tree = msgspec.json.decode(GOOD.encode())
    change(tree)
    raw = msgspec.json.encode(tree)
    decode(raw, hashlib.sha256(raw).hexdigest())


def test_a_good_one() -> None:
    tried(lambda tree: None)
    assert decode(GOOD.encode(), GOOD.id) == GOOD
    assert GOOD.tensors()["b"][1].size == 8


def test_other_bytes() -> None:
    with pytest.raises(PeerError, match="SHA-256 differs"):
        decode(GOOD.encode() + b" ", GOOD.id)


BAD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "path in a small file": lambda t: t["small"][0].update(name="../../.ssh/authorized_keys"),
    "absolute path": lambda t: t["small"][0].update(name="/etc/passwd"),
    "hidden file": lambda t: t["small"][0].update(name=".bashrc"),
    "our own ledger": lambda t: t["small"][0].update(name="verified"),
    "our own manifest": lambda t: t["small"][0].update(name="manifest.json"),
    "path in a weight file": lambda t: t["files"][0].update(name="..\\x.safetensors"),
    "null byte": lambda t: t["files"][0].update(name="a\0b"),
    "same name twice": lambda t: t["small"].append(t["small"][0]),
    "same tensor twice": lambda t: t["files"][0]["tensors"][1].update(name="a"),
    "no digest": lambda t: t["small"][0].update(sha256="abc"),
    "huge small file": lambda t: t["small"][0].update(size=1 << 40),
    "negative size": lambda t: t["small"][0].update(size=-1),
    "header beyond the file": lambda t: t["files"][0].update(header_bytes=100),
    "tensor beyond the file": lambda t: t["files"][0]["tensors"][1].update(end=32, shape=[4]),
    "tensor in the header": lambda t: t["files"][0]["tensors"][0].update(begin=0, shape=[16]),
    "tensors overlap": lambda t: t["files"][0]["tensors"][1].update(begin=12, shape=[3]),
    "shape and size disagree": lambda t: t["files"][0]["tensors"][1].update(shape=[3]),
    "unknown type": lambda t: t["files"][0]["tensors"][1].update(dtype="Q4"),
    "unknown version": lambda t: t.update(version=2),
    "unknown field": lambda t: t.update(run="me"),
    "wrong type": lambda t: t.update(files=3),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_broken_rules(case: str) -> None:
    with pytest.raises(PeerError, match="breaks a rule"):
        tried(BAD[case])
