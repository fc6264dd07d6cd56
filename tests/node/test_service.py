"""The API's view of a node: what is refused leaves nothing behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mesh.pipeline import messages as m
from mesh.types import NodeId
from node.durable import Durable, NotKept
from node.node import Node
from node.service import NodeService
from node.session_log import SessionLogs
from tests.node.test_entry import World, request


@pytest.mark.parametrize("key", ["", "k"])
async def test_what_the_disk_refuses_does_not_run(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key lets a session outlive its reader, but this one was never accepted: the SDK asks another node."""

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(SessionLogs, "begin", refuse)
    world, unused = World(), cast(Any, None)
    logs = SessionLogs(tmp_path, tmp_path / "key")
    durable = Durable(NodeId("me"), logs, world.entry, cast(Any, []), unused, unused)
    node: Any = SimpleNamespace(
        config=SimpleNamespace(name="me"), entry=world.entry, durable=durable, view=world.seen, draining=False
    )
    opening = asyncio.create_task(
        NodeService(cast(Node, node), "0").open(request(priority="batch", idempotency_key=key))
    )
    await asyncio.sleep(0)
    assert world.answer_opens() == ["a", "b"]
    with pytest.raises(NotKept):
        await opening
    assert world.entry.sessions() == []
    assert [to for to, _ in world.take(m.Release)] == ["a", "b"]
    assert world.entry.get("s") is None, "asked again it runs"
