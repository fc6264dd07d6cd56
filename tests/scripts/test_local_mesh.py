"""Which process of a local mesh gets which flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.engine import probe
from scripts.local_mesh import ROOT, LocalMesh, split_weights


def test_nodes_take_the_devices_in_turn(tmp_path: Path) -> None:
    mesh = LocalMesh(3, ["some/model"], folder=tmp_path, threads=1, devices=["cuda:0", "cuda:1"])
    flags = [" ".join(node.flags) for node in mesh.nodes]
    assert flags == [
        "--threads 1 --device cuda:0 --model some/model",
        "--threads 1 --device cuda:1",
        "--threads 1 --device cuda:0",
    ]
    assert all("--device" not in node.flags for node in LocalMesh(2, [], folder=tmp_path).nodes)


def test_no_node_holds_the_whole_model_in_the_dtype_that_it_is_offered_in(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = ROOT / "models" / "demo"
    stored = sum(file.stat().st_size for file in demo.glob("*.safetensors"))  # in bfloat16
    for dtype, times in (("float32", 2.0), ("bfloat16", 1.0)):
        monkeypatch.setattr(probe, "serving_dtype", lambda *_, dtype=dtype: dtype)
        assert split_weights(demo, 0.75) == int(0.75 * times * stored)
