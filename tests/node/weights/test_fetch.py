"""Fetching: only what is needed, from whoever has it, checked, resumable."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors import safe_open

from mesh.types import LayerSpan, ModelInfo
from node.weights import fetch as fetch_module
from node.weights.keeper import Weights
from node.weights.offer import hash_file
from node.weights.store import Replica, Store, WeightsError
from tests.node.weights.conftest import N_LAYERS, LocalPeers, llama_tensors, needed


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "PAUSE_S", 0.0)


class World:
    """One node that offers a model, and others that fetch it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.peers = LocalPeers()
        self.bad: list[tuple[str, str]] = []
        self.nodes: dict[str, Weights] = {}
        self.model: ModelInfo

    def node(self, name: str) -> Weights:
        weights = Weights(self.root / name, self.peers, needed, lambda peer, why: self.bad.append((peer, why)))
        self.nodes[name], self.peers.stores[name] = weights, weights.store
        return weights

    async def offer(self, folder: Path, name: str = "owner") -> None:
        self.model = (await self.node(name).offer(folder, "tiny", "float32")).info

    async def bring(self, name: str, start: int, end: int, peers: Sequence[str] = ("owner",)) -> Path:
        return await self.nodes[name].bring(self.model, LayerSpan("tiny", start, end), peers)

    def replica(self, name: str) -> Replica:
        files = self.nodes[name].store.find(self.model.manifest)
        assert isinstance(files, Replica)
        return files


@pytest.fixture
async def world(tmp_path: Path, llama: Path) -> World:
    world = World(tmp_path / "nodes")
    await world.offer(llama)
    world.node("x")
    return world


def assert_holds(folder: Path, start: int, end: int) -> None:
    """The span's tensors can be read from ``folder`` as from any Hugging Face folder."""
    tensors = llama_tensors()
    wanted = set(needed(folder, sorted(tensors), start, end))
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in wanted & set(file.keys()):
                assert (file.get_tensor(name) == tensors[name]).all()
                wanted.remove(name)
    assert not wanted


async def test_a_span_brings_its_own_tensors_and_no_more(world: World, llama: Path) -> None:
    folder = await world.bring("x", 1, 3)
    assert_holds(folder, 1, 3)
    assert world.replica("x").have() == set(needed(folder, sorted(llama_tensors()), 1, 3))
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (llama / name).read_bytes()
    assert not (folder / "modeling_evil.py").exists()
    assert (folder / "model.safetensors").stat().st_size == (llama / "model.safetensors").stat().st_size
    layer = sum(t.nbytes for name, t in llama_tensors().items() if "layers.1." in name)
    assert world.peers.read["owner"] < 2 * layer + 5000


async def test_shards(tmp_path: Path, sharded: Path) -> None:
    world = World(tmp_path / "nodes")
    await world.offer(sharded)
    world.node("x")
    assert_holds(await world.bring("x", 0, N_LAYERS), 0, N_LAYERS)


async def test_the_owner_serves_from_its_own_folder(world: World, llama: Path) -> None:
    assert (await world.bring("owner", 0, 2, [])).samefile(llama)
    assert world.peers.calls == 0


async def test_an_outline_has_the_tokenizer_but_no_weights(world: World) -> None:
    folder = await world.nodes["x"].outline(world.model, ["owner"])
    assert (folder / "tokenizer.json").exists()
    assert world.replica("x").have() == frozenset()


async def test_a_grown_span_fetches_only_what_is_new(world: World) -> None:
    await world.bring("x", 1, 2)
    before = world.peers.read["owner"]
    assert_holds(await world.bring("x", 1, 3), 1, 3)
    layer = sum(t.nbytes for name, t in llama_tensors().items() if "layers.2." in name)
    assert world.peers.read["owner"] - before == layer
    calls = world.peers.calls
    await world.bring("x", 2, 3)
    assert world.peers.calls == calls


async def test_a_part_can_be_fetched_from_a_part(world: World) -> None:
    await world.bring("x", 1, 3)
    world.peers.silent.add("owner")
    world.node("y")
    assert_holds(await world.bring("y", 2, 3, ["owner", "x"]), 2, 3)
    with pytest.raises(WeightsError, match=r"no peer can give tensor model\.embed_tokens"):
        await world.bring("y", 0, 1, ["owner", "x"])


async def test_several_peers_share_the_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "PIECE_BYTES", 1024)
    await world.bring("x", 0, N_LAYERS)
    world.node("y")
    world.peers.read.clear()
    await world.bring("y", 0, N_LAYERS, ["owner", "x"])
    assert min(world.peers.read["owner"], world.peers.read["x"]) > 2000
    assert 1 < world.peers.most_in_flight <= fetch_module.IN_FLIGHT


async def test_progress_counts_what_is_here_already(world: World) -> None:
    await world.bring("x", 1, 2)
    seen: list[tuple[int, int]] = []
    await world.nodes["x"].bring(
        world.model, LayerSpan("tiny", 1, 3), ["owner"], lambda done, total: seen.append((done, total))
    )
    layer = sum(t.nbytes for name, t in llama_tensors().items() if "layers.1." in name)
    assert seen[0] == (layer, 2 * layer)
    assert seen[-1] == (2 * layer, 2 * layer)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# --- interruptions


