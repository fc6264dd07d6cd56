"""Sealed UDP: gossip between members, and nothing kept of what anybody else sends."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec

from mesh.errors import PeerError
from mesh.types import NodeId
from node.net.address import format_address
from node.net.names import Names
from node.security.keyring import MAX_DATAGRAM, KeyRing, Stale

MAX_UNSENT = 256 * 1024
"""Bytes that may wait for the kernel; past it datagrams are dropped, as UDP may."""

OnDatagram = Callable[[NodeId, bytes, str], None]
"""(sender, message, address it came from as ``host:port``); called on the event loop."""


class DatagramCounts(msgspec.Struct):
    """How many datagrams met which end since the start."""

    sent: int = 0
    sent_bytes: int = 0
    received: int = 0
    received_bytes: int = 0
    garbage: int = 0
    """Not sealed by this mesh, changed on the way, or too long."""
    stale: int = 0
    """Rightly sealed but outside the time window: many of them mean that a clock is wrong."""
    dropped: int = 0
    """Not sent: the kernel's buffer was full, or the address is not reachable."""


class Datagrams(asyncio.DatagramProtocol):
    """One UDP socket of one node.  Bad input is counted and dropped; no state grows with it."""

    def __init__(
        self, me: NodeId, ring: KeyRing, on_datagram: OnDatagram, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.counts = DatagramCounts()
        self._me, self._ring, self._on_datagram, self._wall_clock = me, ring, on_datagram, wall_clock
        self._names = Names()
        self._transport: Any = None

    @classmethod
    async def open(cls, sock: socket.socket, me: NodeId, ring: KeyRing, on_datagram: OnDatagram) -> Datagrams:
        """Serve ``sock`` (see ``bind_pair``) until ``close``."""
        self = cls(me, ring, on_datagram)
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=sock)
        return self

    def send(self, address: tuple[str, int], message: bytes) -> bool:
        """Seal and send to an address and port; a host name is looked up in the background, and kept for a minute.

        False when it was dropped here (the first one to a name is).  Raises ``ValueError`` when ``message`` does not
        fit a datagram.
        """
        where = self._names.find(address)
        if where is None or self._transport is None or self._transport.get_write_buffer_size() > MAX_UNSENT:
            self.counts.dropped += 1
            return False
        sealed = self._ring.seal(self._me, message, self._wall_clock())
        dropped = self.counts.dropped
        try:
            self._transport.sendto(sealed, where)
        except OSError:  # error_received is told of most, and not of all
            self.counts.dropped += 1
        if self.counts.dropped != dropped:
            return False
        self.counts.sent += 1
        self.counts.sent_bytes += len(sealed)
        return True

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        self._names.close()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        try:
            sender, message = self._ring.open(data, self._wall_clock()) if len(data) <= MAX_DATAGRAM else _too_long()
        except Stale:
            self.counts.stale += 1
            return
        except PeerError:
            self.counts.garbage += 1
            return
        if sender == self._me:  # our own words, sent back to us
            self.counts.garbage += 1
            return
        self.counts.received += 1
        self.counts.received_bytes += len(data)
        self._on_datagram(sender, message, format_address(addr[0], addr[1]))

    def error_received(self, exc: Exception) -> None:
        """An earlier datagram met no listener (ICMP); gossip finds that out for itself."""
        self.counts.dropped += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None


def _too_long() -> tuple[NodeId, bytes]:
    raise PeerError("longer than a datagram of ours")
