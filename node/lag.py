"""How late this process's event loop runs: what probes and peers would blame on the node."""

from __future__ import annotations

import asyncio
import time
from collections import deque

EVERY_S = 0.02
KEPT = 250
"""Five seconds of samples."""


class LagMeter:
    """Samples of how much later than asked a sleep ends."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=KEPT)
        self._worst = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            asked = time.monotonic()
            await asyncio.sleep(EVERY_S)
            late = time.monotonic() - asked - EVERY_S
            self._samples.append(late)
            self._worst = max(self._worst, late)

    @property
    def p99_ms(self) -> float:
        """Of the last seconds, in milliseconds."""
        ordered = sorted(self._samples)
        return ordered[int(len(ordered) * 0.99)] * 1e3 if ordered else 0.0

    def worst_s(self) -> float:
        """The latest since this was asked last, in seconds."""
        worst, self._worst = self._worst, 0.0
        return worst
