"""Which steps share a graph, and that a graph reads nothing but what each step is copied to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from node.engine import graphs, holding
from node.engine.cells import Rows
from node.engine.graphs import Capture, Graphs, Outcome, Shape, shape_of
from node.engine.loading import prepare
from node.engine.page_pool import PagedCache
from node.engine.paged import Layout
from node.engine.pages import rounded
from node.engine.shard import Shard
from node.engine.span import Part
from tests import pretend_device
from tests.node.engine.chain import Chain
from tests.node.engine.recorded import capture


def test_few_shapes_for_all_steps() -> None:
    place = PagedCache().open(0, 1, 1)

    def shape(count: int, position: int = 0, filled: Callable[[int], int] = lambda n: n) -> Shape | None:
        return shape_of(0, 4, [Rows(place, position, 1)] * count, filled)

    assert shape(1) == Shape(0, 4, Layout(1, 1, 1))
    assert shape(5, 255) == Shape(0, 4, Layout(6, 6, 1))
    assert shape(5, 1200) == Shape(0, 4, Layout(6, 6, 6))
    assert shape(5, filled=lambda n: -(-n // 4) * 4) == Shape(0, 4, Layout(8, 8, 1))
    assert shape(256) is not None
    assert shape(257) is None
    assert shape_of(0, 4, [Rows(place, 0, 1), Rows(place, 0, 2)], lambda n: n) is None, "not all are single rows"
    assert len({rounded(n) for n in range(1, 257)}) == 16
    assert all(n <= rounded(n) <= 1.5 * n for n in range(1, 257))


def test_a_replay_knows_only_what_lies_in_its_tensors() -> None:
    """The stand-in for graphs: what would be frozen in one is, and what would break a capture does."""
    there = torch.ones(3).to(pretend_device.device())
    factor = 2.0

    def forward() -> Outcome:
        return (there * factor).view(3, 1).expand(3, 2) + 1, None

    replay, (found, _) = capture(forward)
    factor = 5.0
    there.add_(1)
    replay()
    assert found.tolist() == [[5.0, 5.0]] * 3, "the new tensor, the old factor"
    with pytest.raises(RuntimeError, match="waits"):
        capture(lambda: (there * there.sum().item(), None))
    with pytest.raises(RuntimeError, match="waits"):
        capture(lambda: (there + torch.ones(3).to(there.device), None))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Steps asked of graphs, and whether one computed them; graphs on every device."""
    found: list[bool] = []
    run = Graphs.run

    def noted(self: Graphs, *args: object) -> Outcome | None:
        outcome = run(self, *args)  # type: ignore[arg-type]
        found.append(outcome is not None)
        return outcome

    monkeypatch.setattr(Graphs, "run", noted)
    monkeypatch.setattr(holding, "capture_on", lambda device: capture)
    return found


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("cuts", [(0, 4), (0, 2, 4)])
async def test_the_same_tokens_by_graphs(
    tiny: Callable[..., Path],
    prompts: list[list[int]],
    expected: Callable[[str], list[list[int]]],
    runs: list[bool],
    cuts: tuple[int, ...],
) -> None:
    chain = Chain(cuts, device=str(pretend_device.device()), kv_bytes=1 << 26, exact="off")
    await chain.load(tiny("llama"))
    for _ in range(2):
        assert await chain.generate(prompts) == expected("llama")
    # After its last prompt a round has 11 steps of single rows at least; of one to four rows, the first time is none.
    assert runs.count(True) >= 2 * 11 - 4
    await chain.stop()


@pytest.mark.parametrize("kind", ["gemma2", "mixtral"])
async def test_who_reads_back_from_the_device_goes_without(
    tiny: Callable[..., Path],
    prompts: list[list[int]],
    expected: Callable[[str], list[list[int]]],
    runs: list[bool],
    kind: str,
) -> None:
    """Scores that are capped here, experts that are chosen there."""
    chain = Chain((0, 4), device=str(pretend_device.device()), kv_bytes=1 << 26, exact="off")
    await chain.load(tiny(kind))
    assert await chain.generate(prompts) == expected(kind)
    assert not any(runs)
    await chain.stop()


