"""A bug of ours stops the node, and the mesh carries on without it; one of a library costs what it happened in."""

from __future__ import annotations

import asyncio
from typing import Any

OURS = ("mesh", "gossip", "node")


async def watch_loop(log: Any) -> None:
    """Until cancelled, or a bug in a callback of the loop, which would only be logged otherwise: raises it.

    aiohttp asserts that its writers are told to go on only when they were told to wait, and asyncio's TLS does not
    always keep to that: nobody waits then, and nothing is lost.
    """
    bug: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        log.error("a callback failed", what=context.get("message"), exc_info=error)
        if isinstance(error, AssertionError) and is_ours(error) and not bug.done():
            bug.set_exception(error)

    asyncio.get_running_loop().set_exception_handler(on_error)
    await bug


def is_ours(error: BaseException) -> bool:
    """Whether it was raised by a line of this project."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is None or at.tb_frame.f_globals.get("__name__", "").partition(".")[0] in OURS