@pytest.mark.parametrize("after", [0, 1, 3, 6, 9])
async def test_a_fetch_goes_on_where_it_was_cut(world: World, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    monkeypatch.setattr(fetch_module, "PIECE_BYTES", 1024)
    monkeypatch.setattr(fetch_module, "IN_FLIGHT", 1)
    world.peers.fail_after = after
    with pytest.raises(WeightsError, match="the network is gone"):
        await world.bring("x", 0, N_LAYERS)
    world.peers.fail_after = None
    kept = set()
    restarted = world.node("x")  # as after kill -9: only the disk is left
    if restarted.store.find(world.model.manifest) is not None:
        kept = set(world.replica("x").have())
    world.peers.read.clear()
    assert_holds(await world.bring("x", 0, N_LAYERS), 0, N_LAYERS)
    fetched_again = world.peers.read["owner"]
    missing = sum(t.nbytes for name, t in llama_tensors().items() if name not in kept)
    small = sum(s.size for s in world.replica("x").manifest.small) + world.replica("x").manifest.files[0].header_bytes
    assert missing <= fetched_again <= missing + small


async def test_a_torn_ledger_line_is_not_believed(world: World) -> None:
    folder = await world.bring("x", 1, 3)
    ledger = folder / "verified"
    lines = ledger.read_bytes()
    ledger.write_bytes(lines + b'"model.layers.0.self_attn.q_pro')
    world.node("x")
    assert len(world.replica("x").have()) == lines.count(b"\n")
    await world.bring("x", 0, 3)
    assert_holds(folder, 0, 3)
    world.node("x")
    assert world.replica("x").have() == set(needed(folder, sorted(llama_tensors()), 0, 3))


async def test_a_weight_file_that_vanished_or_shrank_is_fetched_again(world: World) -> None:
    folder = await world.bring("x", 1, 3)
    (folder / "model.safetensors").write_bytes(b"short")
    world.node("x")
    assert world.replica("x").have() == frozenset()
    assert_holds(await world.bring("x", 1, 3), 1, 3)


async def test_a_damaged_manifest_or_small_file_is_fetched_again(world: World) -> None:
    folder = await world.bring("x", 1, 3)
    (folder / "manifest.json").write_bytes(b"{}")
    (folder / "tokenizer.json").write_bytes(b"other")
    world.node("x")
    assert_holds(await world.bring("x", 1, 3), 1, 3)
    assert (folder / "tokenizer.json").read_text() == "{}"


# --- peers that lie or fail


async def test_a_corrupting_peer_is_reported_and_not_asked_again(world: World) -> None:
    await world.bring("x", 0, N_LAYERS)
    world.node("y")
    await world.nodes["y"].outline(world.model, ["owner"])
    world.peers.corrupt.add("x")
    world.peers.read.clear()
    assert_holds(await world.bring("y", 0, 2, ["x", "owner"]), 0, 2)
    assert {peer for peer, _ in world.bad} == {"x"}
    assert "other bytes for tensor" in world.bad[0][1]
    read = world.peers.read["x"]
    assert_holds(await world.bring("y", 0, 3, ["x", "owner"]), 0, 3)
    assert world.peers.read["x"] == read


async def test_a_corrupted_small_file_is_never_kept(world: World) -> None:
    world.peers.corrupt.add("owner")
    with pytest.raises(WeightsError, match="no peer can give"):
        await world.bring("x", 0, 1)
    assert len(world.bad) == 1
    assert not [p for p in (world.root / "x" / world.model.manifest).glob("*.json") if p.name != "manifest.json"]


async def test_short_answers_are_failures_not_data(world: World) -> None:
    await world.nodes["x"].outline(world.model, ["owner"])
    world.peers.short.add("owner")
    with pytest.raises(WeightsError, match="bytes came instead of"):
        await world.bring("x", 0, 1)
    assert world.replica("x").have() == frozenset()


async def test_nobody_to_ask(world: World) -> None:
    with pytest.raises(WeightsError, match="no peer is known to have any of it"):
        await world.bring("x", 0, 1, [])


# --- the disk


async def test_a_disk_without_room_says_so_before_anything_is_fetched(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.nodes["x"].outline(world.model, ["owner"])
    usage = shutil.disk_usage(world.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(WeightsError, match=r"1000 bytes free and \d+ are to be fetched"):
        await world.bring("x", 0, 1)


async def test_a_full_disk_is_not_the_peers_fault(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.nodes["x"].outline(world.model, ["owner"])

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(WeightsError, match="the disk is full: make room"):
        await world.bring("x", 0, 1)
    assert world.bad == []


async def test_replicas_can_be_removed_but_not_what_is_offered(world: World, llama: Path) -> None:
    folder = await world.bring("x", 0, 1)
    assert Store(world.root / "x").open_all() == [world.model.manifest]
    world.nodes["x"].store.remove(world.model.manifest)
    assert not folder.exists()
    with pytest.raises(Exception, match="is offered from"):
        world.nodes["owner"].store.remove(world.model.manifest)
    assert hash_file(llama / "model.safetensors").size > 0
