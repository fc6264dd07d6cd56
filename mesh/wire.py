"""Messages <-> bytes: the one gate for bytes that others wrote.

A ``Codec`` knows one union of tagged frozen Structs; every bound of a field (lengths, ranges) stands in the Struct's
annotations (``msgspec.Meta``) and is checked here, before any protocol code sees the message.  Whatever is wrong with
the bytes, the answer is one ``PeerError``: nothing else leaves ``decode``, and nothing is allocated on the word of a
length field alone (msgspec grows its lists as elements arrive, and ``max_bytes`` bounds what can arrive).
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from mesh.errors import PeerError

T = TypeVar("T")


class Codec(Generic[T]):
    """Encodes and decodes the messages of one union, each at most ``max_bytes`` long."""

    def __init__(self, union: Any, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, message: T) -> bytes:
        """The bytes of an own message; one that is too long is our bug, not a peer's."""
        data = self._encoder.encode(message)
        assert len(data) <= self.max_bytes, f"{type(message).__name__} of {len(data)} > {self.max_bytes} bytes"
        return data

    def decode(self, data: bytes | bytearray | memoryview) -> T:
        """The message in ``data``.

        Raises:
            PeerError: too long, malformed, of an unknown tag, of wrong types, out of bounds, or nested too deep.
        """
        if len(data) > self.max_bytes:
            raise PeerError(f"message of {len(data)} bytes, at most {self.max_bytes} allowed")
        try:
            return self._decoder.decode(data)
        except (ValueError, RecursionError, OverflowError) as error:  # msgspec's and codec errors are ValueErrors
            raise PeerError(f"malformed message: {str(error)[:200]}") from error

    def size(self, value: Any) -> int:
        """Bytes that ``value`` (a message or a part of one) takes when encoded."""
        return len(self._encoder.encode(value))
