"""The receiving end of a lane: frames in, credit back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import WSMsgType, web

from mesh.errors import PeerError
from mesh.types import NodeId
from node.net.frames import CREDIT, CREDIT_BYTES, MAX_WS_MESSAGE, RETURN_BYTES, Lane, decode


class Received:
    """A frame that came in.  ``body`` is a view of the received message: keep it only as long as it is needed."""

    __slots__ = ("_stream", "body", "kind", "message", "sender")

    def __init__(self, sender: NodeId, kind: str, message: bytes, body: memoryview, stream: InStream) -> None:
        self.sender, self.kind, self.message, self.body = sender, kind, message, body
        self._stream: InStream | None = stream

    def done(self) -> None:
        """The consumer needs ``body`` no more: its sender may send as much again.  On the loop; harmless twice."""
        if self._stream is not None:
            self._stream.give_back(self.body.nbytes)
            self._stream = None


class InStream:
    """One lane from one peer, for as long as its socket lives."""

    def __init__(self, sender: NodeId, lane: Lane, on_frame: Callable[[Received], None]) -> None:
        self.socket = web.WebSocketResponse(
            compress=False, max_msg_size=MAX_WS_MESSAGE[lane], timeout=0.5, autoping=True
        )
        self._sender, self._lane, self._on_frame = sender, lane, on_frame
        self._request: web.Request | None = None
        self._held = 0
        """Bytes of bodies that the consumer has not given back, or that are owed to the sender."""
        self._owed = 0
        self._owes = asyncio.Event()

    async def serve(self, request: web.Request) -> None:
        """Until the socket ends.  Raises ``PeerError`` when the peer broke the protocol; the socket is closed then."""
        self._request = request
        await self.socket.prepare(request)
        payer = asyncio.create_task(self._pay()) if self._lane == "tensor" else None
        try:
            async for message in self.socket:
                if message.type is not WSMsgType.BINARY:
                    raise PeerError("a stream carries binary messages only")
                self._receive(message.data)
        finally:
            if payer is not None:
                payer.cancel()
            self.abort()

    def give_back(self, size: int) -> None:
        """The consumer is done with ``size`` bytes of bodies."""
        self._owed += size
        if self._owed >= RETURN_BYTES:
            self._owes.set()

    def abort(self) -> None:
        """End the socket now."""
        if self._request is not None and self._request.transport is not None:
            self._request.transport.abort()

    def _receive(self, data: bytes) -> None:
        for kind, message, body in decode(data):
            self._held += body.nbytes
            if body.nbytes and (self._lane == "control" or self._held > CREDIT_BYTES):
                raise PeerError("more bytes than this node gave credit for")
            self._on_frame(Received(self._sender, kind, message, body, self))

    async def _pay(self) -> None:
        while True:
            await self._owes.wait()
            self._owes.clear()
            granted, self._owed = self._owed, 0
            self._held -= granted
            try:
                await self.socket.send_bytes(CREDIT.pack(granted))
            except ConnectionError:
                return
