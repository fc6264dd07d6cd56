"""Reading a session at another node: what a frame is, and what silence means."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest
from aiohttp import StreamReader
from aiohttp.base_protocol import BaseProtocol

from mesh.errors import PeerError
from node import relay
from node.api.service import EndEvent, TokenEvent


def content() -> StreamReader:
    return StreamReader(mock.create_autospec(BaseProtocol, instance=True), 1 << 16, loop=asyncio.get_running_loop())


async def test_frames_come_back_as_they_were_written() -> None:
    stream, steps = content(), [relay.Step(token=TokenEvent(3, 7, -0.5, ())), relay.Step(end=EndEvent("stop"))]
    stream.feed_data(b"".join(map(relay._framed, steps)))
    assert [await relay._read_frame(stream) for _ in steps] == steps


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\x09half"])
async def test_an_owner_that_falls_silent_anywhere_in_a_frame_is_given_up(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "SILENT_S", 0.01)
    stream = content()
    stream.feed_data(sent)
    with pytest.raises(TimeoutError):
        await relay._read_frame(stream)


async def test_a_frame_has_a_limit() -> None:
    stream = content()
    stream.feed_data(b"\xff\xff\xff\xff")
    with pytest.raises(PeerError, match="too large"):
        await relay._read_frame(stream)
