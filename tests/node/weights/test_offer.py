"""Offering a folder: the manifest says every byte, the figures add up, and what cannot be served says why."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mesh.capacity import span_bytes
from mesh.errors import ConfigError
from node.weights import offer as offer_module
from node.weights.manifest import decode
from node.weights.offer import default_name, hash_file, offer
from tests.node.weights.conftest import HIDDEN, N_LAYERS, VOCABULARY, llama_tensors, write_llama


async def test_every_tensor_is_named_with_its_place_and_hash(llama: Path, tmp_path: Path) -> None:
    offered = await offer(llama, "tiny", "float32", tmp_path / "cache")
    data = (llama / "model.safetensors").read_bytes()
    (file,) = offered.manifest.files
    assert {t.name for t in file.tensors} == set(llama_tensors())
    for tensor in file.tensors:
        assert data[tensor.begin : tensor.end] == llama_tensors()[tensor.name].tobytes()
        assert tensor.sha256 == hashlib.sha256(data[tensor.begin : tensor.end]).hexdigest()
    assert file.header_sha256 == hashlib.sha256(data[: file.header_bytes]).hexdigest()
    assert [small.name for small in offered.manifest.small] == ["chat_template.jinja", "config.json", "tokenizer.json"]


async def test_the_manifest_is_canonical(llama: Path, sharded: Path, tmp_path: Path) -> None:
    first = (await offer(llama, "a", "float32", tmp_path / "c1")).manifest
    again = (await offer(str(llama), "b", "bfloat16", tmp_path / "c2")).manifest
    assert first == again
    assert decode(first.encode(), first.id) == first
    assert (await offer(sharded, "a", "float32", tmp_path / "c1")).manifest.id != first.id


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
async def test_figures_in_the_serving_dtype(llama: Path, tmp_path: Path, dtype: str, item: int) -> None:
    info = (await offer(llama, "tiny", dtype, tmp_path / "cache")).info
    layer = (4 * HIDDEN * HIDDEN + HIDDEN * 64 + HIDDEN) * item
    assert (info.n_layers, info.layer_bytes) == (N_LAYERS, layer)
    assert info.embed_bytes == VOCABULARY * HIDDEN * item
    assert info.head_bytes == (VOCABULARY * HIDDEN + HIDDEN) * item
    assert span_bytes(info, 0, N_LAYERS) == sum(t.size for t in llama_tensors().values()) * item
    assert info.kv_bytes == 2 * 2 * 4 * item
    assert (info.hidden_size, info.vocab_size, info.max_context) == (HIDDEN, VOCABULARY, 128)
    assert (info.id, info.dtype) == ("tiny", dtype)


async def test_a_tied_head_keeps_the_embedding_at_the_last_span(llama: Path, tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    save_file(tensors, llama / "model.safetensors")
    info = (await offer(llama, "tiny", "float32", tmp_path / "cache")).info
    assert info.head_bytes == (VOCABULARY * HIDDEN + HIDDEN) * 4
    assert span_bytes(info, 0, N_LAYERS) == sum(t.nbytes for t in tensors.values()), "one node needs it once"


async def test_shards_with_an_index(sharded: Path, tmp_path: Path) -> None:
    offered = await offer(sharded, "tiny", "float32", tmp_path / "cache")
    assert len(offered.manifest.files) == 2
    assert set(offered.manifest.tensors()) == set(llama_tensors())
    assert "model.safetensors.index.json" in {small.name for small in offered.manifest.small}


async def test_hashes_are_remembered_until_the_file_changes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(offer_module, "hash_file", lambda path: hashed.append(path) or hash_file(path))
    first = await offer(llama, "tiny", "float32", tmp_path / "cache")
    assert await offer(llama, "tiny", "float32", tmp_path / "cache") == first
    assert len(hashed) == 1
    stat = (llama / "model.safetensors").stat()
    os.utime(llama / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert await offer(llama, "tiny", "float32", tmp_path / "cache") == first
    assert len(hashed) == 2
    for note in (tmp_path / "cache").iterdir():
        note.write_bytes(b"{torn")
    assert await offer(llama, "tiny", "float32", tmp_path / "cache") == first


def test_names_of_models_that_were_given_none(llama: Path) -> None:
    assert default_name(llama) == "llama"
    assert default_name(f"{llama}/") == "llama"
    assert default_name("org/Some-Model-1B") == "Some-Model-1B"


# --- what cannot be served


async def refused(source: Path | str, tmp_path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        await offer(source, "tiny", "float32", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_unknown_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such folder" in await refused(tmp_path / "nowhere", tmp_path)
    assert "no such folder" in await refused("./nowhere", tmp_path)
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in await refused(tmp_path / "file", tmp_path)


async def test_a_hub_id_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    why = await refused("no-such-org/no-such-model", tmp_path)
    assert "'no-such-org/no-such-model'" in why
    assert "the hub cannot be reached" in why


async def test_folders_that_lack_something(llama: Path, tmp_path: Path) -> None:
    (llama / "tokenizer.json").unlink()
    assert "has no tokenizer" in await refused(llama, tmp_path)
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    assert "pytorch_model.bin, but only safetensors are accepted" in await refused(llama, tmp_path)
    (llama / "pytorch_model.bin").unlink()
    assert "it holds no weights" in await refused(llama, tmp_path)
    (llama / "config.json").unlink()
    assert "has no config.json" in await refused(llama, tmp_path)


@pytest.mark.parametrize("kind", ["bert_of_no_kind", "t5"])
async def test_kinds_that_are_not_causal_language_models(tmp_path: Path, kind: str) -> None:
    folder = write_llama(tmp_path / "model", model_type=kind, auto_map={"AutoModel": "modeling_evil.Evil"})
    assert f"model_type {kind!r} is not a causal language model" in await refused(folder, tmp_path)


async def test_quantized_checkpoints_that_need_other_libraries(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    why = await refused(folder, tmp_path)
    assert "quantized by 'gptq'" in why
    assert "offer the unquantized checkpoint" in why


async def test_broken_configurations(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model", num_hidden_layers=9)
    assert "lack layers [4, 5, 6, 7, 8] of 9" in await refused(folder, tmp_path)
    (folder / "config.json").write_text("{")
    assert "cannot be read" in await refused(folder, tmp_path)
    (folder / "config.json").write_text("[]")
    assert "names no model_type" in await refused(folder, tmp_path)


async def test_an_index_that_lies(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    name = next(iter(table["weight_map"]))
    for bad in ("../outside.safetensors", "absent.safetensors"):
        index.write_text(json.dumps({"weight_map": {**table["weight_map"], name: bad}}))
        assert "not in the folder" in await refused(sharded, tmp_path)
    index.write_text(json.dumps({"weight_map": {**table["weight_map"], "more": table["weight_map"][name]}}))
    assert "holds tensor more, but it does not" in await refused(sharded, tmp_path)


def header(entries: object) -> bytes:
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw


CORRUPT = {
    "empty": (b"", "not a safetensors file"),
    "huge header": ((1 << 60).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "no json": ((4).to_bytes(8, "little") + b"abcd", "corrupt header"),
    "a list": (header([1, 2]), "corrupt header"),
    "outside": (
        header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}) + b"x" * 8,
        "lies at [0, 16) of 8",
    ),
    "shape": (header({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}) + b"x" * 16, "contradicts"),
    "negative": (header({"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}) + b"x" * 16, "negative"),
    "backwards": (header({"a": {"dtype": "F32", "shape": [0], "data_offsets": [8, 4]}}) + b"x" * 16, "lies at [8, 4)"),
    "type": (header({"a": {"dtype": "Q9", "shape": [4], "data_offsets": [0, 16]}}) + b"x" * 16, "unknown type"),
    "overlap": (
        header(
            {
                "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
                "b": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]},
            }
        )
        + b"x" * 12,
        "overlap",
    ),
}


@pytest.mark.parametrize("case", sorted(CORRUPT))
async def test_corrupt_weight_files(llama: Path, tmp_path: Path, case: str) -> None:
    data, why = CORRUPT[case]
    (llama / "model.safetensors").write_bytes(data)
    assert why in await refused(llama, tmp_path)


async def test_an_empty_tensor_is_a_tensor(llama: Path, tmp_path: Path) -> None:
    save_file({**llama_tensors(), "model.none": np.zeros((0, 4), np.float32)}, llama / "model.safetensors")
    assert (await offer(llama, "tiny", "float32", tmp_path / "cache")).manifest.tensors()["model.none"][1].size == 0
