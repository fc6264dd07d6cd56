"""Where tensors lie: the whole engine on a device that is not the CPU, with every mixing of the two an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mesh.types import SamplingParams
from node.engine.sequence import Work
from node.engine.transfer import host_empty, to_host
from tests import pretend_device
from tests.node.engine.chain import Chain
from tests.node.engine.test_engine import Bench, hidden
from tests.node.engine.test_shipping import read, ship

KINDS = ("llama", "qwen3", "gemma2", "gpt_oss", "mixtral")
"""Lean layers, norms of heads, softcap and windows, sinks, experts.

Not the compat mode: transformers' caches call what ``pretend_device`` cannot stand in for.
"""
SAMPLINGS = (
    SamplingParams(temperature=0.8, seed=3, logprobs=2, repetition_penalty=1.2, logit_bias={7: 1.0}),
    SamplingParams(temperature=1.5, seed=4, top_p=0.7, presence_penalty=0.5, frequency_penalty=0.2),
    SamplingParams(temperature=1.0, seed=5, top_k=5, min_p=0.05, stop_token_ids=(9,), min_tokens=3),
)


def test_mixing_is_noticed() -> None:
    there = torch.ones(3, device=pretend_device.device())
    assert there.device.type == pretend_device.NAME
    assert (there + 1).cpu().tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(pretend_device.Mixed):
        _ = there + torch.ones(3)
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(0, 4), (0, 2, 4)])
async def test_the_engine_on_another_device(
    tiny: Callable[..., Path],
    prompts: list[list[int]],
    expected: Callable[[str], list[list[int]]],
    kind: str,
    cuts: tuple[int, ...],
) -> None:
    chain = Chain(cuts, device=str(pretend_device.device()), kv_bytes=1 << 26, exact="off")
    await chain.load(tiny(kind))
    for engine in chain.engines:
        for holding in engine._runner.models.values():  # type: ignore[union-attr]
            assert {p.device.type for p in holding.shard.model.parameters()} == {pretend_device.NAME}
    assert await chain.generate(prompts) == expected(kind)
    await chain.stop()


async def test_sampling_on_another_device_draws_the_same(tiny: Callable[..., Path], prompts: list[list[int]]) -> None:
    found = []
    for where in ("cpu", str(pretend_device.device())):
        chain = Chain((0, 4), device=where, exact="off")
        await chain.load(tiny("llama"))
        found.append([await chain.generate(prompts, 6, sampling, scored=True) for sampling in SAMPLINGS])
        await chain.stop()
    assert found[0] == found[1]


def test_hidden_states_come_back_as_they_are() -> None:
    there = torch.arange(6.0, device=pretend_device.device()).view(2, 3)
    assert to_host(there).numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    here = torch.ones(2)
    assert to_host(here) is here
    assert not host_empty((2, 3), torch.bfloat16, torch.device("cpu")).is_pinned()


async def test_nodes_on_different_devices_are_of_different_classes(tiny: Callable[..., Path]) -> None:
    found = []
    for where in ("cpu", str(pretend_device.device())):
        chain = Chain((0, 4), device=where, exact="auto")
        await chain.load(tiny("llama"))
        found.append(chain.engines[0].hardware.split("/")[0])
        await chain.stop()
    assert found == ["cpu", pretend_device.NAME]


@pytest.mark.parametrize("ways", [("cpu", "pretend"), ("pretend", "cpu"), ("pretend", "pretend")])
async def test_a_sequence_goes_on_at_an_engine_on_another_device(
    tiny: Callable[..., Path], ways: tuple[str, str]
) -> None:
    """Shipped, and begun again from shared pages."""
    devices = [str(pretend_device.device()) if way == "pretend" else way for way in ways]
    old, new = (Bench(device=device) for device in devices)
    for bench in (old, new):
        await bench.load(tiny("llama"), 1, 3)
    body = hidden(300)
    old.open("old", 1, 3, 512)
    old.engine.submit(Work("old", 0, 0, 300, hidden=body))
    computed = b""
    while len(computed) < len(body):
        computed += bytes((await old.next()).hidden or b"")
    new.open("way", 1, 3, 512)
    await ship(old, new, (1, 3), 200, 77)
    new.open("new", 1, 3, 512, base="way", kept=200)
    new.engine.keep_pages("new", 64, [(0, 1), (64, 2)])
    new.open("like", 1, 3, 512)
    new.engine.take_pages("like", 64, [1, 2])
    for key, start in (("new", 200), ("like", 128)):
        new.engine.submit(Work(key, 1, start, 300 - start, hidden=body[start * 256 :]))
        again = b""
        while len(again) < len(body) - start * 256:
            again += bytes((await new.next()).hidden or b"")
        found, expected = (
            torch.frombuffer(bytearray(b), dtype=torch.float32) for b in (again, computed[start * 256 :])
        )
        assert torch.allclose(found, expected, atol=1e-4)
    assert (await read(new, "like", (1, 3), 0, 128))[1] == (await read(old, "old", (1, 3), 0, 128))[1]
    for bench in (old, new):
        await bench.stop()
