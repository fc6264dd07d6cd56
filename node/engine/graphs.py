"""Decoding steps on a GPU as graphs: one launch in the place of a forward's thousands, which Python would be bound by.

A step of single rows is captured the second time that one of its shape comes.  Rows are filled up to one of a few
sizes, tables likewise, so that there are few shapes.  What a graph reads and writes stays where it was when it was
captured: a step's numbers are copied there, from pinned memory that torch does not reuse before the copy is done, and
its results are good until the next step.  When the pool's tensors move or layers go, all graphs are void.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import structlog
import torch

from node.engine.cells import Rows
from node.engine.page_pool import PagePool
from node.engine.paged import Layout, PagedBatch, layout_of, numbers_of
from node.engine.pages import rounded
from node.engine.shard import Shard

ROWS_MOST = 256
"""Larger steps keep a GPU busy without."""
GRAPHS_MOST = 64
"""The oldest goes."""
Outcome = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states [T, H]; logits [T, V] behind the last layer."""
Capture = Callable[[Callable[[], Outcome]], tuple[Callable[[], object], Outcome]]
"""A forward -> what computes it again from the same tensors, and the tensors that it leaves its results in."""


class Shape(msgspec.Struct, frozen=True):
    """Steps of one shape share a graph."""

    start: int
    end: int
    layout: Layout


class Graph(msgspec.Struct, frozen=True):
    numbers: torch.Tensor
    """As the layout says; behind them the token ids, where the first layer is among the graph's."""
    given: torch.Tensor | None
    """[T, H], where it is not."""
    replay: Callable[[], object]
    outcome: Outcome


def shape_of(start: int, end: int, rows: Sequence[Rows], filled: Callable[[int], int]) -> Shape | None:
    """``filled``: of how many rows forwards are, that should be of so many; ``None``: there are no graphs so large."""
    total = filled(rounded(len(rows)))
    if total > ROWS_MOST or any(r.n != 1 for r in rows):
        return None
    return Shape(start, end, Layout(total, total, rounded(layout_of(rows, total).pages)))


class Graphs:
    """Of one model at this engine.  Only the device thread calls it."""

    def __init__(self, shard: Shard, pool: PagePool, capture: Capture) -> None:
        self._shard, self._pool, self._capture = shard, pool, capture
        self._graphs: dict[Shape, Graph] = {}
        self._met: set[Shape] = set()
        self._moved = pool.moved
        self._why_not = ""

    def clear(self) -> None:
        """Layers went, or the pool's tensors moved."""
        self._graphs.clear()
        self._moved = self._pool.moved

    def __len__(self) -> int:
        return len(self._graphs)

    @torch.inference_mode()
    def run(self, start: int, end: int, rows: Sequence[Rows], given: torch.Tensor) -> Outcome | None:
        """``Shard.packed`` of ``rows``, with logits of all; ``None``: not by a graph, at least not yet."""
        shape = None if self._why_not else shape_of(start, end, rows, self._shard.filled)
        if shape is None:
            return None
        if self._moved != self._pool.moved:
            self.clear()
        graph = self._graphs.get(shape)
        if graph is None:
            if shape not in self._met:
                self._met.add(shape)
                return None
            graph = self._make(shape, rows, given)
            if graph is None:
                return None
        else:
            self._fill(graph, shape, rows, given)
        graph.replay()
        hidden, logits = graph.outcome
        return hidden[: len(rows)], None if logits is None else logits[: len(rows)]

    def _fill(self, graph: Graph, shape: Shape, rows: Sequence[Rows], given: torch.Tensor) -> None:
        """Copy a step's numbers to where ``graph`` reads them."""
        ids = given.tolist() if graph.given is None else []
        ids += ids[-1:] * (shape.layout.total - len(ids))
        graph.numbers.copy_(numbers_of(shape.layout, rows, self._shard.device, ids), non_blocking=True)
        if graph.given is not None:
            graph.given[: len(rows)].copy_(given, non_blocking=True)

    def _make(self, shape: Shape, rows: Sequence[Rows], given: torch.Tensor) -> Graph | None:
        shard, layout, size = self._shard, shape.layout, sum(shape.layout.sizes)
        device, first, kernels = shard.device, shape.start == 0, True
        numbers = torch.zeros(size + (layout.total if first else 0), dtype=torch.int32).to(device)
        hidden = None if first else torch.zeros(layout.total, shard.hidden_size, dtype=shard.dtype).to(device)
        wanted = torch.arange(layout.total).to(device) if shape.end == shard.layout.n_layers else None

        def forward() -> Outcome:
            nonlocal kernels
            batch = PagedBatch(self._pool, layout, numbers, layout.total, 1)
            taken = numbers[size:].long() if hidden is None else hidden
            outcome = shard.packed(shape.start, shape.end, taken, batch, wanted)
            kernels = kernels and batch.one_kernel
            return outcome

        self._fill(Graph(numbers, hidden, forward, (numbers, None)), shape, rows, given)
        why_not = _reads_back(shard)
        if not why_not:
            forward()
            why_not = "" if kernels else "its attention is not all in one kernel"
        try:
            replay, outcome = (None, None) if why_not else self._capture(forward)
        except RuntimeError as error:  # what a model's own code does that cannot be captured is not known before
            replay, outcome, why_not = None, None, str(error).strip().partition("\n")[0]
        if replay is None or outcome is None:
            self._why_not = why_not
            structlog.get_logger().info("decoding without graphs", model=shard.config.model_type, why=why_not)
            return None
        while len(self._graphs) >= GRAPHS_MOST:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[shape] = Graph(numbers, hidden, replay, outcome)
        return self._graphs[shape]


def _reads_back(shard: Shard) -> str:
    """Why a forward of ``shard`` waits for the device; empty: it does not."""
    experts = any(hasattr(module, "is_transposed") for module in shard.model.modules())
    return "which experts a row takes is read back from the device" if experts else ""


def capture_on(device: torch.device) -> Capture | None:
    """``None`` where the device has no graphs."""
    return CudaCapture(device) if device.type == "cuda" else None


class CudaCapture:
    """All graphs of one model: they share the memory of what they compute on the way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory: Any = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Callable[[], Outcome]) -> tuple[Callable[[], object], Outcome]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                forward()  # libraries take what they need for this stream before the capture
            # Thread-local: another thread may load layers meanwhile.  Entering waits for the device.
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
                outcome = forward()
        return graph.replay, outcome
