"""The public port below HTTP's handlers: slow bodies, silent connections, too many of them, bytes that are not HTTP.

Strangers can reach this port.  Whatever they send or withhold, it costs a bounded time and one debug line.
"""

from __future__ import annotations

import asyncio
import logging
import ssl

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from mesh.errors import RequestError
from node.api.context import ApiSettings
from node.api.errors import json_response
from node.telemetry import get_logger

SLOWEST_BYTES_PER_S = 64 * 1024
"""A body may take ``body_s`` and its size at this rate."""


async def read_body_in_time(request: web.Request, settings: ApiSettings) -> None:
    """Read the body, so that ``request.read()`` has it.  RequestError 408 when it comes too slowly, 413 when it is
    too large."""
    limit, size = settings.max_body_bytes, request.content_length
    if size is not None and size > limit:
        raise _too_large(f"the body has {size} bytes", limit)
    deadline = settings.body_s + (limit if size is None else size) / SLOWEST_BYTES_PER_S
    try:
        async with asyncio.timeout(deadline):
            await request.read()
    except TimeoutError:
        raise RequestError(
            f"the body did not come within {deadline:.3g} s", code="request_timeout", status=408
        ) from None
    except web.RequestPayloadError as error:
        raise RequestError(f"the body cannot be read: {error}", code="invalid_http") from error
    except web.HTTPRequestEntityTooLarge:
        raise _too_large("the body is too large", limit) from None


def _too_large(what: str, limit: int) -> RequestError:
    return RequestError(f"{what}; at most {limit} are taken in", code="request_too_large", status=413)


class Listener:
    """Accepts connections for an application's runner, ``max_connections`` at a time."""

    def __init__(self, runner: web.AppRunner, settings: ApiSettings) -> None:
        self._runner, self._settings = runner, settings
        self._logger = logging.Logger("node.api.door")
        self._logger.parent = logging.getLogger("node.api")
        self._server: asyncio.Server | None = None
        self.port = settings.port

    async def start(self, tls: ssl.SSLContext | None) -> None:
        """Listen; OSError where the address is taken or not ours."""
        host, port = self._settings.host, self._settings.port
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, host, port, ssl=tls, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Accept nobody any more; what is open goes on."""
        if self._server is not None:
            self._server.close()

    def _accept(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= self._settings.max_connections:
            return _Full()
        return _Connection(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=self._settings.idle_s,
            access_log=None,  # type: ignore[arg-type]  # what AppRunner passes, too
            logger=self._logger,
        )


class _Connection(RequestHandler):
    """What aiohttp refuses before any handler sees it, in our error form and without a traceback."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if not isinstance(exc, HttpProcessingError) or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        get_logger("api").debug("not HTTP", peer=request.remote, why=type(exc).__name__)
        why = " ".join((message or "").split("\n")[0].split()).rstrip(":")[:200]
        response = json_response(_error(f"this is no HTTP request that can be read: {why}", "invalid_http"), status=400)
        response.force_close()
        return response


class _Full(asyncio.Protocol):
    """Answers 503 to whoever connects, and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        body = msgspec.json.encode(_error("this node has too many connections", "too_many_connections", "server_error"))
        head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close"
        transport.write(f"HTTP/1.1 503 Service Unavailable\r\n{head}\r\n\r\n".encode() + body)
        transport.close()


def _error(message: str, code: str, kind: str = "invalid_request_error") -> dict[str, dict[str, str | None]]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
