"""Members of a mesh on loopback: real certificates, real sockets, ephemeral ports."""

import asyncio
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from mesh.election.record import Content
from mesh.types import MeshId, NodeId
from node.identity import Identity
from node.net.address import bind_pair
from node.net.door import Admit, Door
from node.net.inbound import Received
from node.net.links import LinkEvents, Links
from node.security.admission import Office, Reply, Request, SeedMember, found_membership
from node.security.ca import Authority
from node.security.keyring import new_gossip_key
from node.security.membership import Membership
from node.security.tls import PeerTls

MESH = MeshId("0123456789abcdef0123456789abcdef")


class Registrar:
    """What the composition root does for joins, without an election: commits into a variable."""

    def __init__(self, mesh_id: MeshId = MESH) -> None:
        self.authority = Authority.found(mesh_id, time.time())
        self.office = Office(mesh_id)
        self.content = Content(ca_certificate=self.authority.der, gossip_keys=(new_gossip_key(),))
        self.address = ""
        self.now: Callable[[], float] = time.time

    async def admit(self, request: Request) -> Reply:
        verdict = self.office.judge(request, self.content, self.now())
        if verdict.content is not None:
            self.content = verdict.content
        leaf = self.office.sign(verdict, self.authority, self.now())
        seed = SeedMember(NodeId("ab" * 16), self.address, b"signed member record")
        return Reply(leaf, (self.authority.der,), self.office.mesh_id, self.content.gossip_keys, (seed,), b"record")


class Member:
    """One node's door and links; received frames are in ``frames`` and finished at once unless ``hold``."""

    def __init__(self, folder: Path, registrar: Registrar, membership: Membership, identity: Identity) -> None:
        self.identity, self.id, self.membership = identity, identity.node_id, membership
        pem = folder / f"{self.id}.pem"
        pem.write_bytes(membership.to_pem())
        self.tls = PeerTls(pem, membership)
        self.registrar = registrar
        self.frames: asyncio.Queue[tuple[NodeId, str, bytes, bytes]] = asyncio.Queue()
        self.held: list[Received] = []
        self.hold = False
        self.revoked: set[NodeId] = set()
        self.up: asyncio.Queue[NodeId] = asyncio.Queue()
        self.lost: asyncio.Queue[NodeId] = asyncio.Queue()
        self.unreachable: asyncio.Queue[tuple[NodeId, str]] = asyncio.Queue()
        self.door = self.new_door(registrar.admit)
        self.address = ""

    def new_door(self, admit: Admit) -> Door:
        return Door(self.tls, on_frame=self._receive, allowed=lambda node: node not in self.revoked, admit=admit)

    async def start(self, port: int = 0) -> "Member":
        tcp, udp = bind_pair("127.0.0.1", port)
        udp.close()
        await self.serve(tcp)
        events = LinkEvents(
            self.up.put_nowait, self.lost.put_nowait, lambda node, why: self.unreachable.put_nowait((node, why))
        )
        self.links = Links(self.tls, events, asyncio.create_task, random.Random(1))
        return self

    async def serve(self, tcp: socket.socket) -> None:
        self.address = f"127.0.0.1:{tcp.getsockname()[1]}"
        await self.door.start(tcp)

    async def stop(self) -> None:
        await self.links.close()
        await self.door.stop()

    def _receive(self, frame: Received) -> None:
        self.frames.put_nowait((frame.sender, frame.kind, frame.message, bytes(frame.body)))
        if self.hold:
            self.held.append(frame)
        else:
            frame.done()

    def send(
        self, to: "Member", kind: str, message: bytes = b"", body: bytes = b"", *, droppable: bool = False
    ) -> bool:
        return self.links.send(to.id, to.address, kind, message, body, droppable=droppable)


class Town:
    """Makes members; ``stop`` ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.registrar = folder, Registrar()
        self.members: list[Member] = []

    async def member(self, registrar: Registrar | None = None) -> Member:
        registrar = registrar or self.registrar
        identity = Identity.generate()
        membership = found_membership(identity, registrar.authority, (), time.time())
        member = await Member(self.folder, registrar, membership, identity).start()
        registrar.address = registrar.address or member.address
        self.members.append(member)
        return member

    async def stop(self) -> None:
        for member in self.members:
            await member.stop()


@pytest.fixture(autouse=True)
def _limit() -> Iterator[None]:
    """No test here may hang: what is awaited is an event that must come."""

    def late(*_: object) -> None:
        raise TimeoutError("the event that this test waits for did not come")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(15)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    town = Town(tmp_path)
    yield town
    await town.stop()


def with_content(registrar: Registrar, **changes: object) -> None:
    registrar.content = msgspec.structs.replace(registrar.content, **changes)
