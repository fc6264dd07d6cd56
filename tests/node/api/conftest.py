"""A served API over a fake node, and small helpers to talk to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest

from node.api.app import ApiServer
from node.api.context import ApiSettings
from node.telemetry import Telemetry
from tests.fakes import FakeService


class Http:
    """An API under test: its node, its server, and an HTTP client."""

    def __init__(self, service: FakeService, server: ApiServer, session: aiohttp.ClientSession) -> None:
        self.service, self.server, self.session = service, server, session

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, aiohttp.ClientResponse]:
        async with self.session.post(path, json=body, headers=headers) as answer:
            return answer.status, await answer.json(), answer

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        async with self.session.get(path, headers=headers) as answer:
            return answer.status, await answer.json()

    async def chat(self, **extra: Any) -> tuple[int, Any]:
        status, body, _ = await self.post("/v1/chat/completions", chat_body(**extra))
        return status, body

    async def complete(self, **extra: Any) -> tuple[int, Any]:
        status, body, _ = await self.post("/v1/completions", {"model": "demo", "prompt": "Once", **extra})
        return status, body

    async def stream(self, path: str, body: Any) -> list[tuple[str, Any]]:
        """(SSE id, data) of every event; comments as ``("", None)``."""
        async with self.session.post(path, json={**body, "stream": True}) as answer:
            assert answer.status == 200, await answer.text()
            return parse_sse(await answer.text())


def chat_body(**extra: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], **extra}


def parse_sse(text: str) -> list[tuple[str, Any]]:
    events = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and line[0] != ":")
        data = fields.get("data")
        events.append((fields.get("id", ""), data if data in (None, "[DONE]") else msgspec.json.decode(data)))
    return events


async def serve(service: FakeService, **settings: Any) -> AsyncIterator[Http]:
    server = ApiServer(service, ApiSettings(**{"host": "127.0.0.1", "patience_s": 0.0, **settings}), Telemetry())
    await server.start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        yield Http(service, server, session)
    service.gate.set()
    await server.stop()
    assert not service.live, "every generation is released"


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def http(service: FakeService) -> AsyncIterator[Http]:
    async for each in serve(service):
        yield each
