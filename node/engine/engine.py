"""The engine as the event loop sees it: open, submit, truncate and close never wait; results come by callback.

Torch is imported when the first span is loaded, in another thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from mesh.errors import ConfigError, MeshError, StalePlacement
from mesh.types import LayerSpan, ModelId, ModelInfo
from node.engine.pages import STEP_ROWS, KvBudget, LayerRoom, paged_width, width_of
from node.engine.sequence import EngineStats, Result, SequenceSpec, Work
from node.own_thread import in_own_thread
from node.text.grammar import Vocabularies

if TYPE_CHECKING:
    from node.engine.loading import Prepared
    from node.engine.masks import Guide, Masks
    from node.engine.runner import Runner
    from node.engine.span import Part


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one device may use."""

    kv_bytes: int = 1 << 30
    """For keys and values of all sequences together."""
    threads: int = 1
    device: str = "cpu"
    """Where weights, keys and values lie and layers are computed: ``cpu`` or ``cuda:N``."""
    exact: Literal["auto", "on", "off"] = "auto"
    """``on`` refuses spans that fail the self-test, ``off`` skips it and advertises nothing."""
    step_rows: int = STEP_ROWS
    """Rows of one step at most; what goes beside decoding is measured and less."""


class Loaded(msgspec.Struct, frozen=True):
    """How a span is served."""

    span: LayerSpan
    mode: Literal["packed", "compat"]
    exact: bool
    """A position gives the same bits alone, in any batch, in any chunk, at any number of stages."""
    layers: tuple[LayerRoom, ...]
    """What each takes of a sequence."""
    why: str = ""
    """Why it is not packed."""


class _Known(msgspec.Struct, frozen=True):
    """What the checks found of the layers of one model that were loaded so far."""

    mode: Literal["packed", "compat"]
    exact: bool
    why: str
    layers: dict[int, LayerRoom]


def _joined(known: _Known | None, prepared: Prepared) -> _Known:
    if known is None:
        return _Known(prepared.mode, prepared.exact, prepared.why, prepared.layers)
    same, why = known.exact and prepared.exact, known.why or prepared.why
    return _Known(known.mode, same, why, known.layers | prepared.layers)


