import asyncio
import base64
import hashlib
import ssl
from typing import Any

import aiohttp
import pytest

from mesh.errors import CapacityError, PeerError, PeerUnreachable, RequestError, StalePlacement
from node.net import inbound, stream
from node.net.address import bind_pair, parse_address
from node.net.frames import CREDIT, encode
from node.net.inbound import Received
from node.net.links import SILENT_S
from node.security.ca import node_name

CREDIT_BYTES = 2**20
MAX_BODY = CREDIT_BYTES - CREDIT_BYTES // 8


@pytest.fixture(autouse=True)
def _small_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same proportions as in service, with fewer bytes to move."""
    for module in (stream, inbound):
        monkeypatch.setattr(module, "CREDIT_BYTES", CREDIT_BYTES)
    monkeypatch.setattr(inbound, "RETURN_BYTES", CREDIT_BYTES // 8)


async def test_frames_arrive_whole_in_order_with_their_sender(town: Any) -> None:
    a, b = await town.member(), await town.member()
    for i in range(300):
        assert a.send(b, "vote", b"%d" % i)
    for i in range(300):
        assert await b.frames.get() == (a.id, "vote", b"%d" % i, b"")
    body = bytes(range(256)) * 1024
    a.send(b, "forward", b"meta", body)
    assert await b.frames.get() == (a.id, "forward", b"meta", body)
    assert await a.up.get() == b.id
    assert a.links.connected(b.id)
    assert not b.links.connected(a.id)


async def test_tensors_wait_for_credit_and_control_frames_do_not(town: Any) -> None:
    a, b = await town.member(), await town.member()
    b.hold = True
    body = bytes(CREDIT_BYTES // 4)
    for i in range(5):
        a.send(b, "forward", b"%d" % i, body)
    for i in range(4):
        assert (await b.frames.get())[2] == b"%d" % i
    a.send(b, "heartbeat")
    assert (await b.frames.get())[1] == "heartbeat"
    assert b.frames.empty(), "the fifth tensor is beyond the credit"
    b.held[0].done()
    b.held[0].done()
    assert (await b.frames.get())[2] == b"4"


async def test_many_times_the_credit_flows_when_the_consumer_keeps_up(town: Any) -> None:
    a, b = await town.member(), await town.member()
    body = bytes(CREDIT_BYTES // 4)
    for i in range(12):
        while not a.send(b, "forward", b"%d" % i, body):
            await a.links._links[b.id].lanes["tensor"].flushed.wait()
        assert (await b.frames.get())[2] == b"%d" % i
    assert a.lost.empty()


async def test_a_full_queue_resets_the_link_unless_gossip_can_give_way(town: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(stream, "MAX_QUEUED_FRAMES", 3)
    a, b = await town.member(), await town.member()
    assert all(a.send(b, "gossip", b"%d" % i, droppable=True) for i in range(3))
    assert a.send(b, "gossip", b"3", droppable=True)  # the oldest gave way
    assert a.send(b, "session", b"4")
    for wanted in (b"2", b"3", b"4"):
        assert (await b.frames.get())[2] == wanted
    assert all(a.send(b, "session") for _ in range(3))
    assert not a.send(b, "session")
    assert await a.lost.get() == b.id
    a.send(b, "session", b"after")
    assert (await b.frames.get())[2] == b"after"


async def test_a_dead_peer_is_lost_once_and_found_again(town: Any) -> None:
    a, b = await town.member(), await town.member()
    a.send(b, "vote")
    a.send(b, "forward", b"", b"tensor")
    for _ in range(2):
        await b.frames.get()
    assert await a.up.get() == b.id
    await b.door.stop()
    assert await a.lost.get() == b.id
    a.send(b, "vote")
    assert (await a.unreachable.get())[0] == b.id
    b.door = b.new_door(b.registrar.admit)
    tcp, udp = bind_pair(*parse_address(b.address))
    udp.close()
    await b.serve(tcp)
    a.send(b, "vote", b"again")
    assert (await b.frames.get())[2] == b"again"
    assert await a.up.get() == b.id
    assert a.lost.empty()


async def test_a_reset_that_is_mended_is_not_a_loss(town: Any) -> None:
    a, b = await town.member(), await town.member()
    a.send(b, "vote", b"1")
    await b.frames.get()
    assert await a.up.get() == b.id
    b.door.drop(a.id)
    assert await a.up.get() == b.id
    a.send(b, "vote", b"2")
    assert (await b.frames.get())[2] == b"2"
    assert a.lost.empty()


async def test_another_node_at_the_address_gets_nothing(town: Any) -> None:
    a, b, c = await town.member(), await town.member(), await town.member()
    a.links.send(c.id, b.address, "vote", b"for c")
    node, why = await a.unreachable.get()
    assert node == c.id
    assert "certificate" in why
    assert b.frames.empty()
    with pytest.raises(PeerUnreachable, match="certificate"):
        await a.links.request(c.id, b.address, "echo", b"", 2.0)


async def test_garbage_closes_that_connection_only(town: Any) -> None:
    a, b = await town.member(), await town.member()
    a.send(b, "vote")
    await b.frames.get()
    url = f"https://{b.address}/peer/stream?lane=tensor"
    for garbage in (b"x", b"\xff\xff\xff\xff", encode("k", b"m") + b"\0\0\0", b"\0\0\0\2\x92\xc1", b"\0" * 5000):
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(url, ssl=a.tls.client, server_hostname=node_name(a.tls.mesh_id, b.id)) as socket,
        ):
            await socket.send_bytes(garbage)
            assert (await socket.receive()).type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
    assert b.door.counts.garbage == 5
    a.send(b, "vote", b"still here")
    while (await b.frames.get())[2] != b"still here":
        pass


async def test_a_peer_that_overdraws_its_credit_is_cut_off(town: Any) -> None:
    a, b = await town.member(), await town.member()
    b.hold = True
    url = f"https://{b.address}/peer/stream?lane=tensor"
    name = node_name(a.tls.mesh_id, b.id)
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(url, ssl=a.tls.client, server_hostname=name) as socket,
    ):
        await socket.send_bytes(encode("forward", b"", bytes(MAX_BODY)))
        await b.frames.get()
        await socket.send_bytes(encode("forward", b"", bytes(CREDIT_BYTES - MAX_BODY + 1)))
        assert (await socket.receive()).type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
    assert b.frames.empty()
    assert b.door.counts.garbage == 1


async def test_requests_answers_and_errors_by_name(town: Any) -> None:
    a, b = await town.member(), await town.member()

    async def echo(sender: str, payload: bytes) -> bytes:
        if payload == b"full":
            raise CapacityError("no pages left")
        if payload == b"stale":
            raise StalePlacement("active is (1, 3)")
        if payload == b"bad":
            raise RequestError("no such model", code="model_not_found", status=404)
        if payload == b"lie":
            raise PeerError("malformed")
        return sender.encode() + payload

    b.door.on_rpc("echo", echo)
    assert await a.links.request(b.id, b.address, "echo", b"hi", 2.0) == a.id.encode() + b"hi"
    for payload, kind in ((b"full", CapacityError), (b"stale", StalePlacement), (b"lie", RequestError)):
        with pytest.raises(kind):
            await a.links.request(b.id, b.address, "echo", payload, 2.0)
    with pytest.raises(RequestError, match="no such model") as caught:
        await a.links.request(b.id, b.address, "echo", b"bad", 2.0)
    assert (caught.value.code, caught.value.status) == ("model_not_found", 404)
    with pytest.raises(RequestError, match="does not serve"):
        await a.links.request(b.id, b.address, "nonsense", b"", 2.0)
    with pytest.raises(PeerError, match="more than 4 bytes"):
        await a.links.request(b.id, b.address, "echo", b"hi", 2.0, limit=4)


async def test_a_request_without_an_answer_is_unreachable_in_time(town: Any) -> None:
    a, b = await town.member(), await town.member()

    test_over = asyncio.Event()

    async def never(sender: str, payload: bytes) -> bytes:
        await test_over.wait()
        return b""

    b.door.on_rpc("never", never)
    with pytest.raises(PeerUnreachable, match="in time"):
        await a.links.request(b.id, b.address, "never", b"", 0.05)
    test_over.set()
    await b.door.stop()
    with pytest.raises(PeerUnreachable, match="refused"):
        await a.links.request(b.id, b.address, "never", b"", 2.0)


async def test_sockets_do_not_hold_frames_back_nor_wait_for_ever(town: Any) -> None:
    import socket as sockets

    a, b = await town.member(), await town.member()
    seen: asyncio.Queue[int] = asyncio.Queue()

    async def look(request: Any) -> Any:
        sock = request.transport.get_extra_info("socket")
        seen.put_nowait(sock.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY))
        return aiohttp.web.Response(body=b"file")

    await b.door.stop()
    b.door = b.new_door(b.registrar.admit)
    b.door.add_get("/peer/files/{name}", look)
    tcp, udp = bind_pair("127.0.0.1", 0)
    udp.close()
    await b.serve(tcp)
    async with a.links.get(b.id, b.address, "/peer/files/x") as response:
        assert await response.read() == b"file"
    assert await seen.get()
    link_socket = await a.links._links.setdefault(b.id, _link(a, b)).dial("control")
    sock = link_socket.get_extra_info("socket")
    assert sock.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY)
    if hasattr(sockets, "TCP_USER_TIMEOUT"):
        assert sock.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_USER_TIMEOUT) == SILENT_S * 1000
    assert link_socket.get_extra_info("ssl_object").version() == "TLSv1.3"
    await link_socket.close()


def _link(a: Any, b: Any) -> Any:
    a.send(b, "vote")
    return a.links._links[b.id]


async def test_a_received_body_is_a_view(town: Any) -> None:
    a, b = await town.member(), await town.member()
    b.hold = True
    a.send(b, "forward", b"", b"0123")
    await b.frames.get()
    frame: Received = b.held[0]
    assert frame.body.readonly
    assert frame.body == b"0123"
    frame.done()


def test_contexts_speak_tls_1_3_only() -> None:
    from node.security.tls import looking_client

    assert looking_client().minimum_version is ssl.TLSVersion.TLSv1_3


async def test_the_largest_body_never_waits_for_credit_that_lies_idle(town: Any) -> None:
    a, b = await town.member(), await town.member()
    a.send(b, "forward", b"", bytes(CREDIT_BYTES - MAX_BODY - 1))  # too little for the receiver to return
    await b.frames.get()
    a.send(b, "forward", b"whole", bytes(MAX_BODY))
    assert (await b.frames.get())[2] == b"whole"


async def test_an_idle_link_closes_and_is_not_lost(town: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(stream, "IDLE_S", 0.05)
    a, b = await town.member(), await town.member()
    a.send(b, "vote", b"1")
    await b.frames.get()
    lane = a.links._links[b.id].lanes["control"]
    while lane.connected:
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, return_when=asyncio.FIRST_COMPLETED)
    assert not a.links.connected(b.id)
    a.send(b, "vote", b"2")
    assert (await b.frames.get())[2] == b"2"
    assert a.lost.empty()
    assert a.up.qsize() == 1, "closing for silence is no news"


async def strange_door(member: Any, after_upgrade: Any) -> asyncio.Server:
    """A door with ``member``'s certificate that upgrades to a WebSocket and then does as told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        key = next(line.split()[1] for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
        accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        writer.write(b"HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " + accept)
        writer.write(b"\r\n\r\n")
        await after_upgrade(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=member.tls.server, limit=1024)
    member.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    return server


async def test_a_peer_that_does_not_read_is_reset(town: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(stream, "WRITE_S", 0.1)
    monkeypatch.setattr(stream, "SLOWEST_BYTES_PER_S", 1e9)
    a, b = await town.member(), await town.member()
    over = asyncio.Event()

    async def freeze(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.close()
        await over.wait()
        writer.transport.abort()

    server = await strange_door(b, freeze)
    for _ in range(12):
        assert a.send(b, "sync", bytes(2**20))
    assert await a.lost.get() == b.id
    over.set()


@pytest.mark.parametrize("grant", [CREDIT.pack(2**63), CREDIT.pack(1), b"junk"])
async def test_credit_that_nobody_owes_ends_the_socket(town: Any, grant: bytes) -> None:
    a, b = await town.member(), await town.member()

    async def overpay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes((0x82, len(grant))) + grant)
        server.close()
        while await reader.read(1024):
            pass
        writer.close()

    server = await strange_door(b, overpay)
    a.send(b, "vote")
    assert await a.lost.get() == b.id
