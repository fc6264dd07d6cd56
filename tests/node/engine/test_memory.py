"""Keys and values that nobody needs any more are the system's again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from node.engine.kv_cache import Extent, KvCache

WIDTH, HEADS, SIZE = 4096, 8, 64
SLOT = 2 * WIDTH * HEADS * SIZE * 4
"""Bytes of keys and values of one slot of one layer: 16 MiB."""


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def filled(extent: Extent, slots: int) -> None:
    rows = torch.zeros(1, HEADS, SIZE)
    for slot in [extent.take() for _ in range(slots)]:
        for tensor in extent.layer(0, rows, rows):
            tensor[slot] = slot + 1.0


def held(extent: Extent, slots: int) -> list[float]:
    """What each slot is filled with."""
    keys, values = extent.tensors(0)
    found = [{float(end) for tensor in (keys[i], values[i]) for end in tensor.aminmax()} for i in range(slots)]
    assert all(len(one) == 1 for one in found), found
    return [one.pop() for one in found]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_slot_that_is_given_back_takes_no_memory_and_reads_as_zeros() -> None:
    before, extent = resident(), Extent(WIDTH)
    filled(extent, 8)
    full = resident()
    assert full - before > 0.9 * 8 * SLOT
    for slot in range(1, 6):
        extent.give(slot)
    assert full - resident() > 0.9 * 5 * SLOT
    assert held(extent, 8) == [1.0, *[0.0] * 5, 7.0, 8.0]
    extent.give(7)
    extent.give(6)  # now the tensors shrink
    assert extent.tensors(0)[0].shape[0] == 1
    assert held(extent, 1) == [1.0]
    assert resident() - before < 2 * SLOT
    extent.give(0)
    assert extent.bytes == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_extent_that_is_dropped_is_unmapped() -> None:
    before, cache = resident(), KvCache()
    places = [cache.open(0, 1, WIDTH) for _ in range(8)]
    rows = torch.zeros(1, HEADS, SIZE)
    for tensor in places[0].extent.layer(0, rows, rows):
        tensor.fill_(1.0)
    for place in places:
        cache.close(place)
    del place, places, tensor
    assert cache.bytes == 0
    assert resident() - before < 0.5 * SLOT


LAYERS, PIECES = 16, 8 << 20
PEAK = """
import sys
from pathlib import Path
from node.engine import loading
from node.engine.span import Part
from tests.node.engine.test_memory import LAYERS, PIECES, status

quantize, warm, folder = sys.argv[1], *map(Path, sys.argv[2:])
loading.PIECE_BYTES = PIECES
loading.prepare(warm, Part.of_span(0, 2, 2), "float32", "off", 1, quantize)  # libraries are imported, caches are made
before = status("VmRSS")
shard = loading.prepare(folder, Part.of_span(0, LAYERS, LAYERS), "float32", "off", 1, quantize).shard
print(shard.weight_bytes, status("VmRSS") - before, max(0, status("VmHWM") - before))
"""


def write_wide(folder: Path, layers: int) -> Path:
    """A Llama of 12 MB a layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes, **heads)).save_pretrained(folder)
    return folder


def status(field: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quantize", ["", "int8"])
def test_a_span_takes_its_bytes_and_never_a_second_copy(quantize: str, tmp_path: Path) -> None:
    folders = [write_wide(tmp_path / str(n), n) for n in (2, LAYERS)]
    command = [sys.executable, "-c", PEAK, quantize, *map(str, folders)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    weights, resident, peak = map(int, done.stdout.split())
    file = sum(path.stat().st_size for path in folders[1].glob("*.safetensors"))
    assert weights > (0.2 if quantize else 0.9) * file > 20e6
    assert resident < 1.15 * weights + 8e6
    assert peak < weights + 14 * PIECES < file + weights, "more than a few pieces at once beside what is held"
