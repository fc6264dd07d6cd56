"""Calls that compute with torch, each in a thread that ends with it.

Every thread that ran a parallel kernel keeps a pool of OpenMP workers until it ends.  With more of them than processors
libgomp no longer lets idle workers spin, in the whole process: each kernel of the engine then waits for the system to
wake them, and a decoding step took a third longer (docs/decisions/0101).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def in_own_thread(call: Callable[..., T], *args: object) -> T:
    """As ``asyncio.to_thread``, whose threads stay."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="torch")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, call, *args)
    finally:
        pool.shutdown(wait=False)
