"""Placement by trying everything: what ``mesh.placement`` is compared with.  Shares no code with it but the costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from mesh.capacity import NodeCapacity, span_bytes, stage_ms
from mesh.types import ModelInfo, NodeId

Span = tuple[int, int]
NEVER = float("inf")


def model(
    n_layers: int = 8, layer: int = 100, embed: int = 30, head: int = 50, name: str = "m", hidden: int = 4
) -> ModelInfo:
    """A model of a few bytes; times are kept sensible by nodes with small bandwidths."""
    return ModelInfo(
        id=name,
        manifest=f"manifest of {name}",
        n_layers=n_layers,
        layer_bytes=layer,
        embed_bytes=embed,
        head_bytes=head,
        hidden_size=hidden,
        kv_bytes=1,
        vocab_size=10,
        max_context=100,
        dtype="bfloat16",
    )


def slowest_possible(model: ModelInfo, nodes: Sequence[NodeCapacity], spans: dict[NodeId, Span] | None = None) -> float:
    """The best time of the slowest stage over all splits in all orders (within ``spans``, where given)."""
    n, best = model.n_layers, {(0, 0): 0.0}
    for _ in nodes:
        for (mask, x), ms in list(best.items()):
            for i, node in enumerate(nodes):
                low, high = (0, n) if spans is None else spans.get(node.id, (0, 0))
                if mask >> i & 1 or not low <= x < high:
                    continue
                for end in range(x + 1, high + 1):
                    if span_bytes(model, x, end) <= node.weight_bytes:
                        key = (mask | 1 << i, end)
                        best[key] = min(best.get(key, NEVER), max(ms, stage_ms(model, node, x, end)))
    return min((ms for (_, x), ms in best.items() if x == n), default=NEVER)


def maximal_spans(model: ModelInfo, node: NodeCapacity, anchor: Span | None) -> list[Span]:
    """All spans that fit, contain the anchor, and cannot be grown."""
    n = model.n_layers
    fitting = [
        (a, b)
        for a in range(n)
        for b in range(a + 1, n + 1)
        if span_bytes(model, a, b) <= node.weight_bytes and (anchor is None or (a <= anchor[0] and anchor[1] <= b))
    ]
    return [s for s in fitting if not any(t != s and t[0] <= s[0] and s[1] <= t[1] for t in fitting)] or [(0, 0)]


def copies(spans: Sequence[Span], n: int) -> int:
    return min(sum(a <= layer < b for a, b in spans) for layer in range(n))


def most_copies(model: ModelInfo, nodes: Sequence[NodeCapacity], anchors: dict[NodeId, Span]) -> int:
    """The most holders that every layer can have when each node's span must contain its anchor."""
    choices = [maximal_spans(model, node, anchors.get(node.id)) for node in nodes]
    return max(copies(chosen, model.n_layers) for chosen in product(*choices))


def most_copies_at_best_speed(model: ModelInfo, nodes: Sequence[NodeCapacity]) -> int:
    """The same over all spans within which some split is as fast as any split can be."""
    limit = slowest_possible(model, nodes) * 1.000001
    choices = [maximal_spans(model, node, None) for node in nodes]
    best = 0
    for chosen in product(*choices):
        k = copies(chosen, model.n_layers)
        named = {node.id: span for node, span in zip(nodes, chosen, strict=True)}
        if k > best and slowest_possible(model, nodes, named) <= limit:
            best = k
    return best
