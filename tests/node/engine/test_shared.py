"""Pages that sequences share: the same bits as without, and room that always gives way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mesh.errors import CapacityError
from node.engine.sequence import Work
from tests.node.engine.chain import GREEDY, MODEL, Chain
from tests.node.engine.test_engine import Bench, hidden

Tiny = Callable[..., Path]
SIZE = 32
PROMPT = tuple((7 * i * i + 3 * i) % 250 for i in range(301))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt_oss", "mixtral"])
async def test_bits_are_those_of_a_run_without_sharing(tiny: Tiny, kind: str) -> None:
    """Pages that end within and at an attention page; the rest in other chunks, beside another sequence."""
    chain = Chain([0, 2, 4], exact="on")
    await chain.load(tiny(kind))
    chain.open("alone", PROMPT, GREEDY, 8)
    chain.feed("alone", 0, PROMPT)
    await chain.finished()
    passed = b"".join(chain.passed["alone"])
    pages = [(index * SIZE, index + 1) for index in range(9)]
    for engine in chain.engines:
        engine.keep_pages("alone", SIZE, pages)
    chain.close("alone")
    for shared in (1, 4, 9):
        for key in ("other", "again"):
            chain.open(key, PROMPT, GREEDY, 8)
        for engine in chain.engines:
            engine.take_pages("again", SIZE, [number for _, number in pages[:shared]])
        chain.feed("other", 0, PROMPT[:150], sample=False)
        chain.feed("again", SIZE * shared, PROMPT[SIZE * shared :])
        chain.feed("other", 150, PROMPT[150:])
        await chain.finished()
        assert chain.drawn["again"] == chain.drawn["other"] == chain.drawn["alone"]
        assert b"".join(chain.passed["again"]) == passed[len(passed) // (len(PROMPT) + 7) * SIZE * shared :]
        chain.close("other", "again")
    for engine in chain.engines:
        engine.drop_pages([number for _, number in pages])
        await engine._on_thread(lambda done: done())
        engine.assert_idle()
        assert engine.stats().held_bytes == 0
    await chain.stop()


async def test_pages_give_way_to_sequences(tiny: Tiny) -> None:
    bench = Bench(kv_bytes=2 * 256 * 256)  # two pages of 128 positions of two layers
    await bench.load(tiny("llama"), 1, 3)
    bench.open("a", 1, 3, 128)
    bench.engine.submit(Work("a", 0, 0, 64, hidden=hidden(64)))
    await bench.next()
    assert bench.engine.page_bytes("a", SIZE) == 32 * 512
    bench.engine.keep_pages("a", SIZE, [(0, 1), (32, 2)])
    assert (bench.engine.stats().shared_bytes, bench.engine.excess) == (2 * 32 * 512, 0)
    bench.open("b", 1, 3, 128)  # never refused for their sake
    assert bench.engine.excess == 2 * 32 * 512
    with pytest.raises(CapacityError):
        bench.open("c", 1, 3, 1)
    bench.engine.drop_pages([1, 2])
    assert bench.engine.excess == 0
    bench.engine.close("a")
    bench.engine.close("b")
    await bench.settled()
    bench.engine.assert_idle()
    await bench.stop()


async def test_a_page_that_is_gone_leaves_the_sequence_at_its_beginning(tiny: Tiny) -> None:
    """What was asked for behind it is void, until a cut to 0 shows that this is known."""
    bench = Bench()
    await bench.load(tiny("llama"), 1, 3)
    bench.open("a", 1, 3)
    bench.engine.take_pages("a", SIZE, [77])
    bench.engine.submit(Work("a", 0, SIZE, 2, hidden=hidden(2)))
    assert (await bench.next()).rewound
    bench.engine.truncate("a", 32)
    bench.engine.submit(Work("a", 1, 32, 2, hidden=hidden(2)))
    bench.engine.truncate("a", 0)
    bench.engine.submit(Work("a", 2, 0, 2, hidden=hidden(2)))
    found = await bench.next()
    assert (found.tag, found.start, found.n, found.error) == (2, 0, 2, "")
    await bench.stop()


async def test_a_state_that_has_no_pages_says_so(tiny: Tiny) -> None:
    bench = Bench()
    await bench.load(tiny("bloom"), 1, 3)
    bench.open("a", 1, 3)
    assert bench.engine.page_bytes("a", SIZE) == 0
    assert bench.engine.loaded[0].span.model == MODEL
    await bench.stop()
