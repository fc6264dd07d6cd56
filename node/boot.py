"""How a node comes to be a member: it founds a mesh, joins one by a token, or returns with its data folder."""

from __future__ import annotations

import asyncio
import random
import secrets
import time

import msgspec

from mesh.election import durable as durables
from mesh.election.durable import Durable
from mesh.election.record import Content, Record
from mesh.errors import ConfigError, MeshError
from mesh.types import MeshId, NodeId
from node.folder import DataFolder, refuse_other_mesh
from node.identity import Identity
from node.journal import read_or_none, write_durably
from node.net.join import Joined, join, rejoin
from node.security.ca import Authority, make_csr, new_leaf_key
from node.security.keyring import new_gossip_key
from node.security.membership import Membership
from node.security.token import JoinToken
from node.telemetry import get_logger

PEERS_FILE = "peers"
RETURN_S = 5.0
"""A returning node with an old certificate, or with a token, asks for a new certificate for so long."""


class Boot(msgspec.Struct, frozen=True):
    """What a node starts with."""

    identity: Identity
    membership: Membership
    durable: Durable
    seeds: tuple[tuple[NodeId, str], ...]
    """Members to gossip with first: (id, address); none for a founder."""
    founded: bool = False


async def boot(folder: DataFolder, token_text: str, hosts: tuple[str, ...], address: str = "") -> Boot:
    """Found, join or return.  ``address``: this node's own, which the token may name as well.

    Raises ``ConfigError`` in one line that says what is wrong and what to do.
    """
    identity, membership = folder.identity(), folder.membership()
    token = JoinToken.decode(token_text) if token_text else None
    if membership is not None:
        if token is not None:
            refuse_other_mesh(folder, membership, token.mesh_id)
        seeds = tuple(seed for seed in token.seeds if seed != address) if token else ()
        return await _return(folder, identity, membership, hosts, seeds)
    if token is None:
        return _found(folder, identity, hosts)
    joined = await join(identity, token, hosts)
    return _joined(folder, identity, joined)


def remember_peers(folder: DataFolder, peers: tuple[tuple[NodeId, str], ...]) -> None:
    """Where to look for the mesh after a restart."""
    write_durably(folder.path / PEERS_FILE, msgspec.msgpack.encode(peers))


def _found(folder: DataFolder, identity: Identity, hosts: tuple[str, ...]) -> Boot:
    """A mesh of one: its id, its CA, its first gossip key, its first record."""
    mesh_id, now = MeshId(secrets.token_hex(16)), time.time()
    authority, key = Authority.found(mesh_id, now), new_leaf_key()
    leaf = authority.issue(make_csr(key), identity.node_id, hosts, now)
    membership = Membership.of(key, leaf, (authority.der,))
    content = Content(
        ca_certificate=authority.der,
        sealed_ca=((identity.node_id, authority.sealed_to(identity.node_id, identity.seal_key)),),
        gossip_keys=(new_gossip_key(),),
    )
    durable = durables.found(mesh_id, identity.node_id, content, random.Random(secrets.randbits(64)))
    # The membership comes last: without it a crash in between founds anew, and nobody knows the half-made mesh.
    folder.election_journal().store(durables.encode(durable))
    folder.save_membership(membership)
    return Boot(identity, membership, durable, (), founded=True)


def _joined(folder: DataFolder, identity: Identity, joined: Joined) -> Boot:
    record = _record(joined.reply.record)
    durable = durables.newcomer(joined.membership.mesh_id, identity.node_id, record)
    folder.election_journal().store(durables.encode(durable))
    folder.save_membership(joined.membership)
    seeds = tuple((member.id, member.address) for member in joined.reply.members)
    remember_peers(folder, seeds)
    return Boot(identity, joined.membership, durable, seeds)


async def _return(
    folder: DataFolder, identity: Identity, membership: Membership, hosts: tuple[str, ...], seeds: tuple[str, ...]
) -> Boot:
    """The same node as before: its vote and its record are on disk.  Members are asked for a new certificate when the
    old one is, and with a token's seeds in any case: they tell who is where, should all have moved meanwhile."""
    raw = folder.election_journal().load()
    if raw is None:
        raise ConfigError(f"data folder {folder.path} has lost its election state: start with a new --data-dir")
    durable = durables.decode(raw)
    peers = _last_peers(folder)
    if seeds or time.time() >= membership.renew_at:
        addresses = tuple(dict.fromkeys((*seeds, *(address for _, address in peers))))
        try:
            async with asyncio.timeout(2 * RETURN_S):
                joined = await rejoin(identity, membership, hosts, addresses, RETURN_S)
        except (MeshError, TimeoutError) as error:
            if time.time() >= membership.expires:
                raise ConfigError(f"the certificate has expired and no member renewed it: {error}") from error
            get_logger("boot").warning("no member renewed the certificate yet", why=str(error))
        else:
            membership = joined.membership
            folder.save_membership(membership)
            peers = tuple({**dict(peers), **{member.id: member.address for member in joined.reply.members}}.items())
            remember_peers(folder, peers)
    return Boot(identity, membership, durable, peers)


def _last_peers(folder: DataFolder) -> tuple[tuple[NodeId, str], ...]:
    raw = read_or_none(folder.path / PEERS_FILE)
    try:
        return msgspec.msgpack.decode(raw, type=tuple[tuple[NodeId, str], ...]) if raw else ()
    except msgspec.DecodeError:
        raise ConfigError(f"{folder.path / PEERS_FILE} is damaged: remove it and join again with a token") from None


def _record(raw: bytes) -> Record:
    try:
        return msgspec.msgpack.decode(raw, type=Record)
    except msgspec.DecodeError as error:
        raise ConfigError(f"the mesh answered the join with a record that cannot be read: {error}") from None
