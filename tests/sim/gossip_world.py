"""Worlds of membership cores: trivial signatures, the real codec, seeds that everyone knows."""

from __future__ import annotations

import hashlib
from typing import Any

from gossip.config import GossipConfig
from gossip.members import Member
from gossip.messages import DATAGRAM_CODEC, STREAM, STREAM_CODEC, SavedIncarnation, State
from gossip.roster import Identity
from gossip.swim import Swim
from mesh.types import MeshId, NodeId
from tests.sim.world import NetParams, World

MESH = MeshId("m" * 32)


def node_id(index: int) -> NodeId:
    """Of the same shape as real ones."""
    return NodeId(hashlib.sha256(f"node {index}".encode()).hexdigest()[:32])


def identity(node: NodeId, mesh: MeshId = MESH) -> Identity:
    """Signs by hashing with its own name: as good as a signature among those who do not cheat."""

    def proof(name: str, message: bytes) -> bytes:
        return hashlib.blake2b(message, key=name.encode(), digest_size=64).digest()

    def verify(name: NodeId, key: bytes, message: bytes, signature: bytes) -> bool:
        return key == name.encode() and signature == proof(name, message)

    return Identity(node, mesh, node.encode(), lambda message: proof(node, message), verify)


class WireCodec:
    """Each message through the codec that the driver would choose; remembers how many bytes went by stream."""

    def encode(self, message: Any) -> bytes:
        stream = type(message) in STREAM
        codec: Any = STREAM_CODEC if stream else DATAGRAM_CODEC
        return (b"s" if stream else b"d") + bytes(codec.encode(message))

    def decode(self, data: bytes) -> Any:
        codec: Any = STREAM_CODEC if data[:1] == b"s" else DATAGRAM_CODEC
        return codec.decode(data[1:])


def gossip_world(
    n: int,
    seed: int,
    config: GossipConfig | None = None,
    net: NetParams | None = None,
    *,
    codec: bool = True,
    swim: type[Swim] = Swim,
    stagger_s: float = 0.05,
    seeds: int = 3,
) -> World:
    """``n`` nodes that join through the first ``seeds``, ``stagger_s`` apart."""
    config = config or GossipConfig()
    world = World(seed, net, codec=WireCodec() if codec else None, reliable=lambda message: type(message) in STREAM)
    ids = [node_id(index) for index in range(n)]
    for index in range(n):
        world.at(index * stagger_s, lambda index=index: add_node(world, ids, index, config, swim, seeds))
    return world


def warm_world(
    n: int,
    seed: int,
    config: GossipConfig | None = None,
    net: NetParams | None = None,
    *,
    codec: bool = True,
    swim: type[Swim] = Swim,
) -> World:
    """``n`` nodes that have known each other for a while: joining costs n x n messages, this only n x n rows."""
    world = gossip_world(n, seed, config, net, codec=codec, swim=swim, stagger_s=0.0, seeds=0)
    world.run(0.0)
    records = [node.core.roster.own.record for node in world.nodes.values()]
    for node in world.nodes.values():
        members, clock = node.core.roster.members, node.clock(world.now)
        for record in records:
            if record.node != node.id:
                member = Member(record, State.ALIVE, clock)
                members.put(member)
                members.track(member, was_present=False)
        node.core.roster.news.drop(node.id)
    return world


def add_node(
    world: World,
    ids: list[NodeId],
    index: int,
    config: GossipConfig,
    swim: type[Swim] = Swim,
    known: int = 3,
    mesh: MeshId = MESH,
) -> None:
    node = ids[index]
    seeds = [(other, f"{other[:6]}:1") for other in ids[:known] if other != node]

    def make(disk: list[Any], now: float) -> Swim:
        saved = [record.incarnation for record in disk if isinstance(record, SavedIncarnation)]
        life = world.nodes[node].life if node in world.nodes else 1
        incarnation = max(max(saved, default=0) + 1, int(1e9 + world.now * 1000))
        return swim(identity(node, mesh), f"{node[:6]}:{life}", incarnation, config, world.rng_for(f"{node}/{life}"))

    world.add(
        node,
        make=make,
        start=lambda core, now: core.join(seeds if index or world.now > 1.0 else [], now),
        on_reset=lambda core, peer, now: core.note_connection_lost(peer, now),
    )


def views_agree(world: World) -> bool:
    """Every live node holds exactly the live nodes alive, at equal incarnations."""
    live = [node for node in world.nodes.values() if node.up]
    truth = {node.id: node.core.incarnation for node in live}
    return all(
        truth == {info.node: info.incarnation for info in node.core.members() if info.state == "alive"} for node in live
    )
