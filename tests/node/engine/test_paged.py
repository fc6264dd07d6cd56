"""Attention over pages against the attention of the CPU, with torch's kernel written out in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import masking_utils

from mesh.types import LayerSpan
from node.engine import paged
from node.engine.attention import MaskRule
from node.engine.batch import Batch
from node.engine.cells import Rows, packed_order
from node.engine.kv_cache import KvCache
from node.engine.page_pool import PAGE, PagedCache
from node.engine.paged import Layout, PagedBatch, layout_of
from node.engine.windows import window_of
from tests import pretend_device
from tests.node.engine.chain import MODEL, Chain, info

CPU = torch.device("cpu")


def test_numbers_of_a_forward() -> None:
    cache = PagedCache()
    places = [cache.open(0, 1, n) for n in (10, 600, 300)]
    cache.close(places[0])
    places.append(cache.open(0, 1, 512))  # takes up the page given back, and another
    rows = [Rows(places[1], 500, 20), Rows(places[2], 0, 3), Rows(places[3], 255, 2)]
    layout = layout_of(rows, 28)
    assert layout == Layout(28, 6, 3)
    out = np.full(sum(layout.sizes), 77, np.int32)
    layout.fill(rows, out)
    positions, where, starts, key_starts, used, tables = np.split(out, np.cumsum(layout.sizes)[:-1])
    wanted = [(r.place, p) for r in rows for p in range(r.start, r.start + r.n)]
    assert positions.tolist() == [p for _, p in wanted] + [0] * 3
    assert where.tolist() == [place.pages[p // PAGE] * PAGE + p % PAGE for place, p in wanted] + [0] * 3
    assert starts.tolist() == [0, 20, 23, 25, 26, 27, 28]
    assert used.tolist() == [520, 3, 257, 1, 1, 1]
    assert key_starts.tolist() == [0, 520, 523, 780, 781, 782, 783]
    first, second, third = (r.place.pages.tolist() for r in rows)
    assert tables.reshape(6, 3).tolist() == [first, [second[0], 0, 0], [*third, 0], *[[0, 0, 0]] * 3]


def test_pages_are_given_again_and_the_pool_keeps_what_it_holds() -> None:
    cache = PagedCache(budget=5 * PAGE * 2 * 2 * 4 * 4)  # five pages of two heads of four floats, keys and values
    rows = torch.arange(300 * 8.0).view(300, 2, 4)
    one = cache.open(0, 1, 300)
    one.write(0, 0, rows, -rows)
    others = [cache.open(0, 1, 1) for _ in range(2)]
    assert cache.pool.tensors(0)[0].shape[0] == 5
    others += [cache.open(0, 1, 1) for _ in range(2)]
    assert cache.pool.tensors(0)[0].shape[0] == 7, "past the budget it grows by what is needed"
    assert not any(0 in place.pages for place in (one, *others))
    keys, values = one.read(0, 7, 280)
    assert torch.equal(keys, rows[7:287])
    assert torch.equal(values, -rows[7:287])
    assert cache.bytes == 6 * cache.pool.page_bytes
    for place in (one, *others):
        cache.close(place)
    assert cache.bytes == 0
    with pytest.raises(ValueError, match="heads"):
        cache.open(0, 1, 1).write(0, 0, rows[:1, :1], rows[:1, :1])


def both(
    steps: Sequence[Sequence[tuple[int, int]]],
    rule: MaskRule | None,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    size: int = 8,
    **options: Any,
) -> None:
    """``steps`` of (sequence, rows) through both forms of attention, over pages on ``device`` in ``dtype``: the same,
    but for rounding."""
    generator, close = torch.Generator().manual_seed(1), 8 * torch.finfo(dtype).eps
    extents, pages = KvCache(), PagedCache()
    total = [sum(n for step in steps for i, n in step if i == s) for s in range(4)]
    places = [(extents.open(0, 1, n), pages.open(0, 1, n)) for n in total]
    done = [0, 0, 0, 0]
    for step in steps:
        given = [Rows(places[i][0], done[i], n) for i, n in step]
        order = packed_order(given)
        step = [step[i] for i in order]
        count = sum(n for _, n in step)
        q, k, v = (torch.randn(count, heads, size, generator=generator).to(dtype).float() for heads in (4, 2, 2))
        batch = Batch([given[i] for i in order], CPU)
        expected = batch.attend(0, q, k, v, rule, 0.3, **options)
        batch_of_pages = PagedBatch.of(pages.pool, [Rows(places[i][1], done[i], n) for i, n in step], device, count + 3)
        more = [torch.cat([t, t[-1:].expand(3, -1, -1)]).to(device, dtype) for t in (q, k, v)]
        found = batch_of_pages.attend(0, *more, rule, 0.3, **options).cpu().float()
        assert batch_of_pages.positions.tolist()[:count] == batch.positions.tolist()
        assert found.shape[0] == count + 3
        assert found.isfinite().all()
        assert torch.allclose(found[:count], expected, atol=max(close, 1e-5), rtol=close)
        for i, n in step:
            done[i] += n


STEPS = [[(0, 260), (1, 5), (2, 30)], [(0, 1), (1, 1), (2, 1)], [(0, 300), (2, 1), (3, 9)], [(i, 1) for i in range(4)]]
SLIDING = masking_utils.sliding_window_causal_mask_function(7)


@pytest.mark.parametrize("rule", [None, MaskRule(masking_utils.causal_mask_function), MaskRule(SLIDING)])
def test_the_kernel_sees_what_the_attention_of_the_cpu_sees(rule: MaskRule | None, kernel: list[int]) -> None:
    both(STEPS, rule)
    assert len(kernel) == len(STEPS)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (None, {"softcap": 2.0}),
        (MaskRule(SLIDING), {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}),
        (MaskRule(lambda b, h, q, k: (k <= q) & (q // 40 == k // 40)), {}),
    ],
    ids=["softcap", "sinks", "chunked"],
)
def test_what_the_kernel_does_not_do_is_written_out(
    rule: MaskRule | None, options: dict[str, Any], kernel: list[int]
) -> None:
    both(STEPS, rule, **options)
    assert not kernel


@pytest.mark.parametrize(
    ("rule", "window"),
    [
        (None, -1),
        (masking_utils.causal_mask_function, -1),
        (masking_utils.sliding_window_causal_mask_function(1), 0),
        (masking_utils.sliding_window_causal_mask_function(4096), 4095),
        (masking_utils.chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.long)), None),
        (masking_utils.chunked_causal_mask_function(100, torch.zeros(1, dtype=torch.long)), None),
        (lambda b, h, q, k: k >= 0, None),
        (lambda b, h, q, k: (k <= q) & (k > 3), None),
        (lambda b, h, q, k: (k <= q) & torch.ones(40, dtype=torch.bool)[k], None),
    ],
)
def test_which_masks_are_windows(rule: Callable[..., Any] | None, window: int | None) -> None:
    assert window_of(MaskRule(rule) if rule else None, CPU) == window


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
async def test_models_through_the_kernel(
    tiny: Callable[..., Path],
    prompts: list[list[int]],
    expected: Callable[[str], list[list[int]]],
    kernel: list[int],
    kind: str,
) -> None:
    chain = Chain((0, 2, 4), device=str(pretend_device.device()), kv_bytes=1 << 26, exact="off")
    await chain.load(tiny(kind))
    assert await chain.generate(prompts) == expected(kind)
    assert bool(kernel) == (kind != "gemma2"), "scores of gemma2 are soft-capped"
    await chain.stop()  # what was closed is closed on the device's thread, too
    for engine in chain.engines:
        engine.assert_idle()


async def test_masks_are_asked_once_and_layers_that_go_give_their_pages_back(
    tiny: Callable[..., Path],
    prompts: list[list[int]],
    expected: Callable[[str], list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int | None] = []

    def noted(rule: MaskRule | None, device: torch.device) -> int | None:
        asked.append(window_of(rule, device))
        return asked[-1]

    monkeypatch.setattr(paged, "window_of", noted)
    chain = Chain((0, 4), device=str(pretend_device.device()), kv_bytes=1 << 26, exact="off")
    (engine,) = chain.engines
    await chain.load(tiny("gemma2"))
    learned = len(asked)
    assert len(set(asked)) == learned == 2, "one of all keys, one of a window"
    assert await chain.generate(prompts) == expected("gemma2")
    assert len(asked) == learned, "the self-check's pool knew them"
    pool = engine._runner.models[MODEL].cache.pool  # type: ignore[union-attr]
    whole = pool.page_bytes
    await engine.load(info(), tiny("gemma2"), LayerSpan(MODEL, 0, 1))
    assert 4 * pool.page_bytes == whole
    await chain.load(tiny("gemma2"))
    assert await chain.generate(prompts) == expected("gemma2")
    assert pool.page_bytes == whole
    await chain.stop()
