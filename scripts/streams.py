"""Streams of greedy tokens out of one engine in this process: for benchmarks."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 250


def prompt(length: int, number: int = 0) -> tuple[int, ...]:
    """Token ids that differ from stream to stream."""
    return tuple(3 + (7 * i + 31 * number) % VOCABULARY for i in range(length))


class Streams:
    """Whole-model sequences on one engine, all with the same number of tokens to draw; EOS is not looked at."""

    def __init__(self, engine: Any, info: Any) -> None:
        self.engine, self.info = engine, info
        self.arrived: dict[str, list[float]] = {}
        """When each token of a stream came."""
        self.held: dict[str, Any] = {}
        """Last tokens of prompts that are to be computed together."""
        self._reached: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._news = asyncio.Event()
        engine.on_results = self._take

    @classmethod
    async def load(cls, folder: Path, dtype: str, quantize: str = "", **config: Any) -> Streams:
        from mesh.types import LayerSpan
        from node.engine.engine import Engine, EngineConfig
        from node.weights.offer import offer

        with tempfile.TemporaryDirectory() as hashes:
            info = (await offer(folder, "bench", dtype, Path(hashes), quantize)).info
        engine = Engine(EngineConfig(**{"kv_bytes": 4 << 30, **config}))
        await engine.load(info, folder, LayerSpan(info.id, 0, info.n_layers))
        return cls(engine, info)

    def start(
        self, key: str, tokens: tuple[int, ...], draws: int, pages: tuple[int, ...] = (), held: bool = False
    ) -> None:
        """``pages``: numbers of kept ones that the prompt begins with; ``held``: its last token is not computed yet."""
        from mesh.pipeline.prefix import PAGE
        from mesh.types import SamplingParams
        from node.engine.sequence import SequenceSpec, Work

        self.arrived[key], self._left[key] = [], draws
        room = len(tokens) + draws
        sampling = SamplingParams(max_tokens=draws, temperature=0.0)
        spec = SequenceSpec(
            key=key,
            model=self.info.id,
            start=0,
            end=self.info.n_layers,
            tokens=tokens,
            sampling=sampling,
            max_positions=room,
        )
        self.engine.open(spec)
        if pages:
            self.engine.take_pages(key, PAGE, pages)
        first = PAGE * len(pages)
        rest = tokens[first:]
        now = rest[:-1] if held else rest
        if held:
            self.held[key] = Work(key=key, tag=0, start=len(tokens) - 1, n=1, tokens=rest[-1:], sample=True)
        self.engine.submit(Work(key=key, tag=0, start=first, n=len(now), tokens=now, sample=not held))

    def _take(self, results: list[Any]) -> None:
        from node.engine.sequence import Work

        now = time.perf_counter()
        for result in results:
            assert not result.error, result.error
            if result.sampled is None and result.key in self.held:
                self._reached[result.key] = result.start + result.n
            if result.sampled is None or result.key not in self._left:
                continue
            key, drawn = result.key, result.sampled
            self.arrived[key].append(now)
            self._left[key] -= 1
            if self._left[key]:
                self.engine.submit(Work(key=key, tag=0, start=drawn.position, n=1, tokens=(drawn.token,), sample=True))
            else:
                del self._left[key]
                self.engine.close(key)
        self._news.set()

    def stop(self, *keys: str) -> None:
        """Before their end, if they have not come to it."""
        for key in keys:
            self._left.pop(key, None)
            self.engine.close(key)

    async def wait(self, *keys: str) -> None:
        """Until the streams named have drawn all their tokens; without names, all."""
        await self.until(lambda: not any(key in self._left for key in keys or tuple(self._left)))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Asked again whenever tokens arrive."""
        while not holds():
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), 3600)

    async def seconds(self, streams: int, length: int, draws: int) -> float:
        """For ``draws`` tokens of each of ``streams`` prompts of ``length``."""
        began = time.perf_counter()
        for number in range(streams):
            self.start(f"s{number}", prompt(length, number), draws)
        await self.wait()
        return time.perf_counter() - began

    async def decode_seconds(self, streams: int, length: int, draws: int) -> float:
        """From the first to the last of ``draws`` tokens of ``streams`` prompts, all of which are computed before."""
        keys = [f"s{number}" for number in range(streams)]
        for number, key in enumerate(keys):
            self.start(key, prompt(length, number), draws, held=True)
        await self.until(lambda: all(self._reached.get(key) == length - 1 for key in keys))
        self._reached.clear()
        for key in keys:
            self.engine.submit(self.held.pop(key))
        await self.wait()
        return max(self.arrived[key][-1] for key in keys) - min(self.arrived[key][0] for key in keys)
