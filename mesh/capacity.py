"""What a node can hold of a model, and how long it needs for it: the arithmetic under placement and routing.

Decoding reads every weight once a step, whatever the batch, so it is bound by memory bandwidth; a long step
(prefill, many streams) is bound by arithmetic.  The time of a layer is the larger of both for a step of
``STEP_ROWS`` rows, the roofline of the machine.  Units: bytes, milliseconds.
"""

from __future__ import annotations

from bisect import bisect_left

import msgspec

from mesh.types import LayerSpan, ModelInfo, NodeId, Role

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

STEP_ROWS = 16
"""Rows of the step that placement reckons with: as many streams as a small mesh serves at once."""

DEFAULT_BANDWIDTH = 10e9
DEFAULT_FLOPS = 100e9
"""Assumed of a node that measured nothing: a slow laptop, so that the unknown never looks like the fastest."""


class NodeCapacity(msgspec.Struct, frozen=True):
    """What placement needs to know of a node; fields as in ``NodeProfile``."""

    id: NodeId
    weight_bytes: int
    flops: float = 0.0
    bandwidth: float = 0.0
    rtt_ms: float = 0.0
    role: Role = "any"
    draining: bool = False

    @property
    def holds_layers(self) -> bool:
        return self.role in ("any", "stage")


def span_bytes(model: ModelInfo, start: int, end: int) -> int:
    """Weights of layers [start, end), the embedding or the head included where the span touches that end."""
    if start >= end:
        return 0
    return (end - start) * model.layer_bytes + _ends_bytes(model, start == 0, end == model.n_layers)


def _ends_bytes(model: ModelInfo, first: bool, last: bool) -> int:
    tied = model.tied_bytes if first and last else 0
    return first * model.embed_bytes + last * model.head_bytes - tied


def step_ms(model: ModelInfo, weight_bytes: int, flops: float, bandwidth: float) -> float:
    """Time of one step of ``STEP_ROWS`` rows through ``weight_bytes`` of dense weights."""
    read_s = weight_bytes / (bandwidth or DEFAULT_BANDWIDTH)
    parameters = weight_bytes / DTYPE_BYTES.get(model.quantize or model.dtype, 2)
    compute_s = 2 * parameters * STEP_ROWS / (flops or DEFAULT_FLOPS)
    return 1e3 * max(read_s, compute_s)


def embed_ms(model: ModelInfo, bandwidth: float) -> float:
    """Time to look up ``STEP_ROWS`` rows of the embedding."""
    return 1e3 * STEP_ROWS * model.hidden_size * DTYPE_BYTES.get(model.dtype, 2) / (bandwidth or DEFAULT_BANDWIDTH)


def stage_ms(model: ModelInfo, node: NodeCapacity, start: int, end: int) -> float:
    """Time of one step of a stage that runs layers [start, end): its work and one leg of the wire to it."""
    ms = node.rtt_ms / 2 + (end - start) * step_ms(model, model.layer_bytes, node.flops, node.bandwidth)
    if start == 0:
        ms += embed_ms(model, node.bandwidth)
    if end == model.n_layers:
        ms += step_ms(model, model.head_bytes, node.flops, node.bandwidth)
    return ms


class Worker:
    """One node seen by one model: how many layers it may take by memory and by time.

    ``room`` is what is left of its weight memory for this model.
    """

    __slots__ = ("embed_ms", "head_ms", "id", "layer_ms", "leg_ms", "model", "room", "rooms")

    def __init__(self, model: ModelInfo, node: NodeCapacity, room: int) -> None:
        self.id = node.id
        self.model = model
        self.room = room
        self.leg_ms = node.rtt_ms / 2
        self.layer_ms = step_ms(model, model.layer_bytes, node.flops, node.bandwidth)
        self.embed_ms = embed_ms(model, node.bandwidth)
        self.head_ms = step_ms(model, model.head_bytes, node.flops, node.bandwidth)
        self.rooms = {
            (first, last): self._by_memory(room - _ends_bytes(model, first, last))
            for first in (False, True)
            for last in (False, True)
        }

    def _by_memory(self, room: int) -> int:
        return max(0, min(self.model.n_layers, room // max(1, self.model.layer_bytes)))

    def by_memory(self, first: bool, last: bool) -> int:
        """Most layers that fit, in a span that touches the first and/or last layer."""
        return self.rooms[first, last]

    def within(self, ms: float, first: bool, last: bool) -> int:
        """Most layers that fit and run in ``ms`` as one stage, its wire and its ends included."""
        left = ms - self.leg_ms - (self.embed_ms if first else 0.0) - (self.head_ms if last else 0.0)
        if left <= 0:
            return 0
        by_memory = self.rooms[first, last]
        return by_memory if self.layer_ms <= 0 else min(by_memory, int(left / self.layer_ms + 1e-9))

    def fits(self, start: int, end: int) -> bool:
        return end - start <= self.rooms[start == 0, end == self.model.n_layers]

    def reach(self, start: int) -> int:
        """The furthest end of a span from ``start`` that fits (``start``: none); never falls as ``start`` rises."""
        n = self.model.n_layers
        if n - start <= self.rooms[start == 0, True]:
            return n
        return min(start + self.rooms[start == 0, False], n - 1)

    def earliest(self, end: int) -> int:
        """The smallest start of a span that ends at or beyond ``end`` and fits; ``end``: there is none."""
        return bisect_left(range(end), end, key=self.reach)


def overlap(span: LayerSpan | tuple[int, int], start: int, end: int) -> int:
    """How many layers of [start, end) lie in ``span``."""
    a, b = (span.start, span.end) if isinstance(span, LayerSpan) else span
    return max(0, min(b, end) - max(a, start))
