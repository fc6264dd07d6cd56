"""The node among its peers: sockets, links, and the drivers of gossip and election over them.

Everything that comes from another node enters here, is authenticated and decoded, and goes to the core it is for.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp
import msgspec

from gossip import messages as gossip_messages
from gossip.config import GossipConfig
from gossip.roster import Identity as GossipIdentity
from gossip.swim import Swim
from mesh.election import durable as durables
from mesh.election import messages as election_messages
from mesh.election.config import ElectionConfig
from mesh.election.durable import Durable
from mesh.election.election import Election
from mesh.errors import ConfigError, PeerError, PeerUnreachable
from mesh.types import NodeId
from mesh.wire import Codec
from node.driver import Driver
from node.folder import DataFolder
from node.identity import KEY_BYTES, Identity, verifier, verify
from node.journal import Journal, until_stored
from node.mail import KIND as PIPELINE
from node.net.address import parse_address
from node.net.datagram import Datagrams
from node.net.door import Door
from node.net.frames import MAX_MESSAGE
from node.net.inbound import Received
from node.net.links import LinkEvents, Links
from node.security.admission import Reply, Request
from node.security.keyring import KeyRing
from node.security.tls import PeerTls
from node.telemetry import get_logger

GOSSIP, ELECTION = "gossip", "election"
ELECTION_CODEC: Codec[Any] = Codec(election_messages.Message, MAX_MESSAGE)


class PeerEvents(msgspec.Struct, frozen=True):
    """What the peers' side tells the composition root, on the loop."""

    on_gossip: Callable[[Any], None]
    on_election: Callable[[Any], None]
    on_pipeline: Callable[[Received], None]
    """Gives the frame's credit back when it can take more.  Raises ``PeerError`` for a frame that is none."""
    on_lost: Callable[[NodeId], None]
    """A link broke and could not be made again."""
    allowed: Callable[[NodeId], bool]
    admit: Callable[[Request], Coroutine[Any, Any, Reply]]