class Engine:
    """One device.  All methods are for the event loop's thread; ``on_results`` is called there."""

    def __init__(self, config: EngineConfig | None = None, vocabularies: Vocabularies | None = None) -> None:
        self.config = config or EngineConfig()
        self._vocabularies = vocabularies or Vocabularies()
        self.on_results: Callable[[list[Result]], None] = lambda results: None
        self.hardware = ""
        """Nodes of one hardware class replay to the same bits; known once a span is loaded."""
        self.failed: asyncio.Future[None] | None = None
        """Awaited by whoever must know that the device thread died of a bug; made with the thread."""
        width = width_of if self.config.device == "cpu" else paged_width
        self._budget = KvBudget(self.config.kv_bytes, width, self.config.step_rows)
        self._open: dict[str, SequenceSpec] = {}
        self._loaded: dict[ModelId, Loaded] = {}
        self._known: dict[ModelId, _Known] = {}
        """Of models in memory: layers that are given up may still be there, and be wanted again."""
        self._loading = asyncio.Lock()
        self._folders: dict[ModelId, Path] = {}
        self._runner: Runner | None = None
        self._masks: Masks | None = None

    # -- spans ---------------------------------------------------------------------------------------------------------

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        """The spans that may be opened."""
        return tuple(self._loaded.values())

    @property
    def exact(self) -> bool:
        """Every loaded span passed the self-test."""
        return bool(self._loaded) and all(loaded.exact for loaded in self._loaded.values())

    async def load(self, model: ModelInfo, folder: Path, span: LayerSpan) -> Loaded:
        """Serve ``span`` from now on, instead of what was served of ``model`` before.

        Layers that are in memory stay; only missing ones are read from ``folder`` (which may lack the others' bytes).
        Layers given up stay until the sessions on them are closed.  Raises ``ConfigError`` naming kind and reason.
        """
        if span.model != model.id or not 0 <= span.start < span.end <= model.n_layers:
            raise ConfigError(f"{model.id} has no layers [{span.start}, {span.end})")
        async with self._loading:
            runner = await self._running()
            return await self._load(runner, model, folder, span)

    async def _load(self, runner: Runner, model: ModelInfo, folder: Path, span: LayerSpan) -> Loaded:
        from node.engine.span import Part

        wanted = Part.of_span(span.start, span.end, model.n_layers)
        # From here on what is in memory stays, though the last session on it should end while the rest is read.
        await self._on_thread(runner.want, model.id, wanted, False)
        holding = runner.models.get(model.id)
        known = self._known.get(model.id) if holding else None
        shard = holding.shard if holding else None
        missing = wanted.minus(holding.shard.part) if holding else wanted
        if missing:
            try:
                prepared = await self._prepare(folder, missing, model.dtype, model.quantize)
                if known is not None and prepared.mode != known.mode:
                    raise ConfigError(f"{model.id}: layers {span.start}-{span.end} need another mode than those held")
            except BaseException:
                await self._on_thread(runner.want, model.id, self._served(model), True)
                raise
            known, shard = _joined(known, prepared), prepared.shard
            self.hardware = prepared.hardware
        assert shard is not None
        assert known is not None
        self._narrow(model.id, span)
        self._folders[model.id], self._known[model.id] = folder, known
        await self._on_thread(runner.install, model.id, shard, known.mode, wanted)
        layers = tuple(known.layers[i] for i in range(span.start, span.end))
        self._loaded[model.id] = Loaded(span, known.mode, known.exact, layers, known.why)
        return self._loaded[model.id]

    def _served(self, model: ModelInfo) -> Part:
        from node.engine.span import Part

        loaded = self._loaded.get(model.id)
        return Part.of_span(loaded.span.start, loaded.span.end, model.n_layers) if loaded else Part(())

    def _narrow(self, model: ModelId, span: LayerSpan) -> None:
        """While the thread changes over, only what is held before and after may be opened."""
        before = self._loaded.pop(model, None)
        if before is None:
            return
        start, end = max(span.start, before.span.start), min(span.end, before.span.end)
        if start < end:
            skip = start - before.span.start
            kept = before.layers[skip : skip + end - start]
            self._loaded[model] = msgspec.structs.replace(before, span=LayerSpan(model, start, end), layers=kept)

    async def _prepare(self, folder: Path, part: Part, dtype: str, quantize: str) -> Prepared:
        from node.engine.loading import prepare

        how = (self.config.exact, self.config.threads, quantize, self.config.device)
        return await in_own_thread(prepare, folder, part, dtype, *how)

    async def unload(self, span: LayerSpan) -> None:
        """Serve nothing of ``span.model`` any more; its memory is free when the last session on it is closed."""
        async with self._loading:
            if self._loaded.pop(span.model, None) is not None:
                assert self._runner is not None
                await self._on_thread(self._runner.unload, span.model)

    async def _running(self) -> Runner:
        """The device thread, started at first use: torch takes seconds to import."""
        if self._runner is None:
            loop = asyncio.get_running_loop()
            self.failed = loop.create_future()
            self._runner = await asyncio.to_thread(
                _make_runner, self.config, self._deliverer(loop), self._mourner(loop)
            )
            self._runner.start()
        return self._runner

    def _deliverer(self, loop: asyncio.AbstractEventLoop) -> Callable[[list[Result]], None]:
        return lambda results: loop.call_soon_threadsafe(self._on_results, results)  # type: ignore[return-value]

    def _mourner(self, loop: asyncio.AbstractEventLoop) -> Callable[[BaseException], None]:
        return lambda error: loop.call_soon_threadsafe(self._on_death, error)  # type: ignore[return-value]

    async def _on_thread(self, call: Callable[..., None], *args: object) -> None:
        """Run ``call(*args, done)`` on the device thread and wait until it calls ``done``."""
        assert self._runner is not None
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        self._runner.post(call, *args, lambda: loop.call_soon_threadsafe(done.set))
        await done.wait()

    def _on_death(self, error: BaseException) -> None:
        if self.failed is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def stop(self) -> None:
        """End after the current step.  Sequences still open are forgotten."""
        if self._runner is not None:
            self._runner.stop()
            await asyncio.to_thread(self._runner.join)
        if self._masks is not None:
            self._masks.stop()

    # -- sequences -----------------------------------------------------------------------------------------------------

    def open(self, spec: SequenceSpec) -> int:
        """Reserve room for all of ``spec.max_positions``, so that the sequence is never stopped for memory; the bytes.

        Raises ``StalePlacement`` when the layers are not held here, ``CapacityError`` when there is no room; its
        ``base`` is closed in any case.
        """
        if self._open.pop(spec.base, None) is not None:
            self._budget.release(spec.base)
        try:
            return self._admit(spec)
        except MeshError:
            if spec.base and self._runner is not None:
                self._runner.post(self._runner.close, spec.base)
            raise

    def _admit(self, spec: SequenceSpec) -> int:
        loaded = self._loaded.get(spec.model)
        if loaded is None or not loaded.span.covers(spec.start, spec.end) or spec.start >= spec.end:
            raise StalePlacement(f"layers [{spec.start}, {spec.end}) of {spec.model} are not held here")
        assert self._runner is not None
        a, b = spec.start - loaded.span.start, spec.end - loaded.span.start
        room = self._budget.reserve(spec.key, spec.max_positions, loaded.layers[a:b])
        self._open[spec.key] = spec
        self._runner.post(self._runner.open, spec, self._guide(spec))
        return room

    def _guide(self, spec: SequenceSpec) -> Guide | None:
        if spec.sampling is None or not spec.sampling.grammar:
            return None
        if self._masks is None:
            from node.engine.masks import Masks

            self._masks = Masks(self._vocabularies)
        return self._masks.guide(self._folders[spec.model], spec.sampling.grammar)

    def submit(self, work: Work) -> None:
        """Queue ``work`` behind what is queued of its sequence.  A fault in it comes back as ``Result.error``."""
        assert work.key in self._open, f"{work.key} is not open"
        assert self._runner is not None
        self._runner.post(self._runner.submit, work)

    def truncate(self, key: str, length: int) -> None:
        """Positions from ``length`` on are void, computed or queued; results under way may still come."""
        assert self._runner is not None
        self._runner.post(self._runner.truncate, key, length)

    def close(self, key: str) -> None:
        """Free everything of ``key``, at once; closing twice does no harm."""
        if self._open.pop(key, None) is not None:
            assert self._runner is not None
            self._budget.release(key)
            self._runner.post(self._runner.close, key)

    # -- pages that sequences share ------------------------------------------------------------------------------------

    def page_bytes(self, key: str, size: int) -> int:
        """What a page of ``size`` positions of ``key`` takes at most; 0: its state cannot be cut into pages."""
        loaded = self._loaded.get(self._open[key].model)
        return size * self._budget.position_bytes(key) if loaded is not None and loaded.mode == "packed" else 0

    @property
    def excess(self) -> int:
        """Bytes of pages that must go, so that what was promised to sequences is there."""
        return self._budget.excess

    def keep_pages(self, key: str, size: int, pages: Sequence[tuple[int, int]]) -> None:
        """Copy positions of ``key`` that are computed: for each (first position, number), ``size`` of them."""
        assert self._runner is not None
        self._budget.keep(key, size, [number for _, number in pages])
        self._runner.post(self._runner.keep_pages, key, size, pages)

    def take_pages(self, key: str, size: int, pages: Sequence[int]) -> None:
        """``key``, which has computed nothing, goes on behind ``pages``; or answers ``Result.rewound``."""
        assert self._runner is not None
        self._runner.post(self._runner.take_pages, key, size, pages)

    def drop_pages(self, pages: Sequence[int]) -> None:
        """Give up what was kept under these numbers."""
        assert self._runner is not None
        self._budget.drop(pages)
        self._runner.post(self._runner.drop_pages, pages)

    # -- moving a sequence to another engine ---------------------------------------------------------------------------

    def read_pages(
        self, key: str, layers: tuple[int, int], start: int, end: int, answer: Callable[[int, bytes], None]
    ) -> None:
        """``answer(n, piece)`` on this loop: the first ``n`` of positions [start, end) of ``layers``, as many as make a
        piece (node/engine/shipping.py); 0 where they cannot be read."""
        if key in self._open:
            assert self._runner is not None
            loop = asyncio.get_running_loop()
            told = lambda n, piece: loop.call_soon_threadsafe(answer, n, piece)  # noqa: E731
            self._runner.post(self._runner.read_pages, key, layers, start, end, told)

    def write_pages(self, key: str, start: int, n: int, piece: memoryview, spoiled: Callable[[], None]) -> None:
        """Positions [start, start + n) of ``key`` are those of ``piece``; ``spoiled()`` on this loop: it is none."""
        if key in self._open:
            assert self._runner is not None
            loop = asyncio.get_running_loop()
            self._runner.post(
                self._runner.write_pages, key, start, n, piece, lambda: loop.call_soon_threadsafe(spoiled)
            )

    def _on_results(self, results: list[Result]) -> None:
        """Results of sequences that were closed meanwhile are of no use to anybody."""
        self.on_results([result for result in results if result.key in self._open])

    # -- figures -------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """How busy the engine is now."""
        runner = self._runner
        if runner is None:
            return EngineStats()
        spans = [loaded.layers for loaded in self._loaded.values()]
        widest = max(spans, key=lambda layers: sum(layer.bytes for layer in layers), default=())
        holdings = list(runner.models.values())
        return EngineStats(
            running=len(self._open),
            waiting=runner.waiting,
            free_tokens=self._budget.positions(widest),
            used_bytes=self._budget.used,
            shared_bytes=self._budget.shared,
            held_bytes=sum(holding.cache.bytes + holding.pages.bytes for holding in holdings),
            rows=runner.rows,
            weight_bytes=sum(holding.shard.weight_bytes for holding in holdings),
            step_ms=runner.pace.step_s * 1e3,
            tokens_per_s=runner.rate(time.perf_counter()),
        )

    def assert_idle(self) -> None:
        """With no sequence open, nothing is reserved or held but shared pages; anything else left is a leak."""
        assert not self._open, f"{len(self._open)} sequences are open"
        assert not self._budget.used, f"{self._budget.used} bytes of keys and values are still promised"
        if self._runner is not None:
            holdings = list(self._runner.models.values())
            held = sum(holding.cache.bytes for holding in holdings)
            assert not held, f"{held} bytes of keys and values are still held"
            pages = sum(len(holding.pages) for holding in holdings)
            assert pages == self._budget.pages, f"{pages} pages are held, {self._budget.pages} are known"


def _make_runner(
    config: EngineConfig, deliver: Callable[[list[Result]], None], died: Callable[[BaseException], None]
) -> Runner:
    from node.engine.runner import Runner

    return Runner(config.threads, config.step_rows, deliver, died, config.kv_bytes)
