"""One HTTPS request to a peer, with every size bounded and every failure named."""

from __future__ import annotations

import asyncio
import os
import ssl
from typing import Any

import aiohttp
import msgspec

from mesh.errors import (
    CapacityError,
    MeshError,
    NoRoute,
    PeerError,
    PeerUnreachable,
    RequestError,
    SessionLost,
    StalePlacement,
)

MAX_RPC_BYTES = 16 * 2**20
"""Of a request or a reply; larger things are files, fetched in ranges."""
CONNECT_S = 3.0

ERRORS_BY_CODE: dict[str, type[MeshError]] = {
    kind.code: kind for kind in (CapacityError, NoRoute, StalePlacement, SessionLost, PeerUnreachable)
}


class Fault(msgspec.Struct, frozen=True):
    """The JSON body of an answer that is an error."""

    error: str
    message: str = ""


def new_session(per_host: int = 32) -> aiohttp.ClientSession:
    """A client session for peers: no cookies, no proxies, no redirects followed, no time limit but our own.

    ``per_host``: connections to one peer at a time, more wait; 0: any number."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, limit_per_host=per_host, keepalive_timeout=30.0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        auto_decompress=False,
        trust_env=False,
    )


async def post(
    session: aiohttp.ClientSession,
    address: str,
    path: str,
    payload: bytes,
    *,
    context: ssl.SSLContext,
    server_name: str,
    timeout_s: float,
    limit: int = MAX_RPC_BYTES,
) -> bytes:
    """The body of the answer.

    Raises ``PeerUnreachable`` when there is none in ``timeout_s``, the peer's own error (``CapacityError``,
    ``StalePlacement``, ... by its code) when it refused, and ``PeerError`` for anything else.
    """
    try:
        async with asyncio.timeout(timeout_s):
            async with session.post(
                f"https://{address}{path}",
                data=payload,
                ssl=context,
                server_hostname=server_name,
                allow_redirects=False,
                headers={"Content-Type": "application/msgpack"},
            ) as response:
                body = await read_bounded(response.content, limit)
                if response.status != 200:
                    raise fault(response.status, body)
                return body
    except (aiohttp.ClientError, OSError, TimeoutError, ssl.SSLError, ValueError) as error:
        raise unreachable(address, error) from error


async def read_bounded(content: aiohttp.StreamReader, limit: int) -> bytes:
    """All of ``content``, never keeping more than ``limit`` bytes.  Raises ``PeerError`` past it."""
    parts, size = [], 0
    async for part in content.iter_any():
        size += len(part)
        if size > limit:
            raise PeerError(f"a body of more than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


def fault(status: int, body: bytes) -> MeshError:
    """The error that a peer's answer means."""
    try:
        told = msgspec.json.decode(body, type=Fault)
    except msgspec.DecodeError:
        return PeerError(f"the peer answered {status} without saying why")
    kind = ERRORS_BY_CODE.get(told.error)
    if kind is not None:
        return kind(told.message)
    if 400 <= status < 500:
        return RequestError(told.message, code=told.error, status=status)
    return PeerError(f"the peer answered {status}: {told.message[:200]}")


def encode_fault(error: MeshError) -> bytes:
    """The body that ``fault`` reads."""
    return msgspec.json.encode(Fault(error.code, str(error)[:1000]))


def unreachable(address: str, error: BaseException) -> PeerUnreachable:
    """What went wrong on the way to ``address``, in words that a person can act upon."""
    return PeerUnreachable(f"{address}: {_reason(error)}")


def _reason(error: Any) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not that node's of our mesh ({error.certificate_error})"
    if isinstance(error, aiohttp.ClientConnectorError):
        return _reason(error.os_error)
    # TLS 1.3: a server that refuses our certificate hangs up after the handshake.
    if isinstance(error, aiohttp.ServerDisconnectedError) or (isinstance(error, ssl.SSLError) and error.reason):
        return "it hung up (it may have refused our certificate: another mesh, expired or revoked)"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()  # asyncio's own text repeats the address
    return str(error) or type(error).__name__
