"""Which failures of callbacks end a node."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp.base_protocol import BaseProtocol

from node import bugs
from node.bugs import is_ours, watch_loop


class Log:
    def __init__(self) -> None:
        self.told: list[BaseException] = []

    def error(self, text: str, *, what: str, exc_info: BaseException) -> None:
        self.told.append(exc_info)


def _librarys() -> AssertionError:
    """What aiohttp asserts of its callers, as asyncio's TLS has been seen to break it."""
    try:
        BaseProtocol(asyncio.get_running_loop()).resume_writing()
    except AssertionError as error:
        return error
    raise RuntimeError("aiohttp asserts it no more")


def _ours(error: type[Exception]) -> Exception:
    try:
        raise error("of ours")
    except Exception as found:
        return found


async def _watched(*errors: Any) -> Log:
    log, loop = Log(), asyncio.get_running_loop()
    watching = asyncio.create_task(watch_loop(log))
    await asyncio.sleep(0)
    try:
        for error in errors:
            loop.call_exception_handler({"message": "a callback", "exception": error})
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if watching.done():
            watching.result()
    finally:
        watching.cancel()
        loop.set_exception_handler(None)
    return log


async def test_a_librarys_assertion_is_told_and_ends_nothing() -> None:
    error = _librarys()
    assert not is_ours(error)
    assert (await _watched(error)).told == [error]


async def test_our_own_assertion_ends_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bugs, "OURS", ("tests",))
    error = _ours(AssertionError)
    assert is_ours(error)
    with pytest.raises(AssertionError, match="of ours"):
        await _watched(error)


async def test_our_other_errors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bugs, "OURS", ("tests",))
    error = _ours(OSError)
    assert (await _watched(error)).told == [error]
