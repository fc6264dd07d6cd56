"""Layers with a window: what they hold, what they read of it, and that nobody's bits or answers change by it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from node.engine.attention import MaskRule
from node.engine.batch import Batch
from node.engine.cells import Rows, packed_order
from node.engine.kv_cache import KvCache, Place
from node.engine.pages import PAGE, SLACK, band_of, padded

CPU = torch.device("cpu")


def window_rule(window: int) -> MaskRule:
    return MaskRule(lambda batch, head, q, k: (k <= q) & (k > q - window))


# -- where a slot begins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 24, 127, 128, 129, 130, 512, 1000, 1024])
@pytest.mark.parametrize("step_rows", [1, 32, 500, 512])
def test_a_slot_has_what_steps_cuts_and_copies_ask_for(window: int, step_rows: int) -> None:
    """However long the steps are and wherever they begin."""
    band, chance = band_of(window, 1 << 30, step_rows), random.Random(window * 1000 + step_rows)
    assert band.width <= window + 3 * PAGE + SLACK + 2 * step_rows
    base = at = 0
    for _ in range(2000):
        n = chance.randint(1, step_rows)
        moved = band.moved(base, at, n)
        assert moved % PAGE == 0
        assert base <= moved <= band.first(at) <= max(0, at - window + 1)
        assert at + n <= moved + band.width
        if moved > base:
            assert moved <= band.first(max(0, at - SLACK)), "a cut asks for more than is there"
            assert moved <= max(0, at - step_rows), "a page of the last step is gone"
        base, at = moved, at + n
        if chance.random() < 0.1:
            back = max(0, at - chance.randint(1, 2 * SLACK))
            at = back if base <= band.first(back) else at


def test_what_is_read_for_a_position_is_the_same_in_all_of_its_page() -> None:
    band = band_of(200, 1 << 20, 512)
    for position in range(3 * PAGE, 5 * PAGE):
        first = band.first(position)
        assert first == band.first(position // PAGE * PAGE)
        assert first <= position - 199
        assert padded(position + 1) - first <= 200 + 2 * PAGE


def test_a_layer_takes_no_more_than_a_slot_of_all_positions() -> None:
    assert band_of(24, 256, 512).width == 256
    assert (band_of(512, 8192, 512).width, band_of(1024, 8192, 512).width) == (1280, 1792)


# -- one layer: any steps, any cuts ------------------------------------------------------------------------------------


class Layer:
    """Sequences in one layer, and what attention over all that was ever computed gives."""

    def __init__(self, window: int, step_rows: int, positions: int) -> None:
        self.rule, self.window = window_rule(window), window
        self.cache = KvCache({0: window - 1}, step_rows)
        self.positions = positions
        generator = torch.Generator().manual_seed(window)
        self.query, self.key, self.value = (torch.randn(positions, h, 8, generator=generator) for h in (4, 2, 2))
        keys, values = (t.repeat_interleave(2, 1).transpose(0, 1) for t in (self.key, self.value))
        scores = self.query.transpose(0, 1) @ keys.transpose(1, 2) * 8**-0.5
        at = torch.arange(positions)
        seen = self.rule.visible(0, 0, at[:, None], at)
        self.truth = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1)

    def open(self) -> Place:
        return self.cache.open(0, 1, self.positions)

    def attend(self, rows: Sequence[Rows], wrong: bool = False) -> list[torch.Tensor]:
        """What each of ``rows`` gives; ``wrong``: other keys and values, which a cut makes void."""
        order = packed_order(rows)
        batch = Batch([rows[i] for i in order], CPU)
        at = torch.cat([torch.arange(rows[i].start, rows[i].start + rows[i].n) for i in order])
        change = 3.0 if wrong else 0.0
        given = self.query[at], self.key[at] + change, self.value[at] - change
        found = batch.attend(0, *given, self.rule, 8**-0.5).split([rows[i].n for i in order])
        return [part for _, part in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


@pytest.mark.parametrize(("window", "step_rows"), [(1, 16), (24, 32), (128, 64), (150, 20), (300, 128)])
def test_steps_and_cuts_of_any_size_read_what_a_window_sees(window: int, step_rows: int) -> None:
    """Sequences side by side that are cut and grow again, over and over, with void rows under way: the truth, and the
    bits of one that was never cut."""
    layer, chance = Layer(window, step_rows, 1500), random.Random(window)
    straight = torch.empty_like(layer.truth)
    place = layer.open()
    for start in range(0, 1500, step_rows):
        n = min(step_rows, 1500 - start)
        straight[start : start + n] = layer.attend([Rows(place, start, n)])[0]
    assert torch.allclose(straight, layer.truth, atol=1e-5)
    places, lengths, furthest, refused = [layer.open() for _ in range(3)], [0] * 3, [0] * 3, 0
    band = places[0].extent.bands[0]
    assert band.width < 1500
    for _ in range(1200):
        rows = []
        for place, length in zip(places, lengths, strict=True):
            n = min(chance.choice((1, 1, 1, 2, step_rows // 2, step_rows)), 1500 - length)
            if n and chance.random() < 0.8:
                rows.append(Rows(place, length, n))
        void = chance.random() < 0.1
        found = layer.attend(rows, wrong=void) if rows else []
        for r, out in zip(rows, found, strict=True):
            i = places.index(r.place)
            furthest[i] = max(furthest[i], r.start)
            if not void:
                assert torch.equal(out, straight[r.start : r.start + r.n]), (r.start, r.n, place.bases)
                lengths[i] += r.n
        for i, place in enumerate(places):
            full, deep = lengths[i] >= 1500 - step_rows, chance.random() < 0.01
            if void or full or deep or chance.random() < 0.02:
                most = lengths[i] if full or deep else chance.choice((0, 2, SLACK))
                back = chance.randint(0, most)
                length = max(0, lengths[i] - back)
                may = place.bases[band] <= band.first(length) or not length
                assert may or length < furthest[i] - SLACK
                assert place.cut(length) == may
                if not may or not length:
                    lengths[i], furthest[i] = 0, 0
                lengths[i] = length if may else 0
                refused += not may
    assert refused > 3


def test_what_was_never_written_is_nothing_though_it_was_nan() -> None:
    layer = Layer(24, 32, 1500)
    first = layer.open()
    layer.attend([Rows(first, 0, 32)])
    for tensor in first.extent.tensors(0):
        tensor.fill_(float("nan"))
    place = layer.open()
    for start in range(0, 1500, 20):
        found = layer.attend([Rows(place, start, 20)])[0]
        assert torch.allclose(found, layer.truth[start : start + 20], atol=1e-5)
    assert place.bases[place.extent.bands[0]] > 0


def test_layers_of_two_windows_and_of_none_move_by_themselves() -> None:
    cache = KvCache({0: 23, 1: 499, 2: -1, 3: None}, 32)
    place = cache.open(0, 4, 2000)
    rules = {0: window_rule(24), 1: window_rule(500), 2: None, 3: MaskRule(lambda b, h, q, k: (k <= q) & (k >= 0))}
    query, key, value = torch.randn(2000, 4, 8), torch.randn(2000, 2, 8), torch.randn(2000, 2, 8)
    for start in range(0, 2000, 25):
        batch, rows = Batch([Rows(place, start, 25)], CPU), slice(start, start + 25)
        found = {i: batch.attend(i, query[rows], key[rows], value[rows], rule, 0.3) for i, rule in rules.items()}
        assert torch.equal(found[2], found[3])
    bases = [place.base(layer) for layer in range(4)]
    assert bases[0] > bases[1] > 0 == bases[2] == bases[3]
    widths = [place.extent.tensors(layer)[0].shape[1] for layer in range(4)]
    assert widths == [band_of(24, 2048, 32).width, band_of(500, 2048, 32).width, 2048, 2048]
    for layer, base in enumerate(bases):
        keys, values = place.read(layer, base, 2000 - base)
        assert torch.equal(keys, key[base:])
        assert torch.equal(values, value[base:])