STARTS = (252, 40, 3)
COMPANIES = (3, 3, 2, 2, 1, 1, 3, 2, 1, 3)
"""How many of the sequences take part in a step."""


def follow(shard: Shard, how: Capture) -> None:
    """Sequences step by step, by graphs beside forwards: the same over a page's end and in changing company."""
    cache, generator = shard.cache(), torch.Generator().manual_seed(2)
    made, close = Graphs(shard, cache.pool, how), 40 * torch.finfo(shard.dtype).eps
    pairs = [[cache.open(0, 4, 300) for _ in range(2)] for _ in STARTS]
    by_graphs = 0

    def drawn(count: int) -> torch.Tensor:
        return torch.randint(3, 250, (count,), generator=generator)

    def plain(which: int, given: torch.Tensor, lengths: list[int]) -> Outcome:
        rows = [Rows(pair[which], at, n) for pair, at, n in zip(pairs, done, lengths, strict=False)]
        return shard.packed(0, 4, given, shard.batch(rows), torch.arange(len(given)))

    done, given = [0] * len(STARTS), drawn(sum(STARTS))
    for which in (0, 1):
        plain(which, given, list(STARTS))
    done = list(STARTS)
    for count in COMPANIES:
        given = drawn(count)
        expected = plain(0, given, [1] * count)
        rows = [Rows(pair[1], at, 1) for pair, at in zip(pairs[:count], done, strict=False)]
        found = made.run(0, 4, rows, given)
        by_graphs += found is not None
        for a, b in zip(found or plain(1, given, [1] * count), expected, strict=True):
            assert a is not None
            assert b is not None
            assert a.shape == b.shape
            assert torch.allclose(a.cpu().float(), b.cpu().float(), atol=close * float(b.abs().max()))
        done = [at + (i < count) for i, at in enumerate(done)]
    assert by_graphs >= 4
    assert 0 < len(made) <= 6


@pytest.mark.usefixtures("kernel")
def test_step_by_step_as_without_graphs(tiny: Callable[..., Path]) -> None:
    device = str(pretend_device.device())
    follow(prepare(tiny("llama"), Part.of_span(0, 4, 4), "float32", "off", 1, "", device).shard, capture)


async def test_graphs_are_void_when_the_pool_moves_and_the_oldest_goes(
    tiny: Callable[..., Path],
    kernel: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = str(pretend_device.device())
    shard = prepare(tiny("llama"), Part.of_span(0, 4, 4), "float32", "off", 1, "", device).shard
    cache = shard.cache()
    made = Graphs(shard, cache.pool, capture)
    places = [cache.open(0, 4, 64) for _ in range(3)]

    def step(count: int) -> Outcome | None:
        return made.run(0, 4, [Rows(place, 0, 1) for place in places[:count]], torch.full((count,), 7))

    assert step(1) is None, "the first of a shape is computed as any other"
    hidden, logits = step(1) or (None, None)
    assert hidden is not None
    assert logits is not None
    batch = shard.batch([Rows(places[0], 0, 1)])
    expected = shard.packed(0, 4, torch.tensor([7]), batch, torch.tensor([0]))
    assert torch.allclose(hidden.cpu(), expected[0].cpu(), atol=1e-5)
    assert torch.allclose(logits.cpu(), expected[1].cpu(), atol=1e-4)  # type: ignore[union-attr]
    monkeypatch.setattr(graphs, "GRAPHS_MOST", 2)
    for count in (2, 3):
        step(count)
        assert step(count) is not None
    assert len(made) == 2
    while not cache.pool.moved > made._moved:
        places.append(cache.open(0, 4, 64))
    assert step(3) is not None
    assert len(made) == 1
