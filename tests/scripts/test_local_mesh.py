"""Which process of a local mesh gets which flags."""

from __future__ import annotations

from pathlib import Path

from scripts.local_mesh import LocalMesh


def test_nodes_take_the_devices_in_turn(tmp_path: Path) -> None:
    mesh = LocalMesh(3, ["some/model"], folder=tmp_path, threads=1, devices=["cuda:0", "cuda:1"])
    flags = [" ".join(node.flags) for node in mesh.nodes]
    assert flags == [
        "--threads 1 --device cuda:0 --model some/model",
        "--threads 1 --device cuda:1",
        "--threads 1 --device cuda:0",
    ]
    assert all("--device" not in node.flags for node in LocalMesh(2, [], folder=tmp_path).nodes)
