"""Keys and values that move to another engine: the same bits there, and the same answers from there on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mesh.errors import CapacityError
from mesh.types import LayerSpan
from node.engine.kv_cache import KvCache, Place
from node.engine.sequence import Work
from node.engine.shipping import read_pages, write_pages
from tests.node.engine.chain import MODEL, info
from tests.node.engine.test_engine import Bench, hidden

Tiny = Callable[..., Path]


async def read(bench: Bench, key: str, layers: tuple[int, int], start: int, end: int) -> tuple[int, bytes]:
    found: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
    bench.engine.read_pages(key, layers, start, end, lambda n, piece: found.set_result((n, piece)))
    async with asyncio.timeout(30):
        return await found


async def ship(old: Bench, new: Bench, layers: tuple[int, int], end: int, piece: int) -> None:
    """Positions [0, end) of sequence ``old`` to sequence ``way``, piece by piece."""
    at = 0
    while at < end:
        n, data = await read(old, "old", layers, at, min(end, at + piece))
        assert n > 0
        new.engine.write_pages("way", at, n, memoryview(data), lambda: pytest.fail("spoiled"))
        at += n


def tensors(bench: Bench, key: str, layers: range, length: int) -> list[torch.Tensor]:
    assert bench.engine._runner is not None
    place = bench.engine._runner._sequences[key].state
    assert isinstance(place, Place)
    return [part[place.slot, :length] for i in layers for part in place.extent.tensors(i)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("part", [(1, 3), (2, 3)], ids=["the same layers", "some of them"])
async def test_a_sequence_goes_on_at_another_engine_bit_by_bit(tiny: Tiny, dtype: str, part: tuple[int, int]) -> None:
    """300 positions in uneven pieces, in the middle of a page; another sequence lies in the first slot there."""
    old, new = Bench(), Bench()
    for bench in (old, new):
        await bench.engine.load(info(dtype=dtype), tiny("llama", dtype=dtype), LayerSpan(MODEL, 1, 3))
    size = 64 * (4 if dtype == "float32" else 2)
    rows = torch.randn(400, 64, generator=torch.Generator().manual_seed(3)).to(getattr(torch, dtype))
    body = rows.view(torch.uint8).numpy().tobytes()
    old.open("old", 1, 3, 512)
    old.engine.submit(Work("old", 0, 0, 300, hidden=body[: 300 * size]))
    passed = b""
    while len(passed) < 300 * size:
        passed += bytes((await old.next()).hidden or b"")
    new.open("beside", *part, 512)
    new.open("way", *part, 512)
    await ship(old, new, part, 300, 77)
    new.open("new", *part, 512, base="way", kept=290)
    await new.settled()
    kept = tensors(new, "new", range(*part), 290)
    for mine, theirs in zip(kept, tensors(old, "old", range(*part), 290), strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    if part == (1, 3):
        old.engine.truncate("old", 290)
        for bench, key in ((old, "old"), (new, "new")):
            bench.engine.submit(Work(key, 1, 290, 110, hidden=body[290 * size :]))
        assert bytes((await old.next()).hidden or b"") == bytes((await new.next()).hidden or b"") != b""
    for bench, keys in ((old, ("old",)), (new, ("beside", "new", "way"))):
        for key in keys:
            bench.engine.close(key)
        await bench.settled()
        bench.engine.assert_idle()
        await bench.stop()


async def test_pages_are_written_beside_a_sequence_that_computes(tiny: Tiny) -> None:
    """Into tensors that a forward made."""
    old, new = Bench(), Bench()
    for bench, key in ((old, "old"), (new, "beside")):
        await bench.load(tiny("llama"), 1, 3)
        bench.open(key, 1, 3)
        bench.open("way", 1, 3)
        bench.engine.submit(Work(key, 0, 0, 5, hidden=hidden(5)))
        await bench.next()
    await ship(old, new, (1, 3), 5, 5)
    assert await read(new, "way", (1, 3), 0, 5) == await read(old, "old", (1, 3), 0, 5)
    for bench in (old, new):
        await bench.stop()


async def test_room_passes_from_the_base_to_what_takes_it_over(tiny: Tiny) -> None:
    bench = Bench(kv_bytes=4 * 256 * 128)
    await bench.load(tiny("llama"), 0, 4)
    bench.open("way", 0, 4, 128)
    bench.open("new", 0, 4, 128, base="way")
    with pytest.raises(CapacityError):
        bench.open("more", 0, 4, 1)
    with pytest.raises(CapacityError):
        bench.open("larger", 0, 4, 256, base="new")
    await bench.settled()
    bench.engine.assert_idle()
    await bench.stop()


async def test_what_is_not_computed_or_not_open_is_not_read(tiny: Tiny) -> None:
    bench = Bench()
    await bench.load(tiny("llama"), 1, 3)
    bench.open("old", 1, 3)
    assert await read(bench, "old", (1, 3), 0, 8) == (0, b"")
    bench.engine.submit(Work("old", 0, 0, 5, hidden=hidden(5)))
    await bench.next()
    assert (await read(bench, "old", (1, 3), 2, 8))[0] == 3
    bench.engine.read_pages("closed", (1, 3), 0, 8, lambda n, piece: pytest.fail("read"))
    await bench.settled()
    await bench.stop()


async def test_a_piece_that_is_none_or_not_the_next_is_told(tiny: Tiny) -> None:
    bench = Bench()
    await bench.load(tiny("llama"), 1, 3)
    bench.open("old", 1, 3)
    bench.engine.submit(Work("old", 0, 0, 5, hidden=hidden(5)))
    await bench.next()
    _, piece = await read(bench, "old", (1, 3), 0, 5)
    _, one_layer = await read(bench, "old", (1, 2), 0, 5)
    bench.open("way", 1, 3)
    spoiled: list[int] = []
    bad = (b"", b"\0\0\0\5hello", piece[:-1], piece + b"x", one_layer)
    for number, data in enumerate(bad):
        bench.engine.write_pages("way", 0, 5, memoryview(data), lambda number=number: spoiled.append(number))
    bench.engine.write_pages("way", 1, 5, memoryview(piece), lambda: spoiled.append(90))
    bench.engine.write_pages("way", 0, 4, memoryview(piece), lambda: spoiled.append(91))
    bench.engine.write_pages("way", 0, 5, memoryview(piece), lambda: spoiled.append(92))
    await bench.settled()
    await asyncio.sleep(0)
    assert spoiled == [0, 1, 2, 3, 4, 90, 91]
    await bench.stop()


def test_the_rest_of_a_page_is_zero_and_other_slots_are_left_alone() -> None:
    source, target = KvCache().open(0, 1, 256), KvCache()
    rows = torch.randn(130, 2, 8)
    for part in source.extent.layer(0, rows, rows):
        part[source.slot, :130] = rows
    taken = [target.open(0, 1, 256), target.open(0, 1, 256)]
    for part in taken[0].extent.layer(0, rows, rows):
        part.fill_(float("nan"))
    piece = memoryview(read_pages(source, range(1), 0, 130))
    write_pages(taken[1], range(1), 0, 130, torch.float32, torch.device("cpu"), piece)
    keys, values = taken[1].extent.tensors(0)
    for part in (keys, values):
        assert torch.equal(part[1, :130], rows)
        assert not part[1, 130:256].any()
        assert part[0].isnan().all()
