"""From an admitted request to a running generation: what the mesh cannot take in yet is asked again for a while.

Nodes that come and go leave layers without a live holder for moments, and other entries take room that this one counted
on.  Neither is worth a refusal at once: a request waits ``patience_s`` for it, and class ``batch`` as long as it may
take at all.  It holds no place meanwhile, and the gate lets fewer in (``AdmissionGate.no_room``).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mesh.errors import CapacityError, NoRoute
from node.api.context import Api
from node.api.service import Generation, GenerationRequest

AGAIN_S, AGAIN_MOST_S = 0.1, 2.0


@asynccontextmanager
async def let_in(api: Api, request: GenerationRequest, *, sibling: bool) -> AsyncIterator[Generation]:
    """Hold a slot and the generation that ``request`` opened.  CapacityError, NoRoute: patience is at its end."""
    loop = asyncio.get_running_loop()
    until = None if request.priority == "batch" else loop.time() + api.settings.patience_s
    wait_s = AGAIN_S
    while True:
        async with api.gate.slot(request.priority, sibling=sibling) as slot:
            refusal = None
            try:
                generation = await api.service.open(request)
            except (CapacityError, NoRoute) as error:
                if until is not None and loop.time() >= until:
                    raise
                refusal = error
                slot.in_vain = True
                if isinstance(error, CapacityError):
                    api.gate.no_room(request.priority)
            else:
                yield generation
        if refusal is None:
            return
        wait_s = min(AGAIN_MOST_S, 2 * max(wait_s, (refusal.retry_after_s or 0.0) / 4))
        pause = wait_s * random.uniform(0.5, 1.0)
        await asyncio.sleep(pause if until is None else max(0.0, min(pause, until - loop.time())))
