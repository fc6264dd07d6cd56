"""Real layers, stages and files with next to no memory for checkpoints: a lost stage is rebuilt from the disk, and only
it computes anything again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesh.core import Effect, Send
from mesh.pipeline import events as e
from mesh.pipeline import messages as m
from mesh.pipeline.session import Session
from mesh.pipeline.stage import StageConfig
from mesh.types import Hop, LayerSpan, Route, SamplingParams
from node.engine.engine import Engine, EngineConfig
from node.spill import SpillFiles
from node.stage import StageService
from tests.node.engine.chain import MODEL, info

OWNER, FIRST, LOST, SPARE = "owner", "first", "lost", "spare"
SPANS = {FIRST: (0, 2), LOST: (2, 4), SPARE: (2, 4)}
ROW = 64 * 4
PROMPT = tuple((7 * i) % 253 + 3 for i in range(60))
TOKENS, STRIKE_AT = 120, 70


class Mesh:
    """Stages in one process, the owner of one session beside them; what is said to or by the dead is lost."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.engines = {name: Engine(EngineConfig(kv_bytes=64 << 20, threads=1)) for name in SPANS}
        self.disks: dict[str, SpillFiles] = {}
        self.stages: dict[str, StageService] = {}
        self.dead: set[str] = set()

    async def start(self, model: Path) -> None:
        for name, span in SPANS.items():
            (self.root / name).mkdir()
            self.disks[name] = SpillFiles(self.root / name)
            self.stages[name] = StageService(
                name,
                self.engines[name],
                lambda send, name=name: self._post(name, send),
                lambda event: pytest.fail(f"{event}"),
                StageConfig(checkpoint_bytes=16 * ROW, checkpoint_disk=1 << 20),
                disk=self.disks[name],
            )
            await self.engines[name].load(info(), model, LayerSpan(MODEL, *span))
            self.stages[name].set_spans([LayerSpan(MODEL, *span)])

    async def stop(self) -> None:
        for name, stage in self.stages.items():
            stage.stop()
            await self.engines[name].stop()
            self.disks[name].close()

    def files(self, name: str) -> list[Path]:
        return list((self.root / name).iterdir())

    async def run(self, sampling: SamplingParams, strike: bool) -> Session:
        """One session, to its end."""
        self.over = asyncio.Event()
        self.tokens: list[int] = []
        self.strike = strike
        request = m.SessionRequest(model=MODEL, prompt=PROMPT, sampling=sampling)
        self.session = Session(f"s-{strike}", OWNER, request, random.Random(0), time.monotonic())
        self._owned(self.session.start(time.monotonic()))
        async with asyncio.timeout(120):
            while not self.over.is_set():
                await asyncio.sleep(0.02)
                self._owned(self.session.tick(time.monotonic()))
        return self.session

    def _post(self, source: str, send: Send) -> None:
        asyncio.get_running_loop().call_soon(self._deliver, source, send.to, send.message)

    def _deliver(self, source: str, to: str, message: Any) -> None:
        if source in self.dead or to in self.dead:
            return
        if to == OWNER:
            self._owned(self.session.receive(message, source, time.monotonic()))
        else:
            self.stages[to].receive(message, source)

    def _owned(self, effects: list[Effect]) -> None:
        now = time.monotonic()
        for effect in effects:
            if isinstance(effect, Send):
                self._post(OWNER, effect)
            elif isinstance(effect.event, e.NeedRoute):  # type: ignore[union-attr]
                second = SPARE if LOST in self.dead else LOST
                hops = tuple(Hop(name, *SPANS[name]) for name in (FIRST, second))
                self._owned(self.session.follow(Route(MODEL, hops), (0, 0), now))
            elif isinstance(effect.event, e.Accepted):  # type: ignore[union-attr]
                self.tokens.append(effect.event.token)  # type: ignore[union-attr]
                self._owned(self.session.acknowledge(effect.event.position + 1, now))  # type: ignore[union-attr]
                if self.strike and len(self.tokens) == STRIKE_AT:
                    self._lose()
            elif isinstance(effect.event, e.Ended):  # type: ignore[union-attr]
                self.over.set()

    def _lose(self) -> None:
        kept = self.stages[FIRST].kept()
        assert kept["disk_bytes"] >= (len(PROMPT) + STRIKE_AT - 32) * ROW
        assert kept["memory_bytes"] - self.stages[FIRST].core.keeper.writing <= 16 * ROW
        self.dead.add(LOST)
        self._owned(self.session.lost(LOST, "reset", time.monotonic()))


@pytest.mark.parametrize("seeded", [False, True], ids=["greedy", "seeded"])
async def test_a_lost_stage_is_rebuilt_from_the_disk_bit_by_bit(
    tiny: Callable[..., Path], tmp_path: Path, seeded: bool
) -> None:
    chance = {"temperature": 1.0, "top_p": 0.95, "seed": 11} if seeded else {"temperature": 0.0}
    sampling = SamplingParams(max_tokens=TOKENS, **chance)  # type: ignore[arg-type]
    mesh = Mesh(tmp_path)
    await mesh.start(tiny("llama"))
    try:
        await mesh.run(sampling, strike=False)
        quiet, before = mesh.tokens, mesh.engines[FIRST].stats().rows
        session = await mesh.run(sampling, strike=True)
        assert mesh.tokens == quiet
        (told,) = session.recoveries
        positions = len(PROMPT) + STRIKE_AT
        assert (told.exact, told.hop) == ("bitwise", 1)
        assert positions - 1 <= told.positions_replayed <= positions + m.RUN_AHEAD, "of the lost span alone"
        # The survivor computes each position once, save for what was under way.
        assert mesh.engines[FIRST].stats().rows - before <= len(PROMPT) + TOKENS + 2
        async with asyncio.timeout(30):
            while mesh.files(FIRST):  # noqa: ASYNC110  a thread removes them
                await asyncio.sleep(0.01)
        assert mesh.stages[FIRST].kept()["dropped_bytes"] == 0
    finally:
        await mesh.stop()
