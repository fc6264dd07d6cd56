"""Engines in a row, as a mesh would chain them, without a mesh: what one passes on is submitted to the next."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from mesh.types import LayerSpan, ModelId, ModelInfo, SamplingParams
from node.engine.engine import Engine, EngineConfig
from node.engine.sequence import Result, SequenceSpec, Work

MODEL = ModelId("tiny")
PATIENCE_S = 300.0
"""A chain that stands still does so for good; one on a busy machine was seen to take more than a minute."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


def info(n_layers: int = 4, dtype: str = "float32", quantize: str = "") -> ModelInfo:
    """As placement would know the model; the engine reads layers, name, dtype and quantize of it."""
    sizes = {"layer_bytes": 1, "embed_bytes": 1, "head_bytes": 1, "hidden_size": 64, "kv_bytes": 1, "vocab_size": 256}
    return ModelInfo(id=MODEL, manifest="", n_layers=n_layers, max_context=512, dtype=dtype, quantize=quantize, **sizes)


class Chain:
    """Engine i serves layers [cuts[i], cuts[i + 1])."""

    def __init__(self, cuts: Sequence[int], engines: Sequence[Engine] | None = None, **config: object) -> None:
        self.spans = list(itertools.pairwise(cuts))
        self.engines = list(engines or [Engine(EngineConfig(**config)) for _ in self.spans])  # type: ignore[arg-type]
        self.drawn: dict[str, list[int]] = {}
        self.results: dict[str, list[Result]] = {}
        self.passed: dict[str, list[bytes]] = {}
        """What went over the first boundary, position by position of arrival."""
        self._left: dict[str, int] = {}
        self._idle = asyncio.Event()
        for i, engine in enumerate(self.engines):
            engine.on_results = self._taker(i)

    async def load(self, folder: Path, n_layers: int = 4, dtype: str = "float32", quantize: str = "") -> None:
        for engine, (a, b) in zip(self.engines, self.spans, strict=True):
            await engine.load(info(n_layers, dtype, quantize), folder, LayerSpan(MODEL, a, b))

    def open(self, key: str, prompt: Sequence[int], sampling: SamplingParams, tokens: int, **spec: object) -> None:
        self.drawn[key], self.results[key], self.passed[key] = [], [], []
        self._left[key] = tokens
        self._idle.clear()
        for i, (engine, (a, b)) in enumerate(zip(self.engines, self.spans, strict=True)):
            last = i == len(self.spans) - 1
            extra = {"sampling": sampling, "tokens": tuple(prompt)} if last else {}
            room = len(prompt) + max(tokens, sampling.max_tokens)
            engine.open(SequenceSpec(key, MODEL, a, b, room, hops=len(self.spans), **extra, **spec))

    def feed(self, key: str, start: int, tokens: Sequence[int], sample: bool = True, scored: bool = False) -> None:
        whole = len(self.spans) == 1
        work = Work(
            key, 0, start, len(tokens), tuple(tokens), sample=sample and whole, prompt_logprobs=scored and whole
        )
        self._frontier = {**getattr(self, "_frontier", {}), key: (start + len(tokens), sample, scored)}
        self.engines[0].submit(work)

    def _taker(self, i: int) -> Callable[[list[Result]], None]:
        def take(results: list[Result]) -> None:
            for result in results:
                assert not result.error, result.error
                self._take(i, result)

        return take

    def _take(self, i: int, result: Result) -> None:
        if i < len(self.spans) - 1:
            assert result.hidden is not None
            end, sample, scored = self._frontier[result.key]
            body = bytes(result.hidden)
            if i == 0:
                self.passed[result.key].append(body)
            last = i + 1 == len(self.spans) - 1
            draws = last and sample and result.start + result.n == end
            work = Work(result.key, 0, result.start, result.n, (), body, draws, scored and last)
            self.engines[i + 1].submit(work)
            return
        self.results[result.key].append(result)
        if result.sampled is not None:
            self._on_token(result.key, result.sampled.position, result.sampled.token)
        elif result.start + result.n == self._frontier[result.key][0]:
            self._finish(result.key)

    def _on_token(self, key: str, position: int, token: int) -> None:
        self.drawn[key].append(token)
        self._left[key] -= 1
        if self._left[key] > 0:
            self.feed(key, position, [token])
        else:
            self._finish(key)

    def _finish(self, key: str) -> None:
        self._left.pop(key, None)
        if not self._left:
            self._idle.set()

    async def finished(self) -> None:
        """Every sequence opened has drawn its tokens."""
        dead = [asyncio.ensure_future(asyncio.shield(e.failed)) for e in self.engines if e.failed is not None]
        idle = asyncio.ensure_future(self._idle.wait())
        done, rest = await asyncio.wait([idle, *dead], return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
        for task in rest:
            task.cancel()
        assert done, "the chain stands still"
        for task in done:
            task.result()

    def close(self, *keys: str) -> None:
        for engine in self.engines:
            for key in keys or tuple(self.drawn):
                engine.close(key)

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int = 12,
        sampling: SamplingParams = GREEDY,
        scored: bool = False,
    ) -> list[list[int]]:
        """All prompts at once; their drawn tokens.  ``scored``: the prompts' tokens get log-probabilities, too."""
        keys = [f"s{i}" for i in range(len(prompts))]
        for key, prompt in zip(keys, prompts, strict=True):
            self.open(key, prompt, sampling, tokens)
        for key, prompt in zip(keys, prompts, strict=True):
            self.feed(key, 0, prompt, scored=scored)
        await self.finished()
        self.close(*keys)
        return [self.drawn[key] for key in keys]

    async def stop(self) -> None:
        for engine in self.engines:
            await engine.stop()
