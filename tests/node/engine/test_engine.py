"""The engine's promises to the event loop: admission, cutting, closing, errors, loading more and less."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mesh.errors import CapacityError, ConfigError, StalePlacement
from mesh.types import LayerSpan, SamplingParams
from node.engine.engine import Engine, EngineConfig
from node.engine.sequence import Result, SequenceSpec, Work
from tests.node.engine.chain import GREEDY, MODEL, Chain, info

Tiny = Callable[..., Path]


class Bench:
    """One engine, and its results in order."""

    def __init__(self, **config: object) -> None:
        self.engine = Engine(EngineConfig(exact="off", **config))  # type: ignore[arg-type]
        self.engine.on_results = self._take
        self._queue: asyncio.Queue[Result] = asyncio.Queue()

    def _take(self, results: list[Result]) -> None:
        for result in results:
            self._queue.put_nowait(result)

    async def load(self, folder: Path, start: int, end: int) -> None:
        await self.engine.load(info(), folder, LayerSpan(MODEL, start, end))

    def open(self, key: str, start: int, end: int, positions: int = 64, **spec: object) -> None:
        self.engine.open(SequenceSpec(key, MODEL, start, end, positions, **spec))  # type: ignore[arg-type]

    async def next(self) -> Result:
        async with asyncio.timeout(30):
            return await self._queue.get()

    async def settled(self) -> None:
        """The device thread has done what was posted before."""
        runner = self.engine._runner
        assert runner is not None
        await self.engine._on_thread(lambda done: done())

    async def stop(self) -> None:
        await self.engine.stop()


def hidden(n: int, seed: int = 0) -> bytes:
    rows = torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))
    return rows.numpy().tobytes()


def test_importing_the_engine_does_not_import_torch() -> None:
    code = "import sys, node.engine.engine; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0


async def test_a_sequence_may_use_any_part_of_the_span(tiny: Tiny) -> None:
    """[0, 4) in one go equals [0, 1), [1, 3), [3, 4) one after the other on one engine."""
    bench = Bench()
    await bench.load(tiny("llama"), 0, 4)
    prompt = tuple(range(10, 40))
    bench.open("whole", 0, 4, sampling=GREEDY, tokens=prompt)
    bench.engine.submit(Work("whole", 0, 0, 30, prompt, sample=True))
    expected = (await bench.next()).sampled
    bench.open("a", 0, 1)
    bench.open("b", 1, 3)
    bench.open("c", 3, 4, sampling=GREEDY, tokens=prompt)
    bench.engine.submit(Work("a", 0, 0, 30, prompt))
    first = await bench.next()
    bench.engine.submit(Work("b", 0, 0, 30, hidden=first.hidden))
    second = await bench.next()
    bench.engine.submit(Work("c", 0, 0, 30, hidden=second.hidden, sample=True))
    assert (await bench.next()).sampled == expected
    await bench.stop()


async def test_admission_is_by_bytes_and_close_gives_them_back(tiny: Tiny) -> None:
    bench = Bench(kv_bytes=4 * 256 * 300)  # 300 positions of four layers: two pages
    await bench.load(tiny("llama"), 0, 4)
    assert bench.engine.stats().free_tokens == 300
    assert bench.engine.open(SequenceSpec("a", MODEL, 0, 4, 128)) == 4 * 256 * 128
    bench.open("b", 0, 4, 128)
    with pytest.raises(CapacityError):
        bench.open("c", 0, 4, 1)
    bench.open("half", 0, 1, 100)  # a quarter of the layers, a quarter of the bytes
    bench.engine.close("a")
    bench.open("c", 0, 4, 1)
    assert bench.engine.stats().running == 3
    for key in ("b", "c", "half", "half"):
        bench.engine.close(key)
    await bench.settled()
    bench.engine.assert_idle()
    await bench.stop()


async def test_what_is_not_held_is_not_opened(tiny: Tiny) -> None:
    bench = Bench()
    with pytest.raises(StalePlacement):
        bench.open("a", 0, 4)
    await bench.load(tiny("llama"), 1, 3)
    for start, end in ((0, 2), (2, 4), (2, 2)):
        with pytest.raises(StalePlacement):
            bench.open("a", start, end)
    await bench.stop()


async def test_cutting_back_and_going_on_equals_never_having_gone(tiny: Tiny) -> None:
    bench = Bench()
    await bench.load(tiny("llama"), 1, 3)
    for key in ("straight", "cut"):
        bench.open(key, 1, 3)
    straight = []
    for start, n, seed in ((0, 20, 1), (20, 5, 2)):
        bench.engine.submit(Work("straight", 0, start, n, hidden=hidden(n, seed)))
        straight.append(bytes((await bench.next()).hidden or b""))
    bench.engine.submit(Work("cut", 0, 0, 20, hidden=hidden(20, 1)))
    bench.engine.submit(Work("cut", 0, 20, 9, hidden=hidden(9, 3)))
    await bench.next()
    await bench.next()
    bench.engine.truncate("cut", 20)
    bench.engine.submit(Work("cut", 1, 20, 5, hidden=hidden(5, 2)))
    result = await bench.next()
    assert (result.tag, bytes(result.hidden or b"")) == (1, straight[1])
    await bench.stop()


async def test_cutting_drops_queued_work(tiny: Tiny) -> None:
    bench = Bench(step_rows=8)
    await bench.load(tiny("llama"), 1, 3)
    bench.open("a", 1, 3, 512)
    bench.engine.submit(Work("a", 0, 0, 400, hidden=hidden(400)))
    bench.engine.truncate("a", 0)
    bench.engine.submit(Work("a", 1, 0, 4, hidden=hidden(4)))
    results = [await bench.next()]
    while results[-1].tag == 0:
        results.append(await bench.next())
    assert (results[-1].start, results[-1].n) == (0, 4)
    assert len(results) < 20
    await bench.stop()


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (Work("a", 0, 3, 1, hidden=hidden(1)), "do not follow"),
        (Work("a", 0, 0, 65, hidden=hidden(65)), "past the 64 reserved"),
        (Work("a", 0, 0, 2, hidden=hidden(1)), "256 bytes"),
        (Work("a", 0, 0, 1, (5,)), "token ids belong to layer 0"),
        (Work("a", 0, 0, 1, hidden=b"\xff" * 256), "not finite"),
    ],
)
async def test_a_faulty_work_fails_its_sequence_alone(work: Work, why: str, tiny: Tiny) -> None:
    bench = Bench()
    await bench.load(tiny("llama"), 1, 3)
    bench.open("a", 1, 3)
    bench.open("b", 1, 3)
    bench.engine.submit(work)
    bench.engine.submit(Work("b", 0, 0, 3, hidden=hidden(3)))
    found = {result.key: result for result in (await bench.next(), await bench.next())}
    assert why in found["a"].error
    assert not found["b"].error
    bench.engine.submit(Work("a", 0, 0, 1, hidden=hidden(1)))
    assert why in (await bench.next()).error
    bench.engine.close("a")
    bench.engine.close("b")
    await bench.settled()
    bench.engine.assert_idle()
    await bench.stop()


async def test_a_token_outside_the_vocabulary_is_refused(tiny: Tiny) -> None:
    bench = Bench()
    await bench.load(tiny("llama"), 0, 2)
    bench.open("a", 0, 2)
    bench.engine.submit(Work("a", 0, 0, 2, (5, 99999)))
    assert "vocabulary" in (await bench.next()).error
    await bench.stop()


async def test_results_of_a_closed_sequence_are_not_shown(tiny: Tiny) -> None:
    bench = Bench()
    await bench.load(tiny("llama"), 1, 3)
    bench.open("a", 1, 3)
    bench.engine.submit(Work("a", 0, 0, 10, hidden=hidden(10)))
    bench.engine.close("a")
    bench.open("b", 1, 3)
    bench.engine.submit(Work("b", 0, 0, 1, hidden=hidden(1)))
    assert (await bench.next()).key == "b"
    await bench.stop()


async def test_logits_that_are_not_finite_are_served_to_nobody(tiny: Tiny) -> None:
    """Neither drawn from nor scored; who asked is told what is broken, and nobody else waits."""
    bench = Bench()
    await bench.load(tiny("llama"), 0, 4)
    for key in ("drawn", "scored"):
        bench.open(key, 0, 4, sampling=GREEDY, tokens=tuple(range(3, 13)))
    assert bench.engine._runner is not None
    shard = bench.engine._runner.models[MODEL].shard
    shard.model.get_output_embeddings().weight.data[7] = float("nan")
    bench.engine.submit(Work("drawn", 0, 0, 10, tuple(range(3, 13)), sample=True))
    bench.engine.submit(Work("scored", 0, 0, 5, tuple(range(3, 8)), prompt_logprobs=True))
    for found in [await bench.next() for _ in range(2)]:
        assert "the logits are NaN" in found.error
        assert (found.sampled, found.prompt_logprobs) == (None, ())
    await bench.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_bug_in_the_device_thread_is_loud(tiny: Tiny) -> None:
    bench = Bench()
    await bench.load(tiny("llama"), 1, 3)

    def bug() -> None:
        raise AssertionError("a bug")

    assert bench.engine._runner is not None
    assert bench.engine.failed is not None
    bench.engine._runner.post(bug)
    with pytest.raises(AssertionError, match="a bug"):
        await asyncio.wait_for(bench.engine.failed, 10)
    await asyncio.to_thread(bench.engine._runner.join)  # what it dies of is reported within this test


async def test_prompt_scores_are_those_of_one_forward(tiny: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    prompt = tuple(range(30, 60))
    bench = Bench(step_rows=16)
    await bench.load(tiny("llama"), 0, 4)
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2)
    bench.open("a", 0, 4, 34, sampling=params, tokens=prompt)
    bench.engine.submit(Work("a", 0, 0, 30, prompt, sample=True, prompt_logprobs=True))
    results = [await bench.next()]
    while results[-1].start + results[-1].n < 30:
        results.append(await bench.next())
    rows = [row for result in results for row in result.prompt_logprobs]
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    plain = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert len(rows) == 29
    assert [value for value, _ in rows] == pytest.approx([plain[p, prompt[p + 1]].item() for p in range(29)], abs=1e-4)
    assert [top[0][0] for _, top in rows] == plain[:29].argmax(-1).tolist()
    await bench.stop()


# -- loading -----------------------------------------------------------------------------------------------------------


async def test_growing_and_shrinking_a_span_reads_only_what_is_missing(
    tiny: Tiny, prompts: list[list[int]], expected: Callable[[str], list[list[int]]]
) -> None:
    chain = Chain((0, 4), exact="auto")
    engine = chain.engines[0]
    await engine.load(info(), tiny("qwen3"), LayerSpan(MODEL, 1, 3))
    runner = engine._runner
    assert runner is not None
    layers = runner.models[MODEL].shard._layers
    before = [layers[i].layer for i in (1, 2)]
    loaded = await engine.load(info(), tiny("qwen3"), LayerSpan(MODEL, 0, 4))
    assert loaded.exact
    assert engine.exact
    assert engine.hardware.startswith("cpu/")
    assert [layers[i].layer for i in (1, 2)] == before
    assert await chain.generate(prompts) == expected("qwen3")
    await engine.load(info(), tiny("qwen3"), LayerSpan(MODEL, 0, 2))
    assert runner.models[MODEL].shard.part.layers == (0, 1)
    await engine.unload(LayerSpan(MODEL, 0, 2))
    assert not runner.models
    assert engine.stats().weight_bytes == 0
    await chain.stop()


async def test_layers_in_use_stay_until_their_sessions_end(tiny: Tiny) -> None:
    bench = Bench()
    await bench.load(tiny("llama"), 0, 4)
    bench.open("a", 2, 4)
    await bench.load(tiny("llama"), 0, 2)
    with pytest.raises(StalePlacement):
        bench.open("b", 2, 4)
    bench.engine.submit(Work("a", 0, 0, 3, hidden=hidden(3)))
    assert not (await bench.next()).error
    runner = bench.engine._runner
    assert runner is not None
    assert runner.models[MODEL].shard.part.layers == (0, 1, 2, 3)
    bench.engine.close("a")
    await bench.settled()
    assert runner.models[MODEL].shard.part.layers == (0, 1)
    await bench.stop()


@pytest.mark.parametrize("kind", ["llama", "bloom"])
async def test_layers_that_were_given_up_and_are_still_there_are_served_again(tiny: Tiny, kind: str) -> None:
    bench = Bench()
    await bench.load(tiny(kind), 0, 4)
    first = bench.engine.loaded[0]
    bench.open("a", 0, 4)
    await bench.engine.unload(LayerSpan(MODEL, 0, 4))
    await bench.load(tiny(kind), 0, 4)
    assert bench.engine.loaded == (first,)
    bench.engine.close("a")
    await bench.settled()
    bench.open("b", 0, 2)
    bench.engine.submit(Work("b", 0, 0, 3, (3, 4, 5)))
    assert not (await bench.next()).error
    await bench.stop()


@pytest.mark.parametrize("fails", [False, True])
async def test_layers_whose_last_session_ends_while_others_are_loaded_stay(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    bench = Bench()
    await bench.load(tiny("llama"), 1, 4)
    bench.open("a", 2, 4)
    await bench.load(tiny("llama"), 1, 2)
    prepare = bench.engine._prepare

    async def slowly(*args: Any) -> Any:
        bench.engine.close("a")
        await bench.settled()
        if fails:
            raise ConfigError("no such file")
        return await prepare(*args)

    monkeypatch.setattr(bench.engine, "_prepare", slowly)
    runner = bench.engine._runner
    assert runner is not None
    if fails:
        with pytest.raises(ConfigError):
            await bench.load(tiny("llama"), 0, 4)
        assert runner.models[MODEL].shard.part.layers == (1,)
    else:
        await bench.load(tiny("llama"), 0, 4)
        assert runner.models[MODEL].shard.part.layers == (0, 1, 2, 3)
    bench.open("b", 1, 2)
    bench.engine.submit(Work("b", 0, 0, 3, hidden=hidden(3)))
    assert not (await bench.next()).error
    await bench.stop()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral", "gpt2", "bloom"])
async def test_a_replica_with_only_the_needed_tensors_is_enough(
    kind: str, tiny: Tiny, prompts: list[list[int]], expected: Callable[[str], list[list[int]]], tmp_path: Path
) -> None:
    """The rest of its files reads as NaN here, where a sparse file would have holes: nothing of it may be used."""
    spans = ((0, 2), (2, 4))
    engines = [Engine(EngineConfig(exact="off")) for _ in spans]
    for engine, (a, b) in zip(engines, spans, strict=True):
        replica = _replica(tiny(kind), tmp_path / f"{a}", a, b)
        await engine.load(info(), replica, LayerSpan(MODEL, a, b))
    chain = Chain((0, 2, 4), engines)
    assert await chain.generate(prompts[:2]) == expected(kind)[:2]
    await chain.stop()


def _replica(folder: Path, target: Path, start: int, end: int) -> Path:
    """A copy whose bytes outside the needed tensors are all ones."""
    from safetensors import safe_open

    from node.engine.span import needed_tensors

    target.mkdir()
    names = {p: list(safe_open(p, "pt").keys()) for p in folder.glob("*.safetensors")}
    needed = set(needed_tensors(folder, [n for keys in names.values() for n in keys], start, end))
    assert 0 < len(needed) < sum(len(keys) for keys in names.values())
    for path in folder.iterdir():
        body = bytearray(path.read_bytes())
        if path in names:
            _spoil(body, needed)
        (target / path.name).write_bytes(body)
    return target


def _spoil(body: bytearray, needed: set[str]) -> None:
    import json

    size = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + size])
    for name, entry in header.items():
        if name != "__metadata__" and name not in needed:
            a, b = (8 + size + offset for offset in entry["data_offsets"])
            body[a:b] = b"\xff" * (b - a)


async def test_a_model_that_cannot_be_served_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    engine = Engine(EngineConfig())
    for text, why in (
        ("{}", "config.json"),
        ('{"model_type": "t5"}', "t5: not a causal language model"),
        ((tiny("llama") / "config.json").read_text(), "llama: "),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=why) as refused:
            await engine.load(info(), tmp_path, LayerSpan(MODEL, 0, 4))
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"zaya: .*hand each other more than hidden states"):
        await engine.load(info(), tiny("zaya"), LayerSpan(MODEL, 0, 1))  # one layer is tried before a model is offered
    with pytest.raises(ConfigError, match="no layers"):
        await engine.load(info(), tiny("llama"), LayerSpan(MODEL, 2, 9))
    await engine.stop()
