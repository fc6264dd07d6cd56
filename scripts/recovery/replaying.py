"""F6, and what F1's longest pause is measured against: rebuilding keys and values in one engine, in this process."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

from scripts.streams import prompt


class Rebuild:
    """Engines that hold all layers, the first quarter and the second, of one thread each."""

    def __init__(self, engines: dict[str, Any], info: Any) -> None:
        self.engines, self.info = engines, info
        self.quarter = info.n_layers // 4

    @classmethod
    async def load(cls, folder: Path, dtype: str) -> Rebuild:
        from mesh.types import LayerSpan
        from node.engine.engine import Engine, EngineConfig
        from node.weights.offer import offer

        info = (await offer(folder, "bench", dtype, folder.parent / "offered")).info
        quarter, engines = info.n_layers // 4, {}
        for name, start, end in (("all", 0, info.n_layers), ("first", 0, quarter), ("second", quarter, 2 * quarter)):
            engines[name] = Engine(EngineConfig(kv_bytes=2 << 30, threads=1))
            await engines[name].load(info, folder, LayerSpan(info.id, start, end))
        return cls(engines, info)

    async def stop(self) -> None:
        for engine in self.engines.values():
            await engine.stop()

    async def measure(self, sequences: int, positions: int, rounds: int) -> tuple[float, float]:
        """Median seconds to compute ``positions`` of each of ``sequences``: from what was kept before it through the
        second quarter of the layers; from the tokens through all of them."""
        tokens = [prompt(positions, number) for number in range(sequences)]
        kept = await self._run("first", 0, self.quarter, positions, [(ids, None) for ids in tokens])
        replayed, recomputed = [], []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            await self._run("second", self.quarter, 2 * self.quarter, positions, [((), rows) for rows in kept])
            replayed.append(time.perf_counter() - began)
            began = time.perf_counter()
            await self._run("all", 0, self.info.n_layers, positions, [(ids, None) for ids in tokens])
            recomputed.append(time.perf_counter() - began)
        return statistics.median(replayed[1:]), statistics.median(recomputed[1:])  # the first round warms up

    async def _run(
        self, name: str, start: int, end: int, n: int, inputs: list[tuple[tuple[int, ...], Any]]
    ) -> list[bytes]:
        """Compute n positions of all ``inputs``, (tokens, hidden states) each, in one batch; what came out of each."""
        from mesh.types import SamplingParams
        from node.engine.sequence import SequenceSpec, Work

        engine, out = self.engines[name], [bytearray() for _ in inputs]
        left, done = n * len(inputs), asyncio.Event()

        def take(results: list[Any]) -> None:
            nonlocal left
            for result in results:
                assert not result.error, result.error
                if result.hidden is not None:
                    out[int(result.key)] += bytes(result.hidden)
                left -= result.n
            if left <= 0:
                done.set()

        engine.on_results = take
        last = end == self.info.n_layers
        for number, (tokens, hidden) in enumerate(inputs):
            spec = SequenceSpec(
                key=str(number),
                model=self.info.id,
                start=start,
                end=end,
                max_positions=n + 8,
                tokens=tokens,
                sampling=SamplingParams(max_tokens=8, temperature=0.0) if last else None,
            )
            engine.open(spec)
            engine.submit(Work(key=str(number), tag=0, start=0, n=n, tokens=tokens, hidden=hidden, sample=last))
        await asyncio.wait_for(done.wait(), 3600)
        for number in range(len(inputs)):
            engine.close(str(number))
        return [bytes(rows) for rows in out]
