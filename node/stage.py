"""The stage role: what the Stage core asks, the Engine computes; what the engine computed, the core sends on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from mesh.core import Effect, Emit, Send
from mesh.errors import CapacityError, MeshError
from mesh.pipeline import messages as m
from mesh.pipeline import stage as core
from mesh.pipeline.work import (
    Compute,
    Computed,
    DropPages,
    Export,
    Forget,
    Free,
    Import,
    KeepPages,
    Reserve,
    Spill,
    TakePages,
    Truncate,
    Unspill,
)
from mesh.types import LayerSpan, ModelId, NodeId
from node.driver import Alarm
from node.engine.sequence import Result, SequenceSpec, Work
from node.net.inbound import Received
from node.spill import SpillFiles

PENDING_BYTES = 64 << 20
"""Past this many bytes of hidden states in the engine's queue, senders get no more credit for a while."""


class _Pending:
    """Bytes of one sequence that wait in the engine's queue; ``row``: of one position; ``tag``: since its last cut."""

    def __init__(self, tag: int) -> None:
        self.tag = tag
        self.bytes = self.row = 0


class StageService:
    """Drives one ``StageCore`` over one ``Engine``.  Everything here runs on the event loop."""

    def __init__(
        self,
        me: NodeId,
        engine: Any,
        post: Callable[[Send], None],
        on_event: Callable[[Any], None],
        config: core.StageConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        disk: SpillFiles | None = None,
    ) -> None:
        """``disk``: may be left out where ``config`` allows no bytes on it."""
        self.core = core.StageCore(me, config)
        self._engine, self._post, self._on_event, self._clock = engine, post, on_event, clock
        self._disk = disk
        self._alarm = Alarm(self.core, lambda: self._perform(self.core.tick(self._clock())), clock)
        self._verbs: dict[type, Callable[[Any], list[Effect]]] = {
            Reserve: self._reserve,
            Compute: self._compute,
            Truncate: self._truncate,
            Free: self._free,
            KeepPages: self._keep_pages,
            TakePages: self._take_pages,
            DropPages: self._drop_pages,
            Export: self._export,
            Import: self._import,
            Spill: self._spill,
            Unspill: self._unspill,
            Forget: self._forget,
        }
        self._pending: dict[str, _Pending] = {}
        self._parked: deque[Received] = deque()
        engine.on_results = self.on_results

    def receive(self, message: m.ToStage, sender: NodeId) -> None:
        self._perform(self.core.receive(message, sender, self._clock()))

    def lost(self, node: NodeId, cause: str) -> None:
        """As ``Entry.lost``: sessions that ``node`` owned may be adopted here."""
        self._perform(self.core.lost(node, cause, self._clock()))

    def credit(self, frame: Received) -> None:
        """Let the sender of ``frame`` send as much again, now or when the engine has caught up."""
        if self.pending_bytes > PENDING_BYTES:
            self._parked.append(frame)
        else:
            frame.done()

    def on_results(self, results: Sequence[Result]) -> None:
        """One engine step's results."""
        for result in results:
            pending = self._pending.get(result.key)
            if pending is not None and pending.tag == result.tag:
                pending.bytes -= result.n * pending.row
        self._perform(self.core.computed([_computed(result) for result in results], self._clock()))

    @property
    def pending_bytes(self) -> int:
        """Hidden states that wait in the engine's queue."""
        return sum(pending.bytes for pending in self._pending.values())

    def kept(self) -> dict[str, int]:
        """Bytes of sessions' checkpointed rows: in memory, also on their way to the disk; on the disk; read from there
        and given up, so far.  Those of shared pages, which stay, are not among them."""
        keeper = self.core.keeper
        return {
            "memory_bytes": self.core.checkpoint_bytes + keeper.writing,
            "disk_bytes": keeper.ledger.disk,
            "read_bytes": self._disk.read_bytes if self._disk is not None else 0,
            "dropped_bytes": keeper.dropped_bytes,
        }

    def set_spans(self, spans: Sequence[LayerSpan]) -> None:
        self._perform(self.core.set_spans(spans))

    def activate(self, placement_id: m.PlacementId) -> None:
        self.core.activate(placement_id)

    def vacate(self, span: LayerSpan | None = None) -> None:
        """Have the sessions over ``span`` (``None``: all) moved to other nodes, where there are any."""
        self._perform(self.core.vacate(span))

    def stop(self) -> None:
        self._alarm.stop()

    def _perform(self, effects: list[Effect]) -> None:
        """In order; what the engine answers at once comes before what is left."""
        queue = deque(effects)
        while queue:
            effect = queue.popleft()
            if isinstance(effect, Send):
                self._post(effect)
                continue
            assert isinstance(effect, Emit), effect
            verb = self._verbs.get(type(effect.event))
            if verb is None:
                self._on_event(effect.event)
            else:
                queue.extendleft(reversed(verb(effect.event)))
        # Here, not with the results alone: for work that was cut or freed none will come.
        while self._parked and self.pending_bytes <= PENDING_BYTES:
            self._parked.popleft().done()
        self._alarm.update()

    def _reserve(self, ask: Reserve) -> list[Effect]:
        spec = SequenceSpec(
            key=ask.key,
            model=ModelId(ask.model),
            start=ask.start,
            end=ask.end,
            max_positions=ask.max_positions,
            priority=ask.priority,
            hops=ask.hops,
            sampling=ask.sampling,
            tokens=ask.tokens,
            base=ask.base,
            kept=ask.kept,
            rebuilds=ask.rebuilds,
        )
        now = self._clock()
        try:
            room = self._engine.open(spec)
        except CapacityError as error:
            return self.core.refused(ask.key, "busy", str(error), error.retry_after_s or 1.0, error.lacking)
        except MeshError as error:
            return self.core.refused(ask.key, "not_held", str(error), 0.5)
        page_bytes = self._engine.page_bytes(ask.key, self.core.config.page)
        return [*self.core.reserved(ask.key, now, page_bytes, room), *self.core.evict(self._engine.excess)]

    def _compute(self, work: Compute) -> list[Effect]:
        if work.hidden is not None:
            pending = self._pending.setdefault(work.key, _Pending(work.tag))
            pending.bytes, pending.row = pending.bytes + len(work.hidden), len(work.hidden) // work.n
        self._engine.submit(
            Work(
                key=work.key,
                tag=work.tag,
                start=work.start,
                n=work.n,
                tokens=work.tokens,
                hidden=work.hidden,
                sample=work.sample,
                prompt_logprobs=work.prompt_logprobs,
            )
        )
        return []

    def _truncate(self, event: Truncate) -> list[Effect]:
        self._pending.pop(event.key, None)
        self._engine.truncate(event.key, event.length)
        return []

    def _keep_pages(self, event: KeepPages) -> list[Effect]:
        self._engine.keep_pages(event.key, event.size, event.pages)
        return self.core.evict(self._engine.excess)

    def _take_pages(self, event: TakePages) -> list[Effect]:
        self._engine.take_pages(event.key, event.size, event.pages)
        return []

    def _drop_pages(self, event: DropPages) -> list[Effect]:
        self._engine.drop_pages(event.pages)
        return []

    def _export(self, ask: Export) -> list[Effect]:
        def answer(n: int, piece: bytes) -> None:
            self._perform(self.core.exported(ask, n, memoryview(piece)))

        self._engine.read_pages(ask.key, ask.layers, ask.start, ask.end, answer)
        return []

    def _import(self, event: Import) -> list[Effect]:
        def spoiled() -> None:
            self._perform(self.core.spoiled(event.key))

        self._engine.write_pages(event.key, event.start, event.n, event.payload, spoiled)
        return []

    def _spill(self, event: Spill) -> list[Effect]:
        assert self._disk is not None
        self._disk.write(event.number, event.rows, lambda kept: self._perform(self.core.spilled(event.number, kept)))
        return []

    def _unspill(self, ask: Unspill) -> list[Effect]:
        def answer(rows: bytes | None) -> None:
            self._perform(self.core.unspilled(ask, None if rows is None else memoryview(rows)))

        assert self._disk is not None
        self._disk.read(ask.number, answer)
        return []

    def _forget(self, event: Forget) -> list[Effect]:
        assert self._disk is not None
        self._disk.remove(event.numbers)
        return []

    def _free(self, event: Free) -> list[Effect]:
        self._pending.pop(event.key, None)
        self._engine.close(event.key)
        return []


def _computed(result: Result) -> Computed:
    drawn = result.sampled
    return Computed(
        key=result.key,
        tag=result.tag,
        start=result.start,
        n=result.n,
        hidden=result.hidden,
        token=drawn.token if drawn else None,
        logprob=drawn.logprob if drawn else 0.0,
        top=drawn.top if drawn else (),
        prompt_logprobs=result.prompt_logprobs,
        error=result.error,
        final=result.final,
        rewound=result.rewound,
    )
