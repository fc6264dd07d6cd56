"""Served APIs over fake nodes for the SDK to talk to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import structlog.testing

from node.api.app import ApiServer
from node.api.context import ApiSettings
from node.telemetry import Telemetry
from tests.fakes import FakeService


class Served:
    """One node's API; ``kill`` drops its connections as a SIGKILL would."""

    def __init__(self, name: str, reply: str = "Hello there, how are you?", **settings: Any) -> None:
        self.service = FakeService(reply=reply)
        self.service.name = name
        self.server = ApiServer(self.service, ApiSettings(**{"patience_s": 0.0, **settings}), Telemetry())

    async def start(self) -> Served:
        await self.server.start()
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def kill(self) -> None:
        runner = self.server._runner
        for site in list(runner.sites):
            site._server.close()  # type: ignore[attr-defined]
        assert runner.server is not None
        for connection in runner.server.connections:
            assert connection.transport is not None
            connection.transport.abort()

    async def stop(self) -> None:
        self.service.gate.set()
        await self.server.stop()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The nodes' log lines do not mix with what the terminal client prints."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def two() -> AsyncIterator[tuple[Served, Served]]:
    """Two nodes that know of each other."""
    ann, bob = await Served("ann").start(), await Served("bob").start()
    members = [{"name": each.service.name, "state": "alive", "api": each.url} for each in (ann, bob)]
    ann.service.members = bob.service.members = members
    yield ann, bob
    await ann.stop()
    await bob.stop()


@pytest.fixture
def threaded() -> Iterator[Served]:
    """A node on a loop of its own thread, for code that blocks."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def make() -> Served:
        return await Served("ann").start()

    served = asyncio.run_coroutine_threadsafe(make(), loop).result()
    yield served
    asyncio.run_coroutine_threadsafe(served.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
