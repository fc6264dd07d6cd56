"""Carries the generation protocol's messages between nodes: what one turn of the loop sends to a peer is one frame.

Small messages go by the control lane, hidden states and pages by the tensor lane, where they wait for the receiver's
credit.  The lanes may overtake each other: the protocol holds what comes before its Open, and asks again for what is
missing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from mesh.core import Send
from mesh.pipeline import messages as m
from mesh.types import NodeId
from mesh.wire import Codec
from node.net.frames import MAX_MESSAGE

KIND = "pipeline"
MAX_FRAME_BYTES = 16 << 20
FRAME: Codec[list[m.Pipeline]] = Codec(list[m.Pipeline], MAX_FRAME_BYTES)
_ENCODER = msgspec.msgpack.Encoder()


class Mail:
    """``post`` queues; the queue leaves at the end of the loop's turn, in order, packed by peer and lane."""

    def __init__(
        self,
        me: NodeId,
        send: Callable[[NodeId, bytes, bytes], bool],
        deliver: Callable[[Any, NodeId], None],
    ) -> None:
        """``send(peer, message, body)`` hands a frame to the link; ``deliver`` gives a message that has arrived to the
        stage or to a session.  A frame that a link refuses is lost: the link's owner hears of it (``on_lost``)."""
        self.me = me
        self._send, self._deliver = send, deliver
        self._out: dict[NodeId, list[Any]] = {}
        self._local: deque[Any] = deque()
        self._flushing = False

    def post(self, send: Send) -> None:
        """Queue one message; one to this node itself is delivered in the same turn."""
        if send.to == self.me:
            self._local.append(send.message)
        else:
            self._out.setdefault(send.to, []).append(send.message)
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def arrived(self, sender: NodeId, message: bytes | memoryview) -> None:
        """A frame's message or body from an authenticated peer.  Raises ``PeerError`` when it is none of ours."""
        for item in FRAME.decode(message):
            self._deliver(item, sender)

    def _flush(self) -> None:
        try:
            while self._local:
                self._deliver(self._local.popleft(), self.me)
        finally:  # whatever a delivery does wrong, the next post must be sent
            self._flushing = False
        out, self._out = self._out, {}
        for peer, messages in out.items():
            small = [message for message in messages if not isinstance(message, m.BULK)]
            for packed in _packed(small):
                self._send(peer, packed, b"")
            for group in _frames([message for message in messages if isinstance(message, m.BULK)]):
                self._send(peer, b"", FRAME.encode(group))


def _packed(small: list[Any]) -> list[bytes]:
    """Frames below the control lane's bound: a recovery opens all sessions at once, each with its whole prompt."""
    if not small:
        return []
    data = _ENCODER.encode(small)
    if len(data) <= MAX_MESSAGE or len(small) == 1:
        return [data]
    return _packed(small[: len(small) // 2]) + _packed(small[len(small) // 2 :])


def _frames(bulk: list[m.Forward | m.Pages]) -> list[list[m.Pipeline]]:
    """Groups below half the bound; one message alone is always below it (``checkpoints.REPLAY_ROWS``)."""
    groups: list[list[m.Pipeline]] = []
    size = MAX_FRAME_BYTES
    for message in bulk:
        own = len(message.payload) + (len(message.rows) if isinstance(message, m.Pages) else 0)
        if size + own > MAX_FRAME_BYTES // 2:
            groups.append([])
            size = 0
        groups[-1].append(message)
        size += own
    return groups
