"""Frames: what a link carries, several to a WebSocket message.

    u32 big-endian header length | header, msgpack of ``Header`` | body, raw bytes

The WebSocket layer refuses a message longer than its lane allows before it keeps a byte of it; here every length is
checked against what is really there before a slice is made.  Bodies are not copied: they are views of the message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Literal

import msgspec

from mesh.errors import PeerError

Lane = Literal["control", "tensor"]

MAX_KIND_CHARS = 32
MAX_MESSAGE = 4 * 2**20
"""Bytes of a frame's message: a full sync of thousands of members, or a committed record, fits."""
CREDIT_BYTES = 32 * 2**20
"""Bodies of one lane that may be on their way, or held by the receiver's consumer."""
RETURN_BYTES = CREDIT_BYTES // 8
"""Credit goes back in lumps of this, so that a decode step costs no message of its own in the other direction."""
MAX_BODY = CREDIT_BYTES - RETURN_BYTES
"""Bytes of a frame's tensor: what a sender always has credit for once the receiver's consumer is done with all."""
MAX_HEADER = MAX_MESSAGE + 1024
BATCH_BYTES = 64 * 1024
"""Waiting frames are joined up to this, so that many small ones cost one TLS record and one system call."""

MAX_WS_MESSAGE: dict[Lane, int] = {
    "control": 4 + MAX_HEADER + BATCH_BYTES,
    "tensor": 4 + MAX_HEADER + MAX_BODY + BATCH_BYTES,
}

Buffer = bytes | bytearray | memoryview

_LENGTH = struct.Struct("!I")
CREDIT = struct.Struct("!Q")
"""A credit message, receiver to sender: bytes of bodies that it may send in addition."""


class Header(msgspec.Struct, frozen=True, array_like=True):
    """``body`` is the length of the raw bytes that follow."""

    kind: str
    message: bytes
    body: int = 0


def encode(kind: str, message: bytes, body: Buffer = b"") -> bytes:
    """One frame.  The caller keeps to ``MAX_MESSAGE`` and ``MAX_BODY``: anything longer is our own bug."""
    size = memoryview(body).nbytes
    assert len(kind) <= MAX_KIND_CHARS, kind
    assert len(message) <= MAX_MESSAGE, len(message)
    assert size <= MAX_BODY, size
    header = msgspec.msgpack.encode(Header(kind, message, size))
    return b"".join((_LENGTH.pack(len(header)), header, body))


def decode(data: bytes) -> Iterator[tuple[str, bytes, memoryview]]:
    """The frames in one WebSocket message: kind, message, body.  Raises ``PeerError`` at the first malformed one."""
    view = memoryview(data)
    while view:
        if len(view) < _LENGTH.size:
            raise PeerError("a frame is cut short")
        (length,) = _LENGTH.unpack_from(view)
        if length > MAX_HEADER or length > len(view) - _LENGTH.size:
            raise PeerError(f"a frame claims a header of {length} bytes")
        header = _header(view[_LENGTH.size : _LENGTH.size + length])
        view = view[_LENGTH.size + length :]
        if not 0 <= header.body <= min(MAX_BODY, len(view)):
            raise PeerError(f"a frame claims a body of {header.body} bytes, {len(view)} are there")
        yield header.kind, header.message, view[: header.body]
        view = view[header.body :]


def _header(raw: memoryview) -> Header:
    try:
        header = msgspec.msgpack.decode(raw, type=Header)
    except (msgspec.DecodeError, RecursionError) as error:
        raise PeerError(f"a frame's header is malformed: {error}") from None
    if not 0 < len(header.kind) <= MAX_KIND_CHARS or len(header.message) > MAX_MESSAGE:
        raise PeerError("a frame's header is out of bounds")
    return header
