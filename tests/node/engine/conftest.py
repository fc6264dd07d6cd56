"""Tiny models, written once for all tests of the engine, and what transformers itself makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.node.engine.recorded import as_one
from tests.node.engine.varlen import written_out
from tests.tiny_models import VOCABULARY, write_tiny

LENGTHS = (23, 70, 5, 41)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny model of a kind; the same arguments give the same folder."""
    made: dict[object, Path] = {}

    def get(kind: str, layers: int = 4, **over: object) -> Path:
        key = (kind, layers, tuple(sorted(over.items())))
        if key not in made:
            made[key] = write_tiny(kind, tmp_path_factory.mktemp(kind), layers, **over)  # type: ignore[arg-type]
        return made[key]

    return get


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="session")
def expected(tiny: Callable[..., Path], prompts: list[list[int]]) -> Callable[[str], list[list[int]]]:
    """transformers' own greedy continuation of every prompt: 12 tokens, one prompt at a time."""
    made: dict[str, list[list[int]]] = {}

    def get(kind: str) -> list[list[int]]:
        if kind not in made:
            made[kind] = [_generate(tiny(kind), prompt) for prompt in prompts]
        return made[kind]

    return get


def _generate(folder: Path, prompt: list[int], tokens: int = 12) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([prompt])
    # EOS is ignored, as the engine leaves it to the session.
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel written out, on every device; how often it was called."""
    from node.engine import paged

    calls: list[int] = []

    def called(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return written_out(*args, **kwargs)

    monkeypatch.setattr(paged, "varlen_attn", as_one(called))
    monkeypatch.setattr(paged, "fits_kernel", lambda query, value: True)
    return calls
