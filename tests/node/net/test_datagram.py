import asyncio
import os
import socket
import time
import tracemalloc
from typing import Any

import pytest

from mesh.errors import ConfigError
from mesh.types import MeshId, NodeId
from node.net import names
from node.net.address import bind_pair, format_address, parse_address
from node.net.datagram import Datagrams
from node.security.keyring import MAX_MESSAGE, KeyRing, new_gossip_key

MESH = MeshId("1" * 32)
A, B = NodeId("aa" * 16), NodeId("bb" * 16)


async def endpoint(me: NodeId, ring: KeyRing) -> tuple[Datagrams, asyncio.Queue[Any], tuple[str, int]]:
    tcp, udp = bind_pair("127.0.0.1", 0)
    tcp.close()
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    datagrams = await Datagrams.open(udp, me, ring, lambda *args: inbox.put_nowait(args))
    return datagrams, inbox, udp.getsockname()


async def test_members_hear_each_other_and_from_where() -> None:
    ring = KeyRing(MESH, [new_gossip_key()])
    a, a_inbox, a_at = await endpoint(A, ring)
    b, b_inbox, b_at = await endpoint(B, ring)
    assert a.send(b_at, bytes(MAX_MESSAGE))
    assert await b_inbox.get() == (A, bytes(MAX_MESSAGE), format_address(*a_at))
    assert b.send(a_at, b"ack")
    assert (await a_inbox.get())[:2] == (B, b"ack")
    assert (a.counts.sent, a.counts.received, b.counts.received_bytes) == (1, 1, 1200)
    a.close(), b.close()
    a.close()
    assert not a.send(b_at, b"after the end")


async def test_garbage_is_counted_and_dropped_with_flat_memory() -> None:
    ring = KeyRing(MESH, [new_gossip_key()])
    b, inbox, at = await endpoint(B, ring)
    foreign = KeyRing(MESH, [new_gossip_key()])
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    replay = ring.seal(A, b"old", time.time() - 3600)
    kinds = [b"", b"\1", os.urandom(40), os.urandom(1200), os.urandom(9000), foreign.seal(A, b"x", time.time()), replay]
    kinds.append(ring.seal(B, b"our own words", time.time()))
    tracemalloc.start()
    for round_ in range(60):
        if round_ == 10:
            before = tracemalloc.get_traced_memory()[0]
        for datagram in kinds:
            sock.sendto(datagram, at)
        sock.sendto(ring.seal(A, b"ping", time.time()), at)
        assert (await inbox.get())[1] == b"ping"
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert b.counts.stale == 60
    assert b.counts.garbage == 60 * (len(kinds) - 1)
    assert inbox.empty()
    assert grown < 20_000
    sock.close(), b.close()


async def test_a_listener_that_went_away_is_no_error() -> None:
    ring = KeyRing(MESH, [new_gossip_key()])
    a, _, _ = await endpoint(A, ring)
    b, b_inbox, b_at = await endpoint(B, ring)
    tcp, udp = bind_pair("127.0.0.1", 0)
    gone = udp.getsockname()
    tcp.close(), udp.close()
    for _ in range(3):
        a.send(gone, b"anybody?")
    assert not a.send(("::1", 9), b"another family")
    assert a.send(b_at, b"still here")
    assert (await b_inbox.get())[1] == b"still here"
    a.close(), b.close()


def test_one_port_number_serves_tcp_and_udp() -> None:
    tcp, udp = bind_pair("127.0.0.1", 0)
    port = tcp.getsockname()[1]
    assert udp.getsockname()[1] == port
    with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} \(TCP\): Address already in use"):
        bind_pair("127.0.0.1", port)
    tcp.close()
    with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} \(UDP\): Address already in use"):
        bind_pair("127.0.0.1", port)
    udp.close()
    for sock in bind_pair("127.0.0.1", port):
        sock.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "x" * 300])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        bind_pair(host, 0)


def test_addresses() -> None:
    assert parse_address("localhost:9000") == ("localhost", 9000)
    assert parse_address("[::1]:0") == ("::1", 0)
    assert format_address("::1", 9) == "[::1]:9"
    for text in ("", "9000", ":9000", "host", "host:", "host:x", "host:70000", "::1:9000", "host:-1", "host:²"):
        with pytest.raises(ConfigError, match="--listen must be HOST:PORT"):
            parse_address(text, "--listen")


async def test_a_name_is_looked_up_behind_the_sender() -> None:
    ring = KeyRing(MESH, [new_gossip_key()])
    a, _, _ = await endpoint(A, ring)
    b, b_inbox, (_, port) = await endpoint(B, ring)
    assert not a.send(("localhost", port), b"1")
    await a._names._asking["localhost", port]
    assert a.send(("localhost", port), b"2")
    assert (await b_inbox.get())[1] == b"2"
    assert not a.send(("no such host", port), b"3")
    await a._names._asking["no such host", port]
    assert not a.send(("no such host", port), b"4")
    a.close(), b.close()


def test_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_NAMES", 3)
    cache = names.Names()
    for port in range(10):
        assert cache.find(("192.0.2.1", port)) == ("192.0.2.1", port)
    assert len(cache._known) == 3
