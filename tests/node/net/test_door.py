"""The peer door as a stranger, or a member gone bad, would use it."""

import asyncio
import contextlib
import gc
import os
import ssl
import struct
import tracemalloc
from typing import Any

import aiohttp
import msgspec
import pytest

from mesh.errors import PeerError
from node.net.frames import MAX_KIND_CHARS, Header, decode, encode
from node.security.admission import MAX_REQUEST_BYTES, Start
from node.security.ca import mesh_name, node_name
from node.security.tls import looking_client


async def raw(address: str, data: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """What comes back for raw bytes, in TLS or not, until the other side closes."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        writer.write(data)
        writer.write_eof() if writer.can_write_eof() else None
        return await reader.read()
    except (OSError, ssl.SSLError):
        return b""
    finally:
        writer.transport.abort()


async def test_garbage_on_tcp_harms_nobody_and_stays_nowhere(town: Any) -> None:
    a, b = await town.member(), await town.member()

    async def attack() -> None:
        for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(2000), b"\x16\x03\x01\xff\xff" + bytes(1000), b""):
            await raw(b.address, data)
        answer = await raw(b.address, os.urandom(500) + b"\r\n\r\n", looking_client())
        assert b"400" in answer or not answer
        answer = await raw(b.address, b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", looking_client())
        assert b"400" in answer or not answer

    async def memory_after(attacks: int) -> int:
        for _ in range(attacks):
            await attack()
        # aiohttp tells nobody when a connection is gone.
        while b.door._runner.server.connections:  # noqa: ASYNC110
            await asyncio.sleep(0)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    await memory_after(3)
    tracemalloc.start()
    grown = -await memory_after(2) + await memory_after(10)
    tracemalloc.stop()
    assert grown < 50_000
    assert b.door.counts.garbage >= 13
    a.send(b, "vote", b"alive")
    assert (await b.frames.get())[2] == b"alive"


async def test_a_websocket_message_of_four_gigabytes_is_refused_by_its_length(town: Any) -> None:
    a, b = await town.member(), await town.member()
    host, port = b.address.split(":")
    reader, writer = await asyncio.open_connection(
        host, int(port), ssl=a.tls.client, server_hostname=node_name(a.tls.mesh_id, b.id)
    )
    writer.write(
        b"GET /peer/stream?lane=tensor HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    assert b"101" in await reader.readline()
    tracemalloc.start()
    writer.write(b"\x82\xff" + struct.pack("!Q", 4 * 2**30) + bytes(4) + bytes(100_000))
    with contextlib.suppress(OSError):
        await reader.read()
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    writer.transport.abort()


async def test_bodies_are_bounded_before_they_are_kept(town: Any) -> None:
    founder = await town.member()
    name = mesh_name(founder.tls.mesh_id)
    context = looking_client()
    async with aiohttp.ClientSession() as session:
        for step, size in (("start", 2000), ("finish", MAX_REQUEST_BYTES + 1)):
            async with session.post(
                f"https://{founder.address}/peer/join/{step}", data=bytes(size), ssl=context, server_hostname=name
            ) as response:
                assert response.status == 400
                assert "more than" in (await response.json())["message"]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x91" * 5000,
        msgspec.msgpack.encode(Start(b"short")),
        msgspec.msgpack.encode((1, 2)),
        pytest.param(os.urandom(64), id="random"),
    ],
)
@pytest.mark.parametrize("step", ["start", "finish"])
async def test_malformed_joins_get_a_plain_no(town: Any, step: str, payload: bytes) -> None:
    founder = await town.member()
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"https://{founder.address}/peer/join/{step}",
            data=payload,
            ssl=looking_client(),
            server_hostname=mesh_name(founder.tls.mesh_id),
        ) as response,
    ):
        assert response.status == (400 if step == "start" else 200)
        body = await response.read()
        assert b"malformed" in body or b"join" in body or b"more than" in body


async def test_a_client_that_claims_a_lower_tls_version_is_refused(town: Any) -> None:
    founder = await town.member()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    host, port = founder.address.split(":")
    with pytest.raises(OSError):
        await asyncio.open_connection(host, int(port), ssl=context)


async def test_one_peer_cannot_hold_the_door_with_requests(town: Any, monkeypatch: Any) -> None:
    from node.net import door

    monkeypatch.setattr(door, "MAX_LIVE_PER_PEER", 2)
    a, b = await town.member(), await town.member()
    inside: asyncio.Queue[None] = asyncio.Queue()
    go_on = asyncio.Event()

    async def slow(sender: str, payload: bytes) -> bytes:
        inside.put_nowait(None)
        await go_on.wait()
        return b"done"

    b.door.on_rpc("slow", slow)
    calls = [asyncio.create_task(a.links.request(b.id, b.address, "slow", b"", 5.0)) for _ in range(2)]
    for _ in calls:
        await inside.get()
    with pytest.raises(Exception, match="too many requests"):
        await a.links.request(b.id, b.address, "slow", b"", 5.0)
    go_on.set()
    assert await asyncio.gather(*calls) == [b"done", b"done"]


def test_frames_round_trip_and_keep_their_bounds() -> None:
    batch = encode("vote", b"m") + encode("forward", b"", memoryview(b"body")) + encode("x", b"y" * 1000)
    assert [(k, m, bytes(b)) for k, m, b in decode(batch)] == [
        ("vote", b"m", b""),
        ("forward", b"", b"body"),
        ("x", b"y" * 1000, b""),
    ]


def _frame(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("!I", len(header)) + header + body


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"\xff\xff\xff\xff" + bytes(100),
        _frame(b""),
        _frame(b"\xc1"),
        _frame(b"\x93" * 3000),
        _frame(msgspec.msgpack.encode(Header("k" * (MAX_KIND_CHARS + 1), b""))),
        _frame(msgspec.msgpack.encode(Header("", b""))),
        _frame(msgspec.msgpack.encode(Header("k", b"", -1))),
        _frame(msgspec.msgpack.encode(Header("k", b"", 5)), b"four"),
        _frame(msgspec.msgpack.encode(Header("k", b"", 2**40)), b"four"),
        _frame(msgspec.msgpack.encode(("k", "text", 0))),
        _frame(msgspec.msgpack.encode({"kind": "k"})),
        encode("k", b"m")[:-1],
        encode("k", b"m") + b"x",
    ],
)
def test_a_malformed_frame_is_a_peer_error(data: bytes) -> None:
    with pytest.raises(PeerError):
        list(decode(data))


async def test_who_connects_and_asks_for_nothing_is_shown_out(town: Any, monkeypatch: Any) -> None:
    from node.net import door

    monkeypatch.setattr(door, "FIRST_REQUEST_S", 0.05)
    a, b = await town.member(), await town.member()
    host, port = b.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=looking_client())
    assert await reader.read() == b""
    writer.transport.abort()
    assert b.door.counts.silent == 1
    a.send(b, "vote")
    await b.frames.get()
    for _ in range(3):
        b.door._sweep()
    assert b.door.counts.silent == 1, "a connection that asked is let be"
