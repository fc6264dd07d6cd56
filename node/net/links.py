"""Links: what this node sends to others.  One-way: A dials B's door for what A sends to B."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from mesh.errors import PeerUnreachable
from mesh.types import NodeId
from node.net.calls import MAX_RPC_BYTES, fault, new_session, post, read_bounded, unreachable
from node.net.frames import Buffer, Lane, encode
from node.net.stream import CLOSE_S, OutLane, Pending, bounded
from node.security.ca import node_name
from node.security.tls import PeerTls

DIAL_S = 3.0
"""For TCP, TLS and the WebSocket handshake together."""
SILENT_S = 5.0
"""When the peer's system acknowledged nothing of what was sent for so long, the connection is dialled anew.
Left alone, TCP tries again after ever longer pauses, and is deaf for as long again once the network has healed."""
MAX_ERROR_BYTES = 64 * 1024

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


def _ignore(*_: object) -> None:
    """The default of every callback."""


class LinkEvents(msgspec.Struct, frozen=True):
    """What the links tell their owner, on the event loop."""

    on_up: Callable[[NodeId], None] = _ignore
    """A connection stands.  Also after one that broke was mended: frames on their way may have been lost."""
    on_lost: Callable[[NodeId], None] = _ignore
    """An established connection broke and the immediate reconnect failed (R8), or the peer does not keep up.  What
    waited for it was dropped.  Once until it is up again."""
    on_unreachable: Callable[[NodeId, str], None] = _ignore
    """A first dial failed, with why; what waited was dropped.  For each try."""


class LinkCounts(msgspec.Struct):
    sent_frames: int = 0
    sent_bytes: int = 0
    refused_frames: int = 0
    lost_links: int = 0


class Links:
    """All links of one node.  ``send`` never blocks and never waits for the network."""

    def __init__(self, tls: PeerTls, events: LinkEvents, spawn: Spawn, rng: random.Random) -> None:
        """``spawn`` starts a task in the node's TaskGroup, so that a bug in a link stops the node."""
        self.counts = LinkCounts()
        self._tls, self._events, self._spawn, self._rng = tls, events, spawn, rng
        self._links: dict[NodeId, _Link] = {}
        self._session = new_session()
        self._streams = new_session(per_host=0)
        """For responses that last: they must not keep requests waiting.  The peer's door bounds their number."""

    def send(
        self, to: NodeId, address: str, kind: str, message: bytes, body: Buffer = b"", *, droppable: bool = False
    ) -> bool:
        """Queue a frame for ``to``; frames with a body go by the tensor lane, and wait for the receiver's credit.

        False when nothing was queued because the queue is full.  The rule of the full queue: the oldest ``droppable``
        frames (gossip) give way; where there is none the link is reset and ``on_lost`` follows, since a session that
        misses a frame must be recovered anyhow.  True promises nothing about arrival.
        """
        data, size = encode(kind, message, body), memoryview(body).nbytes
        link = self._links.get(to)
        if link is None:
            link = self._links[to] = _Link(to, self._tls, self._session, self._events, self._spawn, self._rng)
        link.address = address
        if not link.lane("tensor" if size else "control").offer(Pending(data, size, droppable)):
            self.counts.refused_frames += 1
            if not droppable:
                self._reset(to)
            return False
        self.counts.sent_frames += 1
        self.counts.sent_bytes += len(data)
        return True

    async def request(
        self, to: NodeId, address: str, verb: str, payload: bytes, timeout_s: float, limit: int = MAX_RPC_BYTES
    ) -> bytes:
        """The answer of ``to``'s handler of ``verb``; ``timeout_s`` in seconds, ``limit`` in bytes of the answer.

        Raises ``PeerUnreachable`` when there was none, the handler's own error by its code (``CapacityError``,
        ``StalePlacement``, ``NoRoute``, ``SessionLost``, ``RequestError``), ``PeerError`` for anything else.
        """
        return await post(
            *(self._session, address, f"/peer/rpc/{verb}", payload),
            context=self._tls.client,
            server_name=node_name(self._tls.mesh_id, to),
            timeout_s=timeout_s,
            limit=limit,
        )

    @asynccontextmanager
    async def get(
        self,
        to: NodeId,
        address: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
        *,
        lasting: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """``GET`` on ``to``'s door, for what ``Door.add_get`` serves; the caller reads the body, under its own limits.

        ``timeout_s`` is until the headers are here.  Raises as ``request`` does for a status of 400 or above.
        ``lasting``: the body is a stream that goes on for as long as a session does.
        """
        session = self._streams if lasting else self._session
        try:
            async with asyncio.timeout(timeout_s):
                response = await session.get(
                    f"https://{address}{path}",
                    ssl=self._tls.client,
                    server_hostname=node_name(self._tls.mesh_id, to),
                    headers=headers,
                    allow_redirects=False,
                )
                if response.status >= 400:
                    async with response:
                        raise fault(response.status, await read_bounded(response.content, MAX_ERROR_BYTES))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise unreachable(address, error) from error
        async with response:
            yield response

    def connected(self, node_id: NodeId) -> bool:
        """Whether a connection to it stands now."""
        link = self._links.get(node_id)
        return link is not None and any(lane.connected for lane in link.lanes.values())

    def drop(self, node_id: NodeId) -> None:
        """Close what leads to ``node_id`` and forget what waits; no callback follows."""
        link = self._links.pop(node_id, None)
        if link is not None:
            link.cancel()

    async def close(self) -> None:
        """Send what waits for at most half a second, then close everything."""
        lanes = [lane.flushed.wait() for link in self._links.values() for lane in link.lanes.values()]
        if lanes:
            await bounded(asyncio.gather(*lanes), CLOSE_S)
        tasks = [task for link in self._links.values() for task in link.cancel()]
        self._links.clear()
        if tasks:
            await asyncio.wait(tasks, timeout=2 * CLOSE_S)
        await self._session.close()
        await self._streams.close()

    def _reset(self, node_id: NodeId) -> None:
        self.drop(node_id)
        self.counts.lost_links += 1
        # Not from inside ``send``: the owner of the callback may be half-way through its own state.
        asyncio.get_running_loop().call_soon(self._events.on_lost, node_id)


def _bound_silence(connection: socket.socket | None) -> None:
    """Where the system has such an option (Linux); elsewhere its own time-outs hold."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None and connection is not None:
        connection.setsockopt(socket.IPPROTO_TCP, option, int(SILENT_S * 1000))


class _Link:
    """The two lanes to one peer, and what is known of it (a ``LaneOwner``)."""

    def __init__(
        self,
        to: NodeId,
        tls: PeerTls,
        session: aiohttp.ClientSession,
        events: LinkEvents,
        spawn: Spawn,
        rng: random.Random,
    ) -> None:
        self.to, self.address = to, ""
        self.lanes: dict[Lane, OutLane] = {}
        self.up = False
        self._tls, self._events, self._spawn, self._rng = tls, events, spawn, rng
        self._tasks: list[asyncio.Task[None]] = []
        self._session = session

    def lane(self, lane: Lane) -> OutLane:
        """The lane, running."""
        if lane not in self.lanes:
            self.lanes[lane] = OutLane(lane, self, self._rng)
            self._tasks.append(self._spawn(self.lanes[lane].run()))
        return self.lanes[lane]

    def cancel(self) -> list[asyncio.Task[None]]:
        """Stop the lanes; their tasks, to wait for."""
        for task in self._tasks:
            task.cancel()
        return self._tasks

    async def dial(self, lane: Lane) -> aiohttp.ClientWebSocketResponse:
        try:
            async with asyncio.timeout(DIAL_S):
                connection = await self._session.ws_connect(
                    f"https://{self.address}/peer/stream?lane={lane}",
                    ssl=self._tls.client,
                    server_hostname=node_name(self._tls.mesh_id, self.to),
                    compress=0,
                    max_msg_size=1024,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
                )
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise unreachable(self.address, error) from error
        _bound_silence(connection.get_extra_info("socket"))
        return connection

    def lane_up(self, *, mended: bool) -> None:
        told, self.up = self.up, True
        if mended or not told:
            self._events.on_up(self.to)

    def lane_lost(self) -> None:
        if self.up:
            self.up = False
            self._events.on_lost(self.to)

    def lane_unreachable(self, error: PeerUnreachable) -> None:
        self._events.on_unreachable(self.to, str(error))
