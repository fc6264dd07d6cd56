"""Meshes of real processes, started once for the tests that share them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.local_mesh import LocalMesh
from tests.tiny_models import write_tiny, write_words

FLOAT32 = ("--dtype", "float32")
"""Said by whoever counts bytes or compares tokens with others': left alone, it would depend on the processor."""
FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "mixtral")
LAYERS = 8


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with random weights and a tokenizer for each family."""
    root = tmp_path_factory.mktemp("models")
    return {family: write_words(write_tiny(family, root / family, LAYERS)) for family in FAMILIES}


def tokens_of(text: str) -> list[int]:
    """The ids that ``text`` names."""
    return [int(word[1:]) for word in text.split()]


def weight_bytes(models: dict[str, Path]) -> int:
    return sum(file.stat().st_size for folder in models.values() for file in folder.glob("*.safetensors"))


def launch(nodes: int, models: dict[str, Path], share: float, *flags: str) -> LocalMesh:
    """A mesh of which each node has weight memory for ``share`` of all the models."""
    room = str(int(weight_bytes(models) * share))
    common = ["--weight-memory", room, "--memory", "512MiB", *FLOAT32, *flags]
    return LocalMesh(nodes, [str(folder) for folder in models.values()], flags=common)


@pytest.fixture(scope="module")
def llama_mesh(models: dict[str, Path]) -> Iterator[LocalMesh]:
    """Four nodes, one small model, every layer held twice and never all of them at one node."""
    with launch(4, {"llama": models["llama"]}, 0.75, "--max-sessions", "64", "--max-queue", "4") as mesh:
        mesh.wait_holders(2)
        yield mesh
