"""The device thread: takes what the event loop posted, plans a step, computes it, hands the results over.

One thread owns the device, the models and every sequence's state; nothing here is locked.  The event loop posts calls
and never waits; results go back with ``call_soon_threadsafe``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from queue import Empty, SimpleQueue
from typing import Any

import torch

from mesh.types import ModelId
from node.engine.holding import Holding, failure, pieces_of
from node.engine.masks import Guide, NoMask
from node.engine.scheduler import Group, Pace, StepPlan, plan_step, ratio
from node.engine.sequence import Result, Sequence, SequenceSpec, Work
from node.engine.shard import Shard
from node.engine.span import Part

RATE_WINDOW_S = 5.0
GRACE, GRACE_MOST_S = 0.1, 0.005
"""How long a step waits for the tokens of the one before: this share of a step, and no longer."""
Deliver = Callable[[list[Result]], None]


class Runner:
    """Everything below ``post`` runs on the thread."""

    def __init__(
        self,
        threads: int,
        step_rows: int,
        deliver: Deliver,
        died: Callable[[BaseException], None],
        kv_bytes: int = 0,
    ) -> None:
        self._threads, self._step_rows, self._kv_bytes = threads, step_rows, kv_bytes
        self._deliver, self._died = deliver, died
        self._inbox: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = SimpleQueue()
        self._stopping = False
        self._models: dict[ModelId, Holding] = {}
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = self._step = 0
        self._recent: deque[tuple[float, int]] = deque()
        self.pace = Pace(step_rows)
        self.waiting = 0
        """Sequences with rows queued, after the last step."""
        self.rows = 0
        """Computed since the start."""
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, call: Callable[..., None], *args: Any) -> None:
        """From any thread: run ``call(*args)`` on this one before the next step.

        The queue is bounded by what ``open`` admitted and by the credit that frames come under.
        """
        self._inbox.put((call, args))

    def stop(self) -> None:
        """From any thread: end after the current step."""
        self.post(self._stop)

    def join(self) -> None:
        self._thread.join()

    def rate(self, now: float) -> float:
        """Rows a second over the last seconds."""
        rows = sum(n for at, n in list(self._recent) if now - at <= RATE_WINDOW_S)
        return rows / RATE_WINDOW_S

    @property
    def models(self) -> dict[ModelId, Holding]:
        return self._models

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            torch.set_num_threads(self._threads)
            with torch.inference_mode():  # tensors that a forward made may be written to in no other
                self._loop()
        except BaseException as error:
            self._died(error)
            raise

    def _loop(self) -> None:
        while not self._stopping:
            self._take_in()
            self._wait_for_fed()
            sequences = self._sequences.values()
            plan = plan_step(sequences, self._step_rows, self.pace.chunk_rows(ratio(sequences)))
            if plan.groups:
                self._compute(plan)

    def _take_in(self) -> None:
        """Run what was posted; with nothing to compute, wait for it."""
        idle = not any(s.ready for s in self._sequences.values())
        while idle or not self._inbox.empty():
            call, args = self._inbox.get()
            call(*args)
            if self._stopping:
                return
            idle = idle and self._inbox.empty() and not any(s.ready for s in self._sequences.values())

    def _wait_for_fed(self) -> None:
        """Give the tokens just drawn the moment that they need to come back as the next rows.

        They pass through the event loop.  A step that left without them would keep them waiting for all of its chunk,
        and streams that parted ways would stay in different steps for good.
        """
        end = time.perf_counter() + min(GRACE_MOST_S, GRACE * self.pace.step_s)
        while not self._stopping and any(self._is_awaited(s) for s in self._sequences.values()):
            try:
                call, args = self._inbox.get(timeout=max(0.0, end - time.perf_counter()))
            except Empty:
                return
            call(*args)

    def _is_awaited(self, sequence: Sequence) -> bool:
        """Its token was drawn here in the last step, and its next row starts here, too."""
        spec = sequence.spec
        whole = spec.start == 0 and spec.hops == 1 and spec.sampling is not None
        return whole and sequence.served == self._step and not sequence.queue and not sequence.failed

    def _stop(self) -> None:
        self._stopping = True

    def _compute(self, plan: StepPlan) -> None:
        began = time.perf_counter()
        self._step += 1
        results = [result for group in plan.groups for result in self._compute_group(group)]
        self._deliver(results)
        took = time.perf_counter() - began
        singles = sum(piece.n == 1 for group in plan.groups for piece in group.slices)
        self.pace.observe(singles, plan.rows - singles, took)
        self.rows += plan.rows
        self._note_rate(began + took, plan.rows)
        self.waiting = sum(bool(s.queue) for s in self._sequences.values())

    def _compute_group(self, group: Group) -> list[Result]:
        pieces = pieces_of(group.slices, self._sequences)
        try:
            results = self._models[group.model].compute(group.start, group.end, pieces)
        except AssertionError:
            raise
        except Exception as error:
            # A kernel's refusal (memory, a strange shape) ends the sequences that were in it, not the node.
            results = [failure(piece, f"the forward failed: {type(error).__name__}: {error}") for piece in pieces]
        for piece in pieces:
            if piece.sequence.failed:
                piece.sequence.queue.clear()
            else:
                piece.sequence.advance(piece.n, self._step)
        return results

    def _note_rate(self, now: float, rows: int) -> None:
        self._recent.append((now, rows))
        while now - self._recent[0][0] > RATE_WINDOW_S:
            self._recent.popleft()

    # -- what is posted ------------------------------------------------------------------------------------------------

    def open(self, spec: SequenceSpec, guide: Guide | None = None) -> None:
        holding = self._models[spec.model]
        self._arrivals += 1
        shard = holding.shard
        row_bytes = shard.hidden_size * shard.dtype.itemsize
        vocabulary = shard.config.get_text_config(decoder=True).vocab_size
        sequence = Sequence(spec, self._arrivals, row_bytes, vocabulary)
        base = self._sequences.pop(spec.base, None)
        if base is None:
            holding.open(sequence)
        else:
            sequence.state, sequence.length = base.state, base.length
        self._sequences[spec.key] = sequence
        if base is not None and not holding.cut(sequence, spec.kept):
            self._deliver([sequence.rewind()])
        if guide is not None:
            guide.size = vocabulary
            guide.post = lambda found: self.post(self.take_mask, sequence, guide, found)
            sequence.guide = guide
            sequence.expect(len(spec.tokens))

    def take_mask(self, sequence: Sequence, guide: Guide, found: torch.Tensor | NoMask) -> None:
        """A mask was made, or cannot be: then the sequence ends, at the latest when it is to draw."""
        guide.take(found)
        if guide.error is not None and sequence.queue and self._sequences.get(sequence.spec.key) is sequence:
            self._fail(sequence, sequence.queue[0], guide.error.why)

    def _fail(self, sequence: Sequence, work: Work, why: str) -> None:
        sequence.failed = why
        sequence.queue.clear()
        final = sequence.guide is not None and sequence.guide.error is not None and sequence.guide.error.final
        self._deliver([Result(work.key, work.tag, work.start, work.n, error=why, final=final)])

    def submit(self, work: Work) -> None:
        sequence = self._sequences.get(work.key)
        if sequence is None or sequence.rewound:  # it failed and was closed meanwhile, or stands elsewhere
            return
        why = sequence.refusal(work)
        if why:
            self._fail(sequence, work, why)
        else:
            sequence.push(work)

    def truncate(self, key: str, length: int) -> None:
        sequence = self._sequences.get(key)
        if sequence is None or (sequence.rewound and length):
            return
        sequence.rewound = False
        if not self._models[sequence.spec.model].cut(sequence, length):
            self._deliver([sequence.rewind()])

    def keep_pages(self, key: str, size: int, pages: Many[tuple[int, int]]) -> None:
        sequence = self._sequences[key]
        self._models[sequence.spec.model].keep_pages(sequence, size, pages)

    def take_pages(self, key: str, size: int, pages: Many[int]) -> None:
        sequence = self._sequences[key]
        if not self._models[sequence.spec.model].take_pages(sequence, size, pages):
            self._deliver([sequence.rewind()])

    def drop_pages(self, pages: Many[int]) -> None:
        for holding in self._models.values():
            holding.pages.drop(pages)

    def close(self, key: str) -> None:
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            holding = self._models[sequence.spec.model]
            holding.close(sequence)
            self._settle(sequence.spec.model, holding)

    def read_pages(
        self, key: str, layers: tuple[int, int], start: int, end: int, answer: Callable[[int, bytes], None]
    ) -> None:
        sequence = self._sequences.get(key)
        if sequence is not None:
            answer(*self._models[sequence.spec.model].read_pages(sequence, layers, start, end))

    def write_pages(self, key: str, start: int, n: int, piece: memoryview, spoiled: Callable[[], None]) -> None:
        sequence = self._sequences.get(key)
        if sequence is not None and not self._models[sequence.spec.model].write_pages(sequence, start, n, piece):
            spoiled()

    def install(self, model: ModelId, shard: Shard, mode: Any, wanted: Part, done: Callable[[], None]) -> None:
        """Take over a freshly loaded shard, next to the layers that are here already."""
        holding = self._models.get(model)
        if holding is None:
            self._models[model] = holding = Holding(shard, mode, self._kv_bytes, self._step_rows)
            shard.use(_attention_of(mode))
        elif shard is not holding.shard:
            holding.shard.adopt(shard)
        holding.wanted = wanted
        self._settle(model, holding)
        done()

    def want(self, model: ModelId, wanted: Part, only: bool, done: Callable[[], None]) -> None:
        """Keep ``wanted`` of what is here of a model; with ``only`` nothing that was wanted before."""
        holding = self._models.get(model)
        if holding is not None:
            holding.wanted = wanted if only else holding.wanted.union(wanted)
            self._settle(model, holding)
        done()

    def unload(self, model: ModelId, done: Callable[[], None]) -> None:
        """Give up a model as soon as the last sequence on it is closed."""
        if model in self._models:
            self._models[model].wanted = Part(())
            self._settle(model, self._models[model])
        done()

    def _settle(self, model: ModelId, holding: Holding) -> None:
        in_use = [s for s in self._sequences.values() if s.spec.model == model]
        holding.keep(in_use)
        if not holding.shard.part:
            del self._models[model]


def _attention_of(mode: str) -> str:
    from node.engine.attention import NAME

    return NAME if mode == "packed" else "eager"
