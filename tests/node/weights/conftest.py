"""Real model folders, made of tiny tensors, and peers that serve them without a network."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mesh.errors import PeerUnreachable
from mesh.types import NodeId
from node.weights.fetch import Have
from node.weights.manifest import MANIFEST_NAME
from node.weights.store import Files, Store

N_LAYERS = 4
HIDDEN, VOCABULARY = 16, 32


def llama_tensors() -> dict[str, np.ndarray]:
    """All tensors of a four-layer llama, by name."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(N_LAYERS):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            shapes[f"model.layers.{i}.{part}.weight"] = (HIDDEN, HIDDEN)
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (HIDDEN, 64)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_llama(folder: Path, *, sharded: bool = False, **config: object) -> Path:
    """A Hugging Face folder: configuration, tokenizer file, weights in one file or in two with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    tensors = llama_tensors()
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / shard)
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def needed(folder: Path, names: Sequence[str], start: int, end: int) -> list[str]:
    """What layers [start, end) of a llama need, by its names."""

    def wanted(name: str) -> bool:
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer:
            return start <= int(layer[1]) < end
        return start == 0 if "embed" in name else end == N_LAYERS

    return [name for name in names if wanted(name)]


class LocalPeers:
    """``PeerFiles`` over stores in this process, with the rules of the real server; counts and misbehaves at will."""

    def __init__(self, **stores: Store) -> None:
        self.stores = dict(stores)
        self.read: dict[str, int] = {}
        self.corrupt: set[str] = set()
        self.silent: set[str] = set()
        self.short: set[str] = set()
        self.fail_after: int | None = None
        self.calls = 0
        self.in_flight = 0
        self.most_in_flight = 0

    def _files(self, peer: NodeId, manifest_id: str) -> Files:
        files = self.stores[peer].find(manifest_id) if peer in self.stores and peer not in self.silent else None
        if files is None:
            raise PeerUnreachable(f"{peer} does not answer")
        return files

    async def have(self, peer: NodeId, manifest_id: str) -> Have:
        files = self._files(peer, manifest_id)
        return Have(True) if files.whole else Have(False, files.have())

    async def fetch_range(self, peer: NodeId, manifest_id: str, name: str, start: int, end: int | None) -> bytes:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0)
        try:
            return self._answer(peer, manifest_id, name, start, end)
        finally:
            self.in_flight -= 1

    def _answer(self, peer: NodeId, manifest_id: str, name: str, start: int, end: int | None) -> bytes:
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise PeerUnreachable("the network is gone")
        files = self._files(peer, manifest_id)
        if name == MANIFEST_NAME:
            return files.manifest.encode()
        assert end is not None
        assert files.readable(name, start, end), f"{peer} was asked for {name}[{start}:{end}], which it has not"
        data = (files.folder / name).read_bytes()[start:end]
        self.read[peer] = self.read.get(peer, 0) + len(data)
        if peer in self.short:
            return data[:-1]
        return data[:-1] + bytes([data[-1] ^ 1]) if peer in self.corrupt else data


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "sharded", sharded=True)