class Peers:
    """Two cores, their drivers, and the four ways bytes travel: datagrams, control and tensor frames, requests."""

    def __init__(
        self,
        *,
        identity: Identity,
        tls: PeerTls,
        ring: KeyRing,
        folder: DataFolder,
        durable: Durable,
        address: str,
        gossip: GossipConfig,
        election: ElectionConfig,
        events: PeerEvents,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self.me = identity.node_id
        self.rejected = 0
        self._events, self._folder = events, folder
        self._log = get_logger("peers")
        rng = random.Random()
        self.swim = Swim(_gossip_identity(identity, durable), address, folder.next_incarnation(), gossip, rng)
        self.gossip = Driver(
            self.swim, send=self._send_gossip, on_event=events.on_gossip, persist=self._persist_incarnation
        )
        self.core = Election(
            durable,
            election,
            rng,
            time.monotonic(),
            sign=identity.signer("election"),
            verify=verifier("election"),
        )
        self.election = Driver(
            self.core, send=self._send_election, on_event=events.on_election, persist=self._persist_election
        )
        self._journal: Journal = folder.election_journal()
        self.door = Door(tls, on_frame=self._on_frame, allowed=events.allowed, admit=events.admit)
        self.links = Links(tls, LinkEvents(on_lost=self._on_lost, on_unreachable=self._on_unreachable), spawn, rng)
        self._ring = ring
        self._udp: Datagrams | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self, tcp: socket.socket, udp: socket.socket) -> None:
        """Serve the sockets (``node.net.address.bind_pair``)."""
        self._udp = await Datagrams.open(udp, self.me, self._ring, self._on_datagram)
        await self.door.start(tcp)

    async def stop(self) -> None:
        """Send what waits, close everything."""
        await self.links.close()
        await self.door.stop()
        if self._udp is not None:
            self._udp.close()

    # -- sending -------------------------------------------------------------------------------------------------------

    def send_pipeline(self, to: NodeId, message: bytes, body: bytes) -> bool:
        return self._send_frame(to, PIPELINE, message, body)

    async def request(self, to: NodeId, verb: str, payload: bytes, timeout_s: float) -> bytes:
        """Ask ``to``; raises ``PeerUnreachable`` where it cannot be reached, else the error that it answered."""
        return await self.links.request(to, self.address_of(to), verb, payload, timeout_s)

    def get(
        self, peer: NodeId, path: str, headers: Mapping[str, str], *, lasting: bool = False
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """``GET`` a path of ``peer``'s door (see ``Links.get``)."""
        return self.links.get(peer, self.address_of(peer), path, headers, lasting=lasting)

    def address_of(self, node: NodeId) -> str:
        """host:port of ``node``'s peer door.  Raises ``PeerUnreachable`` when gossip knows none."""
        address = self.swim.address_of(node)
        if not address:
            raise PeerUnreachable(f"the address of node {node[:8]} is not known")
        return address

    def _send_frame(self, to: NodeId, kind: str, message: bytes, body: bytes = b"", droppable: bool = False) -> bool:
        address = self.swim.address_of(to)
        return bool(address) and self.links.send(to, str(address), kind, message, body, droppable=droppable)

    def _send_gossip(self, to: NodeId, message: Any) -> None:
        if isinstance(message, gossip_messages.STREAM):
            self._send_frame(to, GOSSIP, gossip_messages.STREAM_CODEC.encode(message), droppable=True)
            return
        try:
            address = parse_address(self.swim.address_of(to) or "")
        except ConfigError:  # a member says its own address, and may say nonsense
            return
        if self._udp is not None:
            self._udp.send(address, gossip_messages.DATAGRAM_CODEC.encode(message))

    def _send_election(self, to: NodeId, message: Any) -> None:
        self._send_frame(to, ELECTION, ELECTION_CODEC.encode(message))

    # -- receiving -----------------------------------------------------------------------------------------------------

    def _on_datagram(self, sender: NodeId, message: bytes, address: str) -> None:
        try:
            if self._events.allowed(sender):
                self.gossip.receive(gossip_messages.DATAGRAM_CODEC.decode(message), sender)
        except PeerError as error:
            self.reject(sender, str(error))

    def _on_frame(self, frame: Received) -> None:
        """Raises ``PeerError`` for a frame that no honest peer sends; its stream is closed then."""
        try:
            if frame.kind == PIPELINE:
                self._events.on_pipeline(frame)
            elif frame.kind == GOSSIP:
                self.gossip.receive(gossip_messages.STREAM_CODEC.decode(frame.message), frame.sender)
            elif frame.kind == ELECTION:
                self.election.receive(ELECTION_CODEC.decode(frame.message), frame.sender)
            else:
                raise PeerError(f"frames of kind {frame.kind!r} are not known here")
        except PeerError as error:
            self.reject(frame.sender, str(error))
            raise

    def reject(self, sender: NodeId, why: str) -> None:
        """Count and note what a peer did wrong."""
        self.rejected += 1
        self._log.warning("rejected", sender=sender[:8], why=why)

    def _on_lost(self, node: NodeId) -> None:
        """R8: an established link broke and could not be made again."""
        self.election.cast(lambda core, now: core.note_lost(node, now))
        self._on_unreachable(node, "the link broke")

    def _on_unreachable(self, node: NodeId, why: str) -> None:
        """It cannot be dialled from here: no news for the election, but sessions must not wait for it."""
        self._log.debug("unreachable", node=node[:8], why=why)
        self.gossip.cast(lambda core, now: core.note_connection_lost(node, now))
        self._events.on_lost(node)

    # -- durable -------------------------------------------------------------------------------------------------------

    async def _persist_election(self, record: Durable) -> None:
        """Nothing is voted for or said before it is written; what else the node does goes on meanwhile."""
        data = durables.encode(record)
        await until_stored(lambda: self._journal.store(data), self._refused_by_disk)

    async def _persist_incarnation(self, record: gossip_messages.SavedIncarnation) -> None:
        """Not waited for, since others would take this node for dead: the next life begins at the clock's anyway."""
        try:
            await asyncio.to_thread(self._folder.keep_incarnation, record.incarnation)
        except OSError as error:
            self._refused_by_disk(error)

    def _refused_by_disk(self, error: OSError) -> None:
        self._log.warning("the disk refuses: this node does not vote until it can write", why=str(error))


def _gossip_identity(identity: Identity, durable: Durable) -> GossipIdentity:
    purpose = "gossip"
    return GossipIdentity(
        node=identity.node_id,
        mesh_id=durable.mesh_id,
        key=identity.public_key,
        sign=lambda message: identity.sign(purpose, message)[KEY_BYTES:],
        verify=lambda node, key, message, signature: verify(node, purpose, message, key + signature),
    )
