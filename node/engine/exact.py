"""Does a position give the same bits whatever it is computed with?  Tested at load, on the layers themselves.

A node advertises *exact* for a span when this holds: then a stage's replay on another node of the same hardware class
continues a stream with the tokens of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from node.engine import experts, products
from node.engine.cells import Rows
from node.engine.kv_cache import KvCache
from node.engine.shard import Shard

LENGTHS = (142, 37, 9, 6)
"""Positions of the test's sequences: past a page, past a tile's four, and a few."""
RULES = (1, 4, 8)
"""Forwards are filled up to a multiple of these many rows (and of what packed products ask for); the cheapest first.
Where plain products need more, packed ones are quicker (``products.forms_of``)."""
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""On pages: all sizes of a forward (``pages.rounded``) up to the rows of a step.  Each may be a kernel of its own, so
each is tested, and what is exact runs in no other."""
PAGED_LENGTHS = (sum(BUCKETS), *LENGTHS[1:])
Step = Sequence[tuple[int, int]]
"""(sequence, rows) pairs that go together."""
Outputs = list[list[torch.Tensor]]


def make_exact(shard: Shard, start: int, end: int, threads: int) -> bool:
    """Find the rule under which [start, end) is exact and set it in ``shard``; ``False``: there is none.

    Rows as they come are enough where all products are packed; others need whole fours or, with AVX-512, more.
    """
    if shard.paged:
        shard.bucketed = True
        shard.bucketed = all(_layer_is_exact(shard, i, threads) for i in _one_of_each_kind(shard, start, end))
        return shard.bucketed
    before = shard.multiple
    for rule in RULES if shard.least_multiple else ():
        shard.multiple = math.lcm(before, shard.least_multiple, rule)  # layers tested earlier keep their rule
        if all(_layer_is_exact(shard, layer, threads) for layer in _one_of_each_kind(shard, start, end)):
            return True
    shard.multiple = before
    return False


def _one_of_each_kind(shard: Shard, start: int, end: int) -> list[int]:
    """Layers with the same modules, weights' shapes and products run the same kernels; the last one runs the head,
    too."""
    kinds: dict[object, int] = {}
    layers = shard.model.get_submodule(shard.layout.layers)
    for index in range(start, end):
        layer = layers[index].layer
        names = tuple((name, type(module).__name__) for name, module in layer.named_modules())
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        packed = tuple(
            (type(p).__name__, p.shape) for p in [*products.products_below(layer), *experts.products_of(layer)]
        )
        lean = layers[index].lean is not None
        kinds.setdefault((names, shapes, packed, lean, getattr(layers[index], "attention_type", "")), index)
    head = {end - 1} if end == shard.layout.n_layers else set()
    return sorted({*kinds.values(), *head})


def _layer_is_exact(shard: Shard, layer: int, threads: int) -> bool:
    generator = torch.Generator().manual_seed(layer)
    lengths = PAGED_LENGTHS if shard.paged else LENGTHS
    if layer == 0:
        vocabulary = shard.config.get_text_config(decoder=True).vocab_size
        given = [torch.randint(0, vocabulary, (n,), generator=generator) for n in lengths]
    else:
        given = [torch.randn(n, shard.hidden_size, generator=generator).to(shard.dtype) for n in lengths]
    first, *others = _paged() if shard.paged else (_alone(), _mixed(), [list(enumerate(LENGTHS))])
    torch.set_num_threads(1)
    alone = _play(shard, layer, given, first)
    torch.set_num_threads(threads)
    return all(_same(_play(shard, layer, given, steps), alone) for steps in others)


def _alone() -> list[Step]:
    return [[(i, n)] for i, n in enumerate(LENGTHS)]


def _paged() -> tuple[list[Step], ...]:
    """In the largest forwards, alone; one forward of every size; in company."""
    size, rest = BUCKETS[-1], list(enumerate(LENGTHS))[1:]
    whole, left = divmod(PAGED_LENGTHS[0], size)
    alone: list[Step] = [*[[(0, size)]] * whole, [(0, left)], *([one] for one in rest)]
    every: list[Step] = [*([(0, n)] for n in BUCKETS), rest]
    beside = size - sum(n for _, n in rest)
    company: list[Step] = [[(0, beside), *rest], *[[(0, size)]] * (whole - 1), [(0, left + size - beside)]]
    return alone, every, company


