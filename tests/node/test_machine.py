"""What a machine offers, by its settings alone; nothing here imports torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.errors import CapacityError, ConfigError
from mesh.types import LayerSpan, Load, NodeProfile, Role
from node import machine
from node.config import NodeConfig
from node.engine.sequence import EngineStats
from node.machine import Machine, NoEngine
from node.text.grammar import Vocabularies
from tests.mesh.exhaustive import model

GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "weights", "total", "for_weights", "for_kv"),
    [
        (10 * GIB, 0, 10 * GIB, 7 * GIB, 3 * GIB),
        (10 * GIB, 9 * GIB, 10 * GIB, 9 * GIB, GIB),
        (0, 0, 60 * GIB, 42 * GIB, 18 * GIB),
        (0, GIB, 60 * GIB, GIB, 59 * GIB),
        (0, 99 * GIB, 60 * GIB, 60 * GIB, 0),
    ],
)
def test_memory(
    memory: int, weights: int, total: int, for_weights: int, for_kv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 100 * GIB)
    made = Machine(NodeConfig(memory=memory, weight_memory=weights), 0.0, 0.0)
    assert made.memory_bytes == total
    assert made.weight_bytes == pytest.approx(for_weights, abs=1)
    assert made.kv_bytes == pytest.approx(for_kv, abs=1)


@pytest.mark.parametrize(("role", "holds"), [("any", True), ("stage", True), ("entry", False), ("witness", False)])
def test_which_roles_hold_layers(role: Role, holds: bool) -> None:
    made = Machine(NodeConfig(role=role, memory=GIB), 0.0, 0.0)
    assert made.holds_layers is machine.holds_layers(NodeConfig(role=role)) is holds
    assert (made.kv_bytes > 0) is holds
    assert holds or isinstance(made.make_engine(NodeConfig(role=role), Vocabularies()), NoEngine)


def test_threads() -> None:
    assert Machine(NodeConfig(memory=GIB, threads=3), 0.0, 0.0).threads == 3
    assert Machine(NodeConfig(memory=GIB), 0.0, 0.0).threads == os.cpu_count()


async def test_measuring_again_finds_a_machine_no_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    made, found = Machine(NodeConfig(memory=GIB), 5.0, 2.0), [(4.0, 3.0), (6.0, 1.0)]

    async def measured(config: NodeConfig) -> Machine:
        return Machine(config, *found.pop(0))

    monkeypatch.setattr(machine, "measure", measured)
    await made.measure_again(NodeConfig(memory=GIB))
    assert (made._flops, made._bandwidth) == (5.0, 3.0)
    await made.measure_again(NodeConfig(memory=GIB))
    assert (made._flops, made._bandwidth) == (6.0, 3.0)


class FakeLoader:
    spans = (LayerSpan("m", 0, 4),)
    loading: LayerSpan | None = LayerSpan("m", 0, 6)
    fetched = 35
    refused = {LayerSpan("n", 1, 2): "no room"}  # noqa: RUF012


class FakeEngine(NoEngine):
    hardware, exact = "cpu/x", True

    def stats(self) -> EngineStats:
        return EngineStats(running=3, waiting=1, free_tokens=50, tokens_per_s=9.5, step_ms=2.5)


def profile(config: NodeConfig, loader: Any = FakeLoader) -> NodeProfile:
    return Machine(config, 5.0, 7.0).profile(
        config, peer="h:1", api="http://h:2", models=(model(),), loader=loader(), engine=FakeEngine(),
        seal_key=b"seal", draining=True, rtt_ms=1.5, lag_ms=0.5,
    )  # fmt: skip


def test_what_a_node_says_of_itself() -> None:
    assert profile(NodeConfig(name="ann", memory=1000, weight_memory=600)) == NodeProfile(
        name="ann", peer="h:1", api="http://h:2", role="any", memory_bytes=1000, weight_bytes=600, flops=5.0,
        bandwidth=7.0, rtt_ms=1.5, hardware="cpu/x", exact=True, models=(model(),), spans=(LayerSpan("m", 0, 4),),
        loading=(LayerSpan("m", 0, 6),), fetched=35, refused=("n[1:2]: no room",), seal_key=b"seal", draining=True,
        load=Load(running=3, waiting=1, free_tokens=50, tokens_per_s=9.5, step_ms=2.5, lag_ms=0.5),
    )  # fmt: skip


def test_a_stage_says_no_api_and_an_entry_no_memory() -> None:
    assert profile(NodeConfig(role="stage", memory=GIB)).api == ""
    entry = profile(NodeConfig(role="entry", memory=GIB))
    assert (entry.api, entry.memory_bytes, entry.weight_bytes) == ("http://h:2", 0, 0)


def test_nothing_is_loading() -> None:
    class Idle(FakeLoader):
        loading = None

    assert profile(NodeConfig(memory=GIB), Idle).loading == ()


async def test_a_node_without_an_engine_has_room_for_nothing(tmp_path: Path) -> None:
    none = NoEngine()
    with pytest.raises(CapacityError):
        none.open(None)
    with pytest.raises(ConfigError, match="no layers of m"):
        await none.load(model(), tmp_path, LayerSpan("m", 0, 1))
    with pytest.raises(ConfigError, match="no layers of m"):
        await none.unload(LayerSpan("m", 0, 1))
    assert none.stats() == EngineStats()
    await none.stop()


async def test_a_role_without_layers_measures_nothing() -> None:
    made = await machine.measure(NodeConfig(role="witness", memory=GIB))
    assert profile(NodeConfig(role="witness", memory=GIB)).flops == 5.0
    assert (made._flops, made._bandwidth) == (0.0, 0.0)


async def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--device cuda: torch .* is built .*; use --device cpu"):
        await machine.measure(NodeConfig(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"--device cuda:2: .* only cuda:0 to cuda:1"):
        await machine.measure(NodeConfig(device="cuda:2"))


@pytest.mark.parametrize(
    ("asked", "device"), [("auto", "cpu"), ("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")]
)
async def test_memory_and_engine_are_of_the_device(asked: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from node.engine import probe

    measured: list[Any] = []

    def speed(*how: Any) -> probe.Speed:
        measured.append(how)
        return probe.Speed(5.0, 7.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(probe, "probe", speed)
    monkeypatch.setattr(probe, "device_memory", lambda device: 50 * GIB)
    monkeypatch.setattr(machine, "free_memory", lambda: 100 * GIB)
    config = NodeConfig(device=asked, dtype="float16", threads=3)
    made = await machine.measure(config)
    assert measured == [(3, "float16", device)]
    assert made.memory_bytes == (60 if device == "cpu" else 30) * GIB
    assert made.make_engine(config, Vocabularies()).config.device == device


async def test_one_layer_is_tried_before_a_model_is_offered_where_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    part = SimpleNamespace(of_span=lambda *span: span)
    monkeypatch.setitem(sys.modules, "node.engine.loading", SimpleNamespace(prepare=lambda *x: tried.append(x)))
    monkeypatch.setitem(sys.modules, "node.engine.span", SimpleNamespace(Part=part))
    info = model(layer=100, embed=30)
    for config in (NodeConfig(memory=2 * 129), NodeConfig(memory=GIB, role="entry")):
        await Machine(config, 0.0, 0.0).check_servable(info, tmp_path)
    assert tried == []
    await Machine(NodeConfig(memory=2 * 130, threads=3), 0.0, 0.0).check_servable(info, tmp_path)
    assert tried == [(tmp_path, (0, 1, 8), "bfloat16", "off", 3, "", "cpu")]


@pytest.mark.parametrize(
    ("text", "free"), [("MemTotal: 8 kB\nMemAvailable:    5 kB\n", 5 * 1024), ("MemTotal: 8 kB\n", None), (None, None)]
)
def test_free_memory(text: str | None, free: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path) -> str:
        assert str(path) == "/proc/meminfo"
        if text is None:
            raise FileNotFoundError(path)
        return text

    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with monkeypatch.context() as patch:
        patch.setattr(machine.Path, "read_text", read_text)
        found = machine.free_memory()
    assert found == (half if free is None else free)


def test_importing_it_does_not_import_torch() -> None:
    code = "import node.machine, sys; raise SystemExit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60.0)
