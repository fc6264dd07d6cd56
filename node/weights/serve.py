"""The two ends of ``GET /peer/files``: serving what is verified here, and reading from a peer's door.

    GET /peer/files/{manifest}          what this node has: {"whole": bool, "tensors": [names]}
    GET /peer/files/{manifest}/{name}   a file of the model, with Range; ``manifest.json`` is the manifest itself

Names outside the manifest, and ranges that are not filled here, are refused: no path from a peer touches the disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

import aiohttp
import msgspec
from aiohttp import web

from mesh.errors import PeerError, PeerUnreachable
from mesh.types import NodeId
from node.weights.fetch import PIECE_BYTES, Have
from node.weights.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES
from node.weights.store import Files, Store

HAVE_PATH = "/peer/files/{manifest}"
FILE_PATH = "/peer/files/{manifest}/{name}"

Get = Callable[[NodeId, str, Mapping[str, str]], AbstractAsyncContextManager[aiohttp.ClientResponse]]
"""(peer, path, headers) -> the response, as ``Links.get`` gives it: raises ``MeshError`` for 400 and above."""


class FileServer:
    """The handlers of both paths, for the peer door."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def have(self, request: web.Request) -> web.Response:
        files = await self._find(request)
        here = Have(True) if files.whole else Have(False, files.have())
        return web.Response(body=msgspec.json.encode(here), content_type="application/json")

    async def file(self, request: web.Request) -> web.StreamResponse:
        files, name = await self._find(request), request.match_info["name"]
        if name == MANIFEST_NAME:
            return web.Response(body=files.manifest.encode(), content_type="application/json")
        size = files.sizes.get(name)
        if size is None:
            raise web.HTTPNotFound(reason="the model has no such file")
        begin, end = _bounds(request, size)
        if not files.readable(name, begin, end):
            raise web.HTTPRequestRangeNotSatisfiable(reason="this range is not held here")
        return web.FileResponse(files.folder / name, chunk_size=256 * 1024)

    async def _find(self, request: web.Request) -> Files:
        manifest_id = request.match_info["manifest"]
        files = self._store.known(manifest_id) or await asyncio.to_thread(self._store.find, manifest_id)
        if files is None:
            raise web.HTTPNotFound(reason="this node has nothing of that model")
        return files


def _bounds(request: web.Request, size: int) -> tuple[int, int]:
    """The range asked for; the whole file without one.  Only what ``FileResponse`` will answer with the same bytes."""
    try:
        asked = request.http_range
    except ValueError:
        raise web.HTTPRequestRangeNotSatisfiable(reason="malformed Range") from None
    begin = 0 if asked.start is None else asked.start
    end = size if asked.stop is None else asked.stop
    if begin < 0:
        begin, end = max(0, size + begin), size
    return begin, min(end, size)


class DoorFiles:
    """``PeerFiles`` over the peers' doors."""

    def __init__(self, get: Get) -> None:
        self._get = get

    async def have(self, peer: NodeId, manifest_id: str) -> Have:
        async with self._get(peer, HAVE_PATH.format(manifest=manifest_id), {}) as response:
            raw = await _read(response, MAX_MANIFEST_BYTES)
        try:
            return msgspec.json.decode(raw, type=Have)
        except msgspec.MsgspecError as error:
            raise PeerError(f"{peer[:8]} answered something else than what it has: {error}") from None

    async def fetch_range(self, peer: NodeId, manifest_id: str, name: str, start: int, end: int | None) -> bytes:
        headers = {"Accept-Encoding": "identity"}
        if end is not None:
            headers["Range"] = f"bytes={start}-{end - 1}"
        async with self._get(peer, FILE_PATH.format(manifest=manifest_id, name=name), headers) as response:
            return await _read(response, MAX_MANIFEST_BYTES if end is None else min(end - start, PIECE_BYTES))


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, never more than ``limit`` bytes of it."""
    parts, size = [], 0
    try:
        async for part in response.content.iter_chunked(1024 * 1024):
            size += len(part)
            if size > limit:
                raise PeerError(f"a body of more than {limit} bytes came back")
            parts.append(part)
    except aiohttp.ClientError as error:
        raise PeerUnreachable(f"the transfer broke off after {size} bytes: {error}") from error
    return b"".join(parts)
