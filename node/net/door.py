"""The peer door: one TLS server for everything that peers send here, and the only way in for joiners.

GET  /peer/stream?lane=control|tensor   frames of a link (WebSocket)
POST /peer/rpc/<verb>                   requests
GET  what ``add_get`` registers         files
POST /peer/join/start, /peer/join/finish    the only paths for who has no certificate yet
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from mesh.errors import CapacityError, MeshError, PeerError, PeerUnreachable
from mesh.types import NodeId
from node.net.calls import MAX_RPC_BYTES, Fault, encode_fault, read_bounded
from node.net.frames import Lane
from node.net.inbound import InStream, Received
from node.security import admission
from node.security.admission import Challenge, Challenges, Refused, Reply, Request, Start
from node.security.tls import PeerTls, peer_subject

HANDSHAKE_S = 5.0
FIRST_REQUEST_S = 5.0
"""A new connection that asks nothing for this long (at most twice) is closed: strangers must not fill the door."""
IDLE_S = 75.0
BODY_S = 30.0
"""For a peer to send the body of a request."""
JOIN_S = 8.0
MAX_LIVE_PER_PEER = 64
MAX_JOINS_AT_ONCE = 16

Handler = Callable[[NodeId, bytes], Awaitable[bytes]]
"""Of a verb: (sender, payload) -> answer.  A ``MeshError`` that it raises reaches the caller as that error."""
Admit = Callable[[Request], Awaitable[Reply]]
"""Decides a join, here or at a node that can.  Raises ``Refused``."""

PEER = web.RequestKey("peer", NodeId)
"""In a handler of ``add_get``: ``request[PEER]`` is who asks."""


class DoorCounts(msgspec.Struct):
    garbage: int = 0
    """Streams closed because a frame was malformed, and requests that made no sense."""
    strangers: int = 0
    """Requests without a certificate of this mesh on a path that needs one."""
    silent: int = 0
    """Connections closed because they asked for nothing."""
    revoked: int = 0
    joins: int = 0
    refused_joins: int = 0


class Door:
    """Register verbs and paths, then ``start``.  ``drop`` closes all that one node has open here."""

    def __init__(
        self,
        tls: PeerTls,
        *,
        on_frame: Callable[[Received], None],
        allowed: Callable[[NodeId], bool],
        admit: Admit,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.counts = DoorCounts()
        self._tls, self._on_frame, self._allowed, self._admit = tls, on_frame, allowed, admit
        self._wall_clock = wall_clock
        self._verbs: dict[str, Handler] = {}
        self._live: dict[NodeId, dict[int, web.Request]] = {}
        self._streams: dict[tuple[NodeId, Lane], InStream] = {}
        self._challenges = Challenges()
        self._joining = 0
        self._spoke: set[int] = set()
        self._silent: dict[int, RequestHandler] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._server: asyncio.Server | None = None
        self._app = web.Application(middlewares=[self._guard], client_max_size=MAX_RPC_BYTES)
        self._app.router.add_get("/peer/stream", self._stream)
        self._app.router.add_post("/peer/rpc/{verb}", self._rpc)
        self._app.router.add_post("/peer/join/start", self._join_start)
        self._app.router.add_post("/peer/join/finish", self._join_finish)
        logger = logging.Logger("node.net.door")
        logger.parent = logging.getLogger("node.net")
        logger.addFilter(self._is_ours)
        self._runner = web.AppRunner(
            self._app,
            access_log=None,
            logger=logger,
            shutdown_timeout=1.0,
            keepalive_timeout=IDLE_S,
            handle_signals=False,
        )

    def on_rpc(self, verb: str, handler: Handler) -> None:
        """Serve ``POST /peer/rpc/<verb>``; also while running."""
        assert verb not in self._verbs, f"{verb} is served already"
        self._verbs[verb] = handler

    def add_get(self, path: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> None:
        """Serve ``GET path`` (aiohttp's form) to members; before ``start`` only."""
        self._app.router.add_get(path, handler)

    async def start(self, sock: socket.socket) -> None:
        """Serve ``sock`` (see ``bind_pair``)."""
        await self._runner.setup()
        assert self._runner.server is not None
        self._server = await asyncio.get_running_loop().create_server(
            self._runner.server,
            sock=sock,
            ssl=self._tls.server,
            ssl_handshake_timeout=HANDSHAKE_S,
            ssl_shutdown_timeout=1.0,
        )
        self._sweep()

    def drop(self, node_id: NodeId) -> None:
        """Close every connection on which ``node_id`` has something open."""
        for request in list(self._live.get(node_id, {}).values()):
            if request.transport is not None:
                request.transport.abort()

    async def stop(self) -> None:
        """Accept nobody any more, close what is open."""
        if self._server is not None:
            self._server.close()
        for node_id in list(self._live):
            self.drop(node_id)
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._runner.cleanup()

    def _sweep(self) -> None:
        """Close who has asked for nothing in the whole time since the last sweep; then again."""
        assert self._runner.server is not None
        still_open = {id(connection): connection for connection in self._runner.server.connections}
        self._spoke &= still_open.keys()
        for key, connection in still_open.items():
            if key not in self._spoke and self._silent.get(key) is connection and connection.transport is not None:
                self.counts.silent += 1
                connection.transport.close()
        self._silent = {key: connection for key, connection in still_open.items() if key not in self._spoke}
        self._sweeper = asyncio.get_running_loop().call_later(FIRST_REQUEST_S, self._sweep)

    def _is_ours(self, record: logging.LogRecord) -> bool:
        """Log what our handlers raise; count what strangers send that is not HTTP, or their garbage fills the log."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            self.counts.garbage += 1
            return False
        return True

    # -- who is there -----------------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self._spoke.add(id(request.protocol))
        try:
            if request.path.startswith("/peer/join/"):
                return await handler(request)
            return await self._as_member(request, handler)
        except MeshError as error:
            return _answer(error)
        except web.HTTPException as error:
            return _fault(error.status, "not_found" if error.status == 404 else "bad_request", error.reason)

    async def _as_member(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        node_id = self._member(request)
        if node_id is None:
            return _fault(403, "forbidden", "a certificate of this mesh is needed: join first")
        live = self._live.setdefault(node_id, {})
        if len(live) >= MAX_LIVE_PER_PEER:
            raise CapacityError("too many requests at once from one peer")
        request[PEER] = node_id
        live[id(request)] = request
        try:
            return await handler(request)
        finally:
            del live[id(request)]
            if not live:
                del self._live[node_id]

    def _member(self, request: web.Request) -> NodeId | None:
        """The caller's id, when its verified certificate is of this mesh and it is not revoked."""
        transport = request.transport
        try:
            subject = peer_subject(transport.get_extra_info("ssl_object")) if transport is not None else None
        except PeerError:
            subject = None
        if subject is None or subject.mesh_id != self._tls.mesh_id:
            self.counts.strangers += 1
            return None
        if not self._allowed(subject.node_id):
            self.counts.revoked += 1
            return None
        return subject.node_id

    # -- members ----------------------------------------------------------------------------------------------------

    async def _rpc(self, request: web.Request) -> web.Response:
        handler = self._verbs.get(request.match_info["verb"])
        if handler is None:
            return _fault(404, "unknown_verb", f"this node does not serve {request.match_info['verb'][:40]}")
        payload = await _body(request, MAX_RPC_BYTES)
        return web.Response(body=await handler(request[PEER], payload), content_type="application/msgpack")

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        name = request.query.get("lane", "")
        if name not in ("control", "tensor"):
            raise PeerError("a stream is of lane control or tensor")
        lane: Lane = "control" if name == "control" else "tensor"
        key = (request[PEER], lane)
        stream = InStream(request[PEER], lane, self._on_frame)
        before, self._streams[key] = self._streams.get(key), stream
        if before is not None:  # its sender dialled anew: the old socket is half dead
            before.abort()
        try:
            await stream.serve(request)
        except PeerError:
            self.counts.garbage += 1
        finally:
            if self._streams.get(key) is stream:
                del self._streams[key]
        return stream.socket

    # -- joiners ----------------------------------------------------------------------------------------------------

    async def _join_start(self, request: web.Request) -> web.Response:
        try:
            start = msgspec.msgpack.decode(await _body(request, 1024), type=Start)
        except msgspec.DecodeError:
            raise PeerError("not the start of a join") from None
        if len(start.nonce) != admission.NONCE_BYTES:
            raise PeerError("not the start of a join")
        nonce = self._challenges.issue(start.nonce, self._wall_clock())
        return _packed(msgspec.msgpack.encode(Challenge(nonce)))

    async def _join_finish(self, request: web.Request) -> web.Response:
        if self._joining >= MAX_JOINS_AT_ONCE:
            return _packed(admission.encode_answer(Refused("unavailable", "too many joins at once: try again")))
        self._joining += 1
        try:
            answer: Reply | Refused = await self._finish(await _body(request, admission.MAX_REQUEST_BYTES))
            self.counts.joins += 1
        except Refused as refused:
            self.counts.refused_joins += 1
            answer = refused
        finally:
            self._joining -= 1
        return _packed(admission.encode_answer(answer))

    async def _finish(self, raw: bytes) -> Reply:
        request = admission.decode_request(raw)
        claim = admission.decode_claim(request)
        self._challenges.check(claim, self._wall_clock())
        try:
            async with asyncio.timeout(JOIN_S):
                reply = await self._admit(request)
        except (TimeoutError, PeerUnreachable, CapacityError):
            raise Refused("unavailable") from None
        self._challenges.spend(claim, self._wall_clock())
        return reply


def admit_verb(admit: Admit) -> Handler:
    """The verb by which a member passes on a join to one that can decide it; ask with ``ask_admit``."""

    async def handler(_: NodeId, payload: bytes) -> bytes:
        try:
            return admission.encode_answer(await admit(admission.decode_request(payload)))
        except Refused as refused:
            return admission.encode_answer(refused)

    return handler


async def _body(request: web.Request, limit: int) -> bytes:
    try:
        async with asyncio.timeout(BODY_S):
            return await read_bounded(request.content, limit)
    except TimeoutError:
        raise PeerError("the body did not come in time") from None


def _packed(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/msgpack")


def _answer(error: MeshError) -> web.Response:
    status = 400 if isinstance(error, PeerError) else error.status
    return web.Response(status=status, body=encode_fault(error), content_type="application/json")


def _fault(status: int, code: str, message: str) -> web.Response:
    body = msgspec.json.encode(Fault(code, message))
    return web.Response(status=status, body=body, content_type="application/json")
