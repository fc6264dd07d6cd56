"""Forms that checkpoints come in: number formats, many files, weights that are quantized on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from node.engine.span import needed_tensors
from tests.node.engine.chain import Chain
from tests.node.engine.parity import compare, find_truth, make_prompts
from tests.tiny_models import write_tiny


def quantize_on_disk(folder: Path, stored: dict[str, object], rule: Callable[[str, torch.Tensor], object]) -> Path:
    """Replace tensors of a checkpoint by what ``rule`` makes of them, and say so in its configuration."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found = rule(name, tensor)
            tensors |= found if isinstance(found, dict) else {name: tensor}
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    return folder


def fp8(name: str, tensor: torch.Tensor) -> object:
    """Blocks of 128 x 128 with a scale each, as DeepSeek stores them."""
    if not name.endswith("proj.weight"):
        return None
    out, width = -(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128)
    scales = torch.rand(out, width) * 0.01 + 0.01
    whole = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]]
    return {name: (tensor / whole).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def mxfp4(name: str, tensor: torch.Tensor) -> object:
    """Two numbers a byte, 32 numbers a scale, as gpt-oss stores its experts."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return None
    experts, width, out = tensor.shape
    blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.randint(122, 125, blocks.shape[:-1], dtype=torch.uint8)}


@pytest.fixture
def quantized(tmp_path: Path) -> Callable[[str], Path]:
    def get(form: str) -> Path:
        torch.manual_seed(3)
        if form == "fp8":
            folder = write_tiny("qwen3", tmp_path / form, 4, hidden_size=128, intermediate_size=192)
            stored = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
            return quantize_on_disk(folder, stored, fp8)
        folder = write_tiny("gpt_oss", tmp_path / form, 4, intermediate_size=64)
        return quantize_on_disk(folder, {"quant_method": "mxfp4"}, mxfp4)

    return get


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
async def test_weights_quantized_on_the_disk_are_widened(form: str, quantized: Callable[[str], Path]) -> None:
    folder = quantized(form)
    verdict = await compare(folder, find_truth(folder, make_prompts()), (0, 2, 4))
    assert (verdict.mode, verdict.wrong) == ("packed", "")
    names = list(load_file(folder / "model.safetensors"))
    own = [name for name in names if ".layers.2." in name or ".layers.3." in name]
    assert {name for name in needed_tensors(folder, names, 2, 4) if ".layers." in name} == set(own)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
async def test_checkpoints_in_16_bits_over_many_files(kind: str, dtype: str, tmp_path: Path) -> None:
    """Tied (gemma2) and untied heads; served in float32 they lose nothing."""
    folder = write_tiny(kind, tmp_path, 4, dtype=dtype, shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    verdict = await compare(folder, find_truth(folder, make_prompts()), (0, 1, 4))
    assert (verdict.mode, verdict.wrong) == ("packed", "")


async def test_a_span_loaded_in_pieces_is_the_same(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models are read some layers at a time; a tied head stays tied."""
    for kind in ("llama", "gemma3_text", "mixtral"):
        drawn = []
        for piece_bytes in (1 << 28, 1):
            monkeypatch.setattr("node.engine.loading.PIECE_BYTES", piece_bytes)
            chain = Chain((0, 4), exact="off")
            await chain.load(tiny(kind))
            assert chain.engines[0].loaded[0].mode == "packed"
            drawn.append((await chain.generate(make_prompts()), chain.engines[0].stats().weight_bytes))
            await chain.stop()
        assert drawn[0] == drawn[1]
