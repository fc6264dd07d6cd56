"""What a node writes down of the others, on a disk that may refuse."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from node import presence


async def test_a_disk_that_refuses_the_others_addresses_costs_no_life(monkeypatch: pytest.MonkeyPatch) -> None:
    written, full = asyncio.Event(), [OSError(28, "No space left on device")]

    def remember(folder: Any, peers: Any) -> None:
        if full:
            raise full.pop()
        assert peers == (("a", "h:1"),)
        loop.call_soon_threadsafe(written.set)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(presence, "REMEMBER_S", 1e9)  # the first are written at once
    monkeypatch.setattr(presence, "PUBLISH_S", 0.0)
    monkeypatch.setattr(presence, "remember_peers", remember)
    other = SimpleNamespace(node="a", address="h:1", state="alive")
    node: Any = SimpleNamespace(
        me="me",
        folder=SimpleNamespace(membership=lambda: None),
        peers=SimpleNamespace(swim=SimpleNamespace(members=lambda: [other])),
    )
    remembering = asyncio.create_task(presence.Presence(node).remember())
    async with asyncio.timeout(30.0):
        await written.wait()
    assert not remembering.done()
    remembering.cancel()


async def test_a_machine_is_measured_again_when_it_serves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "APART_S", (0.0, 0.0))
    monkeypatch.setattr(presence, "PUBLISH_S", 0.0)
    busy, measured = [3, 2, 1], []

    async def measure_again(config: Any) -> None:
        assert not busy
        measured.append(config)

    def stats() -> Any:
        return SimpleNamespace(running=busy.pop() if busy else 0)

    node: Any = SimpleNamespace(
        config="settings",
        loader=SimpleNamespace(loading=None),
        engine=SimpleNamespace(stats=stats),
        machine=SimpleNamespace(measure_again=measure_again),
    )
    async with asyncio.timeout(30.0):
        await presence.Presence(node).measure_again()
    assert measured == ["settings"] * presence.MEASURED_AGAIN
