"""Engines whose layers have windows, on sequences longer than those layers hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from mesh.errors import CapacityError
from mesh.pipeline.prefix import Pages, Prefix, chain_of
from mesh.types import LayerSpan, SamplingParams
from node.engine.kv_cache import Place
from node.engine.pages import SLACK, band_of, width_of
from node.engine.sequence import Result, Work
from node.engine.shipping import Header, Layer
from tests.node.engine.chain import MODEL, Chain, info
from tests.node.engine.parity import compare, find_truth
from tests.node.engine.test_engine import Bench, hidden
from tests.node.engine.test_shipping import read, ship

Tiny = Callable[..., Path]
KINDS = ("mistral", "gemma2", "gemma3_text", "gpt_oss")
"""A window in every layer; soft-capped scores; two kinds of turning; sinks."""
WINDOW, STEP_ROWS = 24, 32
WIDTH = band_of(WINDOW, 1 << 20, STEP_ROWS).width
"""Positions that a layer with the tiny models' window holds of a long sequence."""
LONG = 900
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, logprobs=3)
SIZE = 32


def prompt(length: int, seed: int = 5) -> tuple[int, ...]:
    return tuple(torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def long(tiny: Tiny, kind: str, layers: int = 4, **over: Any) -> Path:
    return tiny(kind, layers, max_position_embeddings=4096, **over)


def state(bench: Bench, key: str) -> Place:
    assert bench.engine._runner is not None
    place = bench.engine._runner._sequences[key].state
    assert isinstance(place, Place)
    return place


async def loaded(
    folder: Path, start: int, end: int, layers: int = 4, step_rows: int = STEP_ROWS, **config: Any
) -> Bench:
    """Products have the same bits in forwards of any size."""
    bench = Bench(step_rows=step_rows, **config)
    await bench.engine.load(info(layers), folder, LayerSpan(MODEL, start, end))
    assert bench.engine._runner is not None
    bench.engine._runner.models[MODEL].shard.multiple = 8
    return bench


async def rows_of(bench: Bench, key: str, start: int, body: bytes, end: int) -> bytes:
    """Compute positions [start, end) of ``body``, all rows of it."""
    size = 64 * 4
    bench.engine.submit(Work(key, 0, start, end - start, hidden=body[start * size : end * size]))
    found = b""
    while len(found) < (end - start) * size:
        result = await bench.next()
        assert result.key == key
        assert not result.error
        found += bytes(result.hidden or b"")
    return found


# -- what is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "llama4_text"])
async def test_past_their_slots_models_say_what_transformers_says(kind: str, tiny: Tiny) -> None:
    """Chunked attention is no window: it holds everything."""
    folder = long(tiny, kind)
    truths = find_truth(folder, [list(prompt(LONG)), list(prompt(40))])
    verdict = await compare(folder, truths, (0, 2, 4))
    assert (verdict.mode, verdict.wrong) == ("packed", "")


@pytest.mark.parametrize("kind", KINDS)
async def test_bits_depend_neither_on_steps_nor_on_stages_nor_on_what_is_replayed(kind: str, tiny: Tiny) -> None:
    """Alone in long steps; beside another in short ones, in parts; and as one prompt what was drawn token by token."""
    folder, traces = long(tiny, kind), []
    for cuts, step_rows, others in (((0, 4), 512, []), ((0, 1, 3, 4), 26, [prompt(500, 6)])):
        chain = Chain(cuts, step_rows=step_rows, exact="on")
        await chain.load(folder)
        await chain.generate([prompt(LONG), *others], 140, PARAMS)
        traces.append([(s.token, s.logprob, s.top) for r in chain.results["s0"] if (s := r.sampled)])
        await chain.stop()
    assert traces[0] == traces[1]
    again = Chain((0, 4), step_rows=STEP_ROWS, exact="on")
    await again.load(folder)
    known = [*prompt(LONG), *(token for token, _, _ in traces[0][:-1])]
    again.open("s", known, PARAMS, 1)
    again.feed("s", 0, known, scored=True)
    await again.finished()
    scores = [row for result in again.results["s"] for row in result.prompt_logprobs]
    assert scores[LONG - 1 :] == [(logprob, top) for _, logprob, top in traces[0][:-1]]
    last = again.results["s"][-1].sampled
    assert last is not None
    assert (last.token, last.logprob, last.top) == traces[0][-1]
    await again.stop()


async def test_the_self_test_reads_past_a_window(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """If what is read for a position depended on the page where its rows begin, the engine would not be exact."""
    from node.engine.cells import Cells, Keys

    honest = Cells._keys

    def careless(self: Cells, place: Place, end: int) -> Keys:
        keys = honest(self, place, end)
        return Keys(0, 0, keys.first + keys.count) if keys.first and len(self._singles) > 1 else keys

    monkeypatch.setattr(Cells, "_keys", careless)
    for kind, exact in (("mistral", False), ("llama", True)):
        chain = Chain((0, 4))
        await chain.load(tiny(kind))
        assert chain.engines[0].exact == exact, kind
        await chain.stop()


# -- what is promised and held -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "windows"), [("gemma3_text", 5), ("llama", 0), ("llama4_text", 0), ("mistral", 6)])
async def test_a_promise_is_what_the_layers_hold(kind: str, windows: int, tiny: Tiny) -> None:
    """As many sequences as fit are admitted, and not one more; what is there then is what was promised."""
    positions, folder = 2000, long(tiny, kind, 6)
    probe = await loaded(folder, 0, 6, 6)
    each = [layer.bytes for layer in probe.engine.loaded[0].layers]
    assert sum(layer.window == WINDOW for layer in probe.engine.loaded[0].layers) == windows
    await probe.stop()
    need = sum(each[:windows]) * WIDTH + sum(each[windows:]) * width_of(positions)
    bench = await loaded(folder, 0, 6, 6, kv_bytes=4 * need + need // 2)
    engine = bench.engine
    assert engine.stats().free_tokens >= positions
    for number in range(4):
        assert bench.engine.open(_spec(f"s{number}", positions)) == need
    with pytest.raises(CapacityError):
        engine.open(_spec("more", positions))
    assert engine.stats().used_bytes == 4 * need
    free = engine.stats().free_tokens
    assert free < positions
    if windows < 6:
        assert engine.open(_spec("rest", min(free, WIDTH) // 128 * 128)) <= need // 2
        engine.close("rest")
    for number in range(4):
        engine.submit(Work(f"s{number}", 0, 0, 2, (3, 4)))
    for _ in range(4):
        assert not (await bench.next()).error
    await bench.settled()
    assert engine.stats().held_bytes == 4 * need
    for number in range(4):
        engine.close(f"s{number}")
    await bench.settled()
    engine.assert_idle()
    await bench.stop()


def _spec(key: str, positions: int) -> Any:
    from node.engine.sequence import SequenceSpec

    return SequenceSpec(key, MODEL, 0, 6, positions)


# -- going back --------------------------------------------------------------------------------------------------------


async def test_a_cut_within_reach_goes_on_and_a_farther_one_begins_anew(tiny: Tiny) -> None:
    bench = await loaded(long(tiny, "gemma3_text", 6), 1, 3, 6)
    body, engine = hidden(LONG), bench.engine
    bench.open("straight", 1, 3, LONG)
    straight = await rows_of(bench, "straight", 0, body, LONG)
    size = len(straight) // LONG
    bench.open("cut", 1, 3, LONG)
    await rows_of(bench, "cut", 0, body, 700)
    for length in (700 - SLACK, 690, 670):
        engine.truncate("cut", length)
        assert await rows_of(bench, "cut", length, body, 700) == straight[length * size : 700 * size]
    engine.truncate("cut", 100)
    engine.submit(Work("cut", 1, 100, 2, hidden=hidden(2)))
    result = await bench.next()
    assert (result.rewound, state(bench, "cut").bases[state(bench, "cut").extent.bands[1]]) == (True, 0)
    engine.truncate("cut", 0)
    assert await rows_of(bench, "cut", 0, body, LONG) == straight
    engine.truncate("cut", 0)  # to nothing it is always possible
    assert await rows_of(bench, "cut", 0, body, 10) == straight[: 10 * size]
    for key in ("straight", "cut"):
        engine.close(key)
    await bench.settled()
    engine.assert_idle()
    await bench.stop()


# -- shared pages ------------------------------------------------------------------------------------------------------


class Keeper:
    """A hop's part: it has pages kept when it is told of results, as late as these come."""

    def __init__(self, bench: Bench, tokens: Sequence[int]) -> None:
        self.bench, self.pages = bench, Pages(SIZE)
        self.chain = chain_of(tokens, SIZE, "m")

    def begin(self, key: str) -> tuple[Prefix, int]:
        """Opened and begun behind the pages that are there."""
        prefix = Prefix(self.pages, LayerSpan(MODEL, 1, 3), key, self.bench.engine.page_bytes(key, SIZE), None)
        prefix.chain = self.chain
        for effect in prefix.take(1 << 30):
            self.bench.engine.take_pages(key, SIZE, effect.event.pages)  # type: ignore[union-attr]
        return prefix, prefix.length

    def watch(self, key: str, prefix: Prefix) -> list[Result]:
        """The results of ``key``, from now on; its pages are kept as they come."""
        results: list[Result] = []

        def take(news: list[Result]) -> None:
            for result in news:
                results.append(result)
                for effect in prefix.keep(result.start + result.n) if not result.rewound else []:
                    self.bench.engine.keep_pages(key, SIZE, effect.event.pages)  # type: ignore[union-attr]
            self.bench._take(news)

        self.bench.engine.on_results = take
        return results


@pytest.mark.parametrize("step_rows", [STEP_ROWS, 512])
@pytest.mark.parametrize("length", [1000, 1900])
async def test_a_long_beginning_is_shared(step_rows: int, length: int, tiny: Tiny) -> None:
    """Though the windows are past most of it when its pages are kept."""
    bench = await loaded(long(tiny, "gemma3_text", 6), 1, 3, 6, step_rows)
    body, common = hidden(2000), length // SIZE * SIZE
    keeper = Keeper(bench, prompt(length))
    bench.open("first", 1, 3, 2000)
    prefix, begun = keeper.begin("first")
    assert begun == 0
    keeper.watch("first", prefix)
    whole = await rows_of(bench, "first", 0, body, 2000)
    size = len(whole) // 2000
    bench.engine.close("first")
    bench.open("second", 1, 3, 2000)
    prefix, begun = keeper.begin("second")
    assert begun == common
    results = keeper.watch("second", prefix)
    assert await rows_of(bench, "second", common, body, 2000) == whole[common * size :]
    assert not any(result.rewound for result in results)
    await bench.stop()


async def test_pages_that_windows_have_left_are_not_begun_behind(tiny: Tiny) -> None:
    """Unless pages that fill the windows follow."""
    bench = await loaded(long(tiny, "gemma3_text", 6), 1, 3, 6)
    body = hidden(LONG)
    bench.open("first", 1, 3, LONG)
    whole = await rows_of(bench, "first", 0, body, LONG)
    size = len(whole) // LONG
    pages = [(index * SIZE, index + 1) for index in range(LONG // SIZE)]
    bench.engine.keep_pages("first", SIZE, pages)
    bench.open("middle", 1, 3, LONG)
    bench.engine.take_pages("middle", SIZE, [number for _, number in pages[:10]])
    assert (await bench.next()).rewound
    bench.open("end", 1, 3, LONG)
    bench.engine.take_pages("end", SIZE, [number for _, number in pages])
    start = len(pages) * SIZE
    assert await rows_of(bench, "end", start, body, LONG) == whole[start * size :]
    bench.engine.truncate("end", start - 300)
    assert (await bench.next()).rewound, "before what the pages gave it"
    for key in ("first", "middle", "end"):
        bench.engine.close(key)
    bench.engine.drop_pages([number for _, number in pages])
    await bench.settled()
    bench.engine.assert_idle()
    assert bench.engine.stats().held_bytes == 0
    await bench.stop()


# -- shipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("piece", "step_rows"), [(77, STEP_ROWS), (512, STEP_ROWS), (512, 512)])
async def test_a_sequence_that_moves_ends_with_whole_windows(piece: int, step_rows: int, tiny: Tiny) -> None:
    """It goes on while it is shipped; what its windows leave meanwhile is not missed."""
    folder, body = long(tiny, "gemma3_text", 6), hidden(2000)
    old, new = await loaded(folder, 1, 3, 6), await loaded(folder, 1, 3, 6, step_rows)
    for bench, key in ((old, "old"), (new, "way")):
        bench.open(key, 1, 3, 2000)
    await rows_of(old, "old", 0, body, 1000)
    size, at, end, sent = 64 * 4, 0, 1000, 0
    while at < end:
        n, data = await read(old, "old", (1, 3), at, min(end, at + piece))
        sent += len(data)
        new.engine.write_pages("way", at, n, memoryview(data), lambda: pytest.fail("spoiled"))
        at += n
        if end < 1600:
            await rows_of(old, "old", end, body, end + 100)
            end += 100
    assert sent < 0.8 * end * 2 * sum(layer.bytes for layer in old.engine.loaded[0].layers[1:3])
    new.open("new", 1, 3, 2000, base="way", kept=end - 20)
    old.engine.truncate("old", end - 20)
    rest = [await rows_of(bench, key, end - 20, body, 2000) for bench, key in ((old, "old"), (new, "new"))]
    assert rest[0] == rest[1]
    assert len(rest[0]) == (2020 - end) * size
    for bench, key in ((old, "old"), (new, "new")):
        bench.engine.close(key)
        await bench.settled()
        bench.engine.assert_idle()
        await bench.stop()


async def test_a_move_that_is_taken_over_too_early_begins_anew(tiny: Tiny) -> None:
    """Half of the positions have come, and none that a window needs."""
    folder, body = long(tiny, "gemma3_text", 6), hidden(LONG)
    old, new = await loaded(folder, 1, 3, 6), await loaded(folder, 1, 3, 6)
    for bench, key in ((old, "old"), (new, "way")):
        bench.open(key, 1, 3, LONG)
    whole = await rows_of(old, "old", 0, body, LONG)
    await ship(old, new, (1, 3), 300, 100)
    new.open("new", 1, 3, LONG, base="way", kept=300)
    assert (await new.next()).rewound
    new.engine.truncate("new", 0)
    assert await rows_of(new, "new", 0, body, LONG) == whole
    await old.stop()
    await new.stop()


async def test_pieces_that_lie_about_windows_are_refused(tiny: Tiny) -> None:
    """What is lacking where nothing may, begins within a page, goes back, or differs from layer to layer."""
    bench = await loaded(long(tiny, "gemma3_text", 6), 3, 6, 6)
    bench.open("way", 3, 6, LONG)
    spoiled: list[int] = []

    def give(number: int, start: int, n: int, *lacking: int) -> None:
        piece = made(n, lacking)
        bench.engine.write_pages("way", start, n, memoryview(piece), lambda: spoiled.append(number))

    def made(n: int, lacking: Sequence[int]) -> bytes:
        layers = tuple(Layer((2, 16), (2, 16), count) for count in lacking)
        header = msgspec.msgpack.encode(Header(n, "float32", layers))
        body = bytes(sum(2 * 2 * 16 * 4 * max(0, n - count) for count in lacking))
        return len(header).to_bytes(4, "big") + header + body

    bad = [(0, 0, 128), (128, 0, 0), (128, 127, 0), (100, 100, 0), (-1, -1, 0), (201, 201, 0)]
    for number, lacking in enumerate(bad):
        give(number, 0, 200, *lacking)
    give(10, 0, 200, 200, 200, 0)  # none at all of the windows ...
    give(11, 200, 100, 0, 0, 0)  # ... and so not what follows without a gap
    give(12, 200, 100, 56, 56, 0)
    give(13, 300, 100, 0, 0, 0)
    await bench.settled()
    await asyncio.sleep(0)
    assert spoiled == [0, 1, 2, 3, 4, 5, 11]
    assert [state(bench, "way").base(layer) for layer in (3, 4, 5)] == [256, 256, 0]
    bench.engine.close("way")
    await bench.settled()
    bench.engine.assert_idle()
    await bench.stop()
