"""What strangers can do to the port: slow bodies, silence, many connections, bytes that are not HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from tests.fakes import FakeService
from tests.node.api.conftest import Http, chat_body, serve

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


async def say(http: Http, *parts: bytes) -> tuple[bytes, Any]:
    """Head and body of what comes back until the node hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", http.server.port)
    try:
        async with asyncio.timeout(15):
            for part in parts:
                writer.write(part)
                await writer.drain()
            answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, msgspec.json.decode(body) if body else None


@pytest.mark.parametrize("framing", [b"Content-Length: 100\r\n", b"Transfer-Encoding: chunked\r\n"])
async def test_a_body_that_does_not_come_is_given_up(service: FakeService, framing: bytes) -> None:
    # A chunked body may be as large as any: its time is bounded all the same.
    async for http in serve(service, body_s=0.1, max_body_bytes=1024):
        start = b"1\r\n{\r\n" if b"chunked" in framing else b"{"
        reader, writer = await asyncio.open_connection("127.0.0.1", http.server.port)
        writer.write(POST + framing + b"\r\n" + start)
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readuntil(b"}}")
        assert head.startswith(b"HTTP/1.1 408")
        assert b"connection: close" in head.lower()
        assert msgspec.json.decode(body)["error"]["code"] == "request_timeout"
        writer.close()
        assert not service.opened


async def test_a_slow_body_of_fair_size_is_awaited(service: FakeService) -> None:
    async for http in serve(service, body_s=1.0):
        body = b'{"prompt": "Once"}'
        framing = f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", http.server.port)
        writer.write(POST + framing)
        for byte in body:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.01)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nx-"])
async def test_a_connection_that_asks_nothing_is_closed(service: FakeService, sent: bytes) -> None:
    async for http in serve(service, idle_s=0.2):
        assert await say(http, sent) == (b"", None)
        done = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        head, answer = await say(http, done)
        assert head.startswith(b"HTTP/1.1 200"), "and one that asked once is closed when it asks no more"
        assert answer == {"status": "ok"}


async def test_a_stream_is_not_idle(service: FakeService) -> None:
    async for http in serve(service, idle_s=0.1):
        service.hold_after = 2
        async with http.session.post("/v1/chat/completions", json=chat_body(stream=True)) as answer:
            await asyncio.sleep(0.3)
            service.gate.set()
            assert (await answer.text()).endswith("data: [DONE]\n\n")


async def test_connections_are_counted(service: FakeService) -> None:
    async for http in serve(service, max_connections=2):
        held = [await asyncio.open_connection("127.0.0.1", http.server.port) for _ in range(2)]
        await asyncio.sleep(0.05)
        head, answer = await say(http)
        assert head.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 1" in head
        assert answer["error"]["code"] == "too_many_connections"
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.05)
        assert (await http.get("/health"))[0] == 200


async def test_a_body_that_cannot_be_read(http: Http, capsys: pytest.CaptureFixture[str]) -> None:
    head, answer = await say(
        http, POST + b"Connection: close\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\n", b"xyzxy"
    )
    assert head.startswith(b"HTTP/1.1 400")
    assert answer["error"]["code"] == "invalid_http"
    assert "Traceback" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello in another protocol\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nx-long: " + b"x" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
    ids=["tls", "long-header", "no-colon", "no-host", "bad-chunk"],
)
async def test_what_is_no_http_gets_our_error_body_and_no_traceback(
    http: Http, sent: bytes, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    head, answer = await say(http, sent)
    assert head.split()[1] in (b"400", b"403"), head
    assert b"application/json" in head
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in answer["error"]["message"]
    printed = capsys.readouterr()
    assert "Traceback" not in caplog.text + printed.out + printed.err
    assert (await http.get("/health"))[0] == 200