def _mixed() -> list[Step]:
    """Chunks of many sizes beside single rows, then single rows of all sequences together, of two, and of one alone."""
    chunks: list[Step] = [[(0, 61), (1, 5)], [(0, 7), (1, 23), (2, 1)], [(0, 60), (2, 2), (3, 1)]]
    singles: list[Step] = [[(i, 1) for i in range(4)] for _ in range(5)]
    return [*chunks, *singles, [(0, 1), (1, 1)], [(1, 1), (2, 1)], [(1, 2)], *[[(0, 1)]] * 8]


def _play(shard: Shard, layer: int, given: list[torch.Tensor], steps: Sequence[Step]) -> Outputs:
    """Run ``steps`` through one layer; per sequence its hidden states (and logits, behind the last layer)."""
    # A window of one key: what lies past a page is read from there, as a longer sequence is past its window.
    cache = KvCache({layer: 0}) if shard.room_of(layer, 0).window else shard.cache()
    places = [cache.open(layer, layer + 1, len(rows)) for rows in given]
    done = [0] * len(given)
    outputs: Outputs = [[] for _ in given]
    for step in steps:
        rows = [Rows(places[i], done[i], n) for i, n in step]
        order = shard.order(rows)
        pieces = [given[step[j][0]][rows[j].start : rows[j].start + rows[j].n] for j in order]
        batch = shard.batch([rows[j] for j in order])
        wanted = torch.arange(batch.count) if _has_head(shard, layer) else None
        hidden, logits = shard.packed(layer, layer + 1, torch.cat(pieces), batch, wanted)
        first = 0
        for j in order:
            i, n = step[j]
            found = hidden if logits is None else torch.cat([hidden, logits], -1)
            outputs[i].append(found[first : first + n])
            first, done[i] = first + n, done[i] + n
    assert done == [len(rows) for rows in given], "the test's steps do not add up"
    return outputs


def _has_head(shard: Shard, layer: int) -> bool:
    return shard.part.head and layer == shard.layout.n_layers - 1


def _same(found: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(torch.cat(a), torch.cat(b)) for a, b in zip(found, expected, strict=True))


def hardware_class(device: torch.device, dtype: torch.dtype) -> str:
    """Nodes of one class give the same bits: device kind and chip, torch build, and a hash of bits computed there.

    The hash covers what the other parts cannot name: caches and libraries that change how kernels block their sums.
    """
    kind = device.type
    chip = torch.cuda.get_device_name(device) if kind == "cuda" else torch.backends.cpu.get_cpu_capability()
    return "/".join(
        (kind, platform.machine(), str(chip), f"torch{torch.__version__}", str(dtype)[6:], _bits(dtype, device))
    )


@torch.inference_mode()
def _bits(dtype: torch.dtype, device: torch.device) -> str:
    """Eight hex digits over products, attention and elementwise functions of fixed numbers."""
    digest = hashlib.sha256()

    def fixed(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return ((torch.arange(count) * 2654435761 % 2003).double() / 2003 - 0.5).to(dtype).view(shape).to(device)

    for size, out in ((64, 192), (768, 2048), (2048, 768)):
        x, weight = fixed(8, size), fixed(out, size)
        found = [F.linear(x, weight)]
        if products.can_pack(dtype, device):
            found.append(products.Float(weight)(x, None))
        if products.can_halve(dtype, device):
            found.append(products.Half(weight)(x, None))
        if device.type == "cpu":  # quantized products exist there only
            found.append(products.Int8(weight)(x, None))
        wide = found[0].float()
        found += [
            F.silu(found[0]),
            wide.softmax(-1),
            wide.pow(2).mean(-1).rsqrt(),
            torch.linalg.vector_norm(wide, 2, -1),
        ]
        for tensor in found:
            digest.update(tensor.float().cpu().numpy().tobytes())
    q, k = fixed(1, 8, 4, 64), fixed(1, 2, 640, 64)
    digest.update(F.scaled_dot_product_attention(q, k, k, enable_gqa=True).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]
