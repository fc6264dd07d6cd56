"""Brings this node to what the placement says.  The next act follows from wish and state: a restart needs no memory.

Weights come first (from disk or from peers), then the engine loads them; a span that is no longer wanted stays until
others can serve it and its sessions have ended or were moved to them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from mesh.capacity import span_bytes
from mesh.errors import ConfigError, MeshError
from mesh.types import LayerSpan, ModelId
from mesh.view import MeshView
from node.telemetry import get_logger
from node.weights.keeper import Weights
from node.weights.store import WeightsError

RETRY_S = 2.0
LOOK_S = 0.25


class Loader:
    """Which spans are loaded, loading or refused.  ``room``: bytes that weights may take; ``vacate`` asks for sessions
    to be moved away from a span; ``changed`` is called whenever anything of it is another now."""

    def __init__(
        self,
        engine: Any,
        weights: Weights,
        *,
        room: int,
        view: Callable[[], MeshView],
        in_use: Callable[[LayerSpan], bool],
        vacate: Callable[[LayerSpan], None],
        changed: Callable[[], None],
    ) -> None:
        self._engine, self._weights, self._room = engine, weights, room
        self._view, self._in_use, self._vacate, self._changed = view, in_use, vacate, changed
        self._log = get_logger("loader")
        self._wake = asyncio.Event()
        self._retry_at: dict[LayerSpan, float] = {}
        self._manifests: dict[ModelId, str] = {}
        """Which weights are loaded: a name may come to stand for others."""
        self.loaded: dict[ModelId, LayerSpan] = {}
        self.loading: LayerSpan | None = None
        self.fetched = 0
        """Per cent of the span being loaded, in steps of five: each is news to all members."""
        self.refused: dict[LayerSpan, str] = {}

    @property
    def spans(self) -> tuple[LayerSpan, ...]:
        """What may be opened here."""
        return tuple(self.loaded.values())

    def wake(self) -> None:
        """The placement or the sessions changed."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wake.clear()
            await self._step()
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _step(self) -> None:
        """One act: drop weights that a name no longer stands for, load what is missing, give up what is spare."""
        view, now = self._view(), asyncio.get_running_loop().time()
        wanted = {span.model: span for span in view.placement.spans_of(view.me)}
        self.refused = {span: why for span, why in self.refused.items() if span in wanted.values()}
        self._retry_at = {span: at for span, at in self._retry_at.items() if at > now}
        for model, held in self.loaded.items():
            entry = view.placement.of(model)
            if entry is not None and entry.model.manifest != self._manifests[model]:
                return await self._drop(held)
        for model, span in wanted.items():
            held = self.loaded.get(model)
            lacks = held is None or not held.covers(span.start, span.end)
            # Not loaded but in use: sessions still run over weights that were dropped.
            if lacks and span not in self._retry_at and not (held is None and self._in_use(span)):
                grown = self._way_to(span, held, view)
                if grown is None:
                    self._refuse(span, WeightsError("no memory for both: waits until others hold what it gives up"))
                    continue
                return await self._load(span, grown, view)
        for model, held in self.loaded.items():
            wish = wanted.get(model)
            spare = _spare(held, wish)
            # A model that was removed needs no other holder.
            free = view.placement.of(model) is None or all(map(view.may_drop, spare))
            if spare and free and wish not in self._retry_at and not self._held_up(spare):
                return await (self._load(wish, wish, view) if wish is not None else self._drop(held))

    def _way_to(self, wish: LayerSpan, held: LayerSpan | None, view: MeshView) -> LayerSpan | None:
        """What to load: with what is held, so that nothing is missing meanwhile; where memory lacks for both, the wish
        alone once others hold the rest and no session runs over it.  ``None``: not yet."""
        grown = _grown(held, wish)
        if grown == wish or self._bytes(grown, view) <= self._room:
            return grown
        spare = _spare(held, wish) if held else []
        return wish if all(map(view.may_drop, spare)) and not self._held_up(spare) else None

    def _held_up(self, spare: list[LayerSpan]) -> bool:
        """Sessions still run over what others can serve: have them moved there."""
        used = [span for span in spare if self._in_use(span)]
        for span in used:
            self._vacate(span)
        return bool(used)

    def _bytes(self, grown: LayerSpan, view: MeshView) -> int:
        """Of all weights here, were ``grown`` what is held of its model."""
        spans = [grown, *(span for model, span in self.loaded.items() if model != grown.model)]
        known = [(view.model(span.model), span) for span in spans]
        return sum(span_bytes(model, span.start, span.end) for model, span in known if model)

    async def _load(self, wish: LayerSpan, span: LayerSpan, view: MeshView) -> None:
        """Fetch and load ``span``, for the sake of ``wish``; the engine keeps the layers that it has already."""
        model = view.model(span.model)
        assert model is not None, span
        self.loading, self.fetched = span, 0
        self._changed()
        try:
            folder = await self._weights.bring(model, span, view.sources(model.manifest), self._on_progress)
            await self._engine.load(model, folder, span)
        except (MeshError, OSError) as error:
            self._refuse(wish, error)
        else:
            self.loaded[span.model], self._manifests[span.model] = span, model.manifest
            self.refused.pop(wish, None)
            self._log.info("loaded", model=span.model, layers=f"{span.start}-{span.end}")
        finally:
            self.loading = None
            self._changed()

    async def _drop(self, held: LayerSpan) -> None:
        """Open nothing on it any more; the engine frees the layers when the last session on them has ended."""
        await self._engine.unload(held)
        del self.loaded[held.model]
        self._log.info("dropped", model=held.model, layers=f"{held.start}-{held.end}")
        self._changed()

    def _on_progress(self, done: int, total: int) -> None:
        percent = 5 * (20 * done // total) if total else 100
        if percent != self.fetched:
            self.fetched = percent
            self._log.debug("fetching", percent=percent, mib=total >> 20)
            self._changed()

    def _refuse(self, span: LayerSpan, error: Exception) -> None:
        """A model that cannot be served here for good is said so; anything else is tried again."""
        self.refused[span] = str(error)
        wait = 60.0 if isinstance(error, ConfigError) else RETRY_S
        self._retry_at[span] = asyncio.get_running_loop().time() + wait
        self._log.warning("not loaded", model=span.model, layers=f"{span.start}-{span.end}", why=str(error))


def _grown(held: LayerSpan | None, wish: LayerSpan) -> LayerSpan:
    """What to load: with what is held, while the two touch, so that nothing is missing in between."""
    if held is None or held.end < wish.start or wish.end < held.start:
        return wish
    return LayerSpan(wish.model, min(held.start, wish.start), max(held.end, wish.end))


def _spare(held: LayerSpan, wish: LayerSpan | None) -> list[LayerSpan]:
    """The parts of ``held`` that are not wanted."""
    if wish is None:
        return [held]
    pieces = ((held.start, min(held.end, wish.start)), (max(held.start, wish.end), held.end))
    return [LayerSpan(held.model, start, end) for start, end in pieces if start < end]
