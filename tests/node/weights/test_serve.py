"""``GET /peer/files`` over real HTTP: ranges, what is refused, and a fetch end to end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from mesh.errors import PeerError, PeerUnreachable
from mesh.types import LayerSpan
from node.weights.keeper import Weights
from node.weights.serve import FILE_PATH, HAVE_PATH, DoorFiles, FileServer, Get
from tests.node.weights.conftest import LocalPeers, llama_tensors, needed


def door(weights: Weights) -> web.Application:
    server, app = FileServer(weights.store), web.Application()
    app.router.add_get(HAVE_PATH, server.have)
    app.router.add_get(FILE_PATH, server.file)
    return app


def get_from(doors: Mapping[str, TestClient]) -> Get:
    @asynccontextmanager
    async def get(peer: str, path: str, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        async with doors[peer].get(path, headers=dict(headers)) as response:
            if response.status >= 400:
                raise PeerUnreachable(f"{response.status} {response.reason}")
            yield response

    return get


@pytest.fixture
async def owner(tmp_path: Path, llama: Path) -> AsyncIterator[tuple[Weights, TestClient, str]]:
    weights = Weights(tmp_path / "owner", LocalPeers(), needed, lambda peer, why: None)
    info = (await weights.offer(llama, "tiny", "float32")).info
    async with TestClient(TestServer(door(weights))) as client:
        yield weights, client, info.manifest


async def test_whole_files_ranges_and_the_manifest(owner: tuple[Weights, TestClient, str], llama: Path) -> None:
    weights, client, manifest = owner
    data = (llama / "model.safetensors").read_bytes()
    async with client.get(f"/peer/files/{manifest}/model.safetensors", headers={"Range": "bytes=10-99"}) as response:
        assert response.status == 206
        assert await response.read() == data[10:100]
    async with client.get(f"/peer/files/{manifest}/config.json") as response:
        assert await response.read() == (llama / "config.json").read_bytes()
    async with client.get(f"/peer/files/{manifest}/manifest.json") as response:
        found = weights.store.find(manifest)
        assert found is not None
        assert await response.read() == found.manifest.encode()
    async with client.get(f"/peer/files/{manifest}") as response:
        assert await response.json() == {"whole": True, "tensors": []}


@pytest.mark.parametrize(
    "path",
    [
        "/peer/files/{m}/modeling_evil.py",
        "/peer/files/{m}/..%2f..%2fetc%2fpasswd",
        "/peer/files/{m}/%2e%2e/config.json",
        "/peer/files/{m}/verified",
        "/peer/files/../llama/config.json",
        "/peer/files/%2e%2e/config.json",
        "/peer/files/" + "0" * 64 + "/config.json",
        "/peer/files/nonsense",
    ],
)
async def test_names_outside_the_manifest_are_refused(owner: tuple[Weights, TestClient, str], path: str) -> None:
    from yarl import URL

    _, client, manifest = owner
    async with client.get(URL(path.format(m=manifest), encoded=True)) as response:
        assert response.status == 404


async def test_a_part_is_served_where_it_is_filled_and_nowhere_else(
    owner: tuple[Weights, TestClient, str], tmp_path: Path, llama: Path
) -> None:
    weights, client, manifest = owner
    part = Weights(tmp_path / "part", DoorFiles(get_from({"owner": client})), needed, lambda peer, why: None)
    info = (await weights.offer(llama, "tiny", "float32")).info
    await part.bring(info, LayerSpan("tiny", 1, 2), ["owner"])
    file, here = _tensor(part, manifest, "model.layers.1.mlp.down_proj.weight")
    _, absent = _tensor(part, manifest, "model.layers.3.mlp.down_proj.weight")
    data = (llama / file).read_bytes()
    async with TestClient(TestServer(door(part))) as served:
        path = f"/peer/files/{manifest}/{file}"
        async with served.get(path, headers={"Range": f"bytes={here[0]}-{here[1] - 1}"}) as response:
            assert response.status == 206
            assert await response.read() == data[here[0] : here[1]]
        for bad in (f"bytes={absent[0]}-{absent[1] - 1}", f"bytes={here[0]}-", "bytes=-5", "bytes=9-2", "lines=1-2"):
            async with served.get(path, headers={"Range": bad}) as response:
                assert response.status == 416, bad
        async with served.get(path) as response:
            assert response.status == 416
        async with served.get(f"/peer/files/{manifest}") as response:
            told = await response.json()
            assert told["whole"] is False
            assert sorted(told["tensors"]) == needed(llama, sorted(llama_tensors()), 1, 2)


def _tensor(weights: Weights, manifest: str, name: str) -> tuple[str, tuple[int, int]]:
    files = weights.store.find(manifest)
    assert files is not None
    file, tensor = files.manifest.tensors()[name]
    return file.name, (tensor.begin, tensor.end)


async def test_answers_that_are_too_long_or_no_answer_at_all() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=b"x" * 100)

    app = web.Application()
    app.router.add_get("/{tail:.*}", handler)
    async with TestClient(TestServer(app)) as client:
        files = DoorFiles(get_from({"p": client}))
        with pytest.raises(PeerError, match="more than 50 bytes"):
            await files.fetch_range("p", "0" * 64, "config.json", 0, 50)
        with pytest.raises(PeerError, match="something else"):
            await files.have("p", "0" * 64)
