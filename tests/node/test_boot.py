"""Founding, joining, returning: what is on the disk afterwards, and what a person is told when it cannot be."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesh.election import durable as durables
from mesh.election.record import Content, RecordId, make_record
from mesh.errors import ConfigError, PeerUnreachable
from mesh.types import MeshId
from node import boot as module
from node.boot import PEERS_FILE, Boot, boot, remember_peers
from node.folder import DataFolder
from node.identity import Identity
from node.net.join import Joined
from node.security.admission import Refused, Reply, SeedMember, found_membership
from node.security.ca import LEAF_LIFE_S, Authority, fingerprint
from node.security.membership import Membership
from node.security.token import JoinToken

HOSTS = ("h.example",)
OTHER_MESH = MeshId("ab" * 16)


class Elsewhere:
    """A mesh that this node may join: notes who asks, answers or refuses."""

    def __init__(self) -> None:
        self.mesh_id = MeshId("0123456789abcdef" * 2)
        self.authority = Authority.found(self.mesh_id, time.time())
        self.record = make_record(1 << 32, RecordId(4, 2), ("f" * 32,), Content(ca_certificate=self.authority.der))
        self.raw = msgspec.msgpack.encode(self.record)
        self.refuses: Exception | None = None
        self.joins: list[tuple[str, tuple[str, ...]]] = []
        self.rejoins: list[tuple[Membership, tuple[str, ...]]] = []

    def token(self, mesh_id: MeshId | None = None) -> str:
        ca = fingerprint(self.authority.der)
        return JoinToken(mesh_id or self.mesh_id, ("h:1", "h:2"), ca, "0" * 16, b"s" * 32).encode()

    def member(self, identity: Identity, at: float | None = None) -> Membership:
        return found_membership(identity, self.authority, HOSTS, at or time.time())

    async def join(self, identity: Identity, token: JoinToken, hosts: tuple[str, ...]) -> Joined:
        self.joins.append((token.token_id, hosts))
        return self._joined(identity)

    async def rejoin(self, identity: Identity, old: Membership, hosts: Any, seeds: Any, timeout_s: float) -> Joined:
        self.rejoins.append((old, seeds))
        return self._joined(identity)

    def _joined(self, identity: Identity) -> Joined:
        if self.refuses:
            raise self.refuses
        seeds = (SeedMember("f" * 32, "h:1"), SeedMember("e" * 32, "h:2"))
        membership = self.member(identity)
        reply = Reply(membership.leaf, (self.authority.der,), self.mesh_id, (b"g",), seeds, self.raw)
        return Joined(membership, reply)


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    made = Elsewhere()
    monkeypatch.setattr(module, "join", made.join)
    monkeypatch.setattr(module, "rejoin", made.rejoin)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[DataFolder]:
    with DataFolder(tmp_path / "node") as made:
        yield made


def stored(folder: DataFolder) -> Any:
    raw = folder.election_journal().load()
    assert raw is not None
    return durables.decode(raw)


# -- founding ----------------------------------------------------------------------------------------------------------


async def test_without_a_token_a_mesh_is_founded(folder: DataFolder, mesh: Elsewhere) -> None:
    made = await boot(folder, "", HOSTS)
    me = folder.identity().node_id
    assert (made.founded, made.seeds, made.identity.node_id) == (True, (), me)
    assert made.durable == stored(folder)
    assert made.membership == folder.membership()
    assert (made.membership.mesh_id, made.membership.node_id) == (made.durable.mesh_id, me)
    content = made.durable.committed.content
    assert (made.durable.committed.voters, len(content.gossip_keys)) == ((me,), 1)
    ((holder, sealed),) = content.sealed_ca
    assert holder == me
    assert Authority.unsealed(made.identity, made.durable.mesh_id, sealed).der == content.ca_certificate
    assert made.membership.cas == (content.ca_certificate,)
    assert (mesh.joins, mesh.rejoins) == ([], [])


async def test_two_meshes_are_never_the_same(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        with DataFolder(tmp_path / name) as folder:
            found.append(await boot(folder, "", HOSTS))
    one, two = found
    assert one.durable.mesh_id != two.durable.mesh_id
    assert one.durable.committed.content.gossip_keys != two.durable.committed.content.gossip_keys


async def test_a_crash_while_founding_founds_anew(folder: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: DataFolder, membership: Membership) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DataFolder, "save_membership", crash)
        with pytest.raises(KeyboardInterrupt):
            await boot(folder, "", HOSTS)
    half = stored(folder)
    made = await boot(folder, "", HOSTS)
    assert made.founded
    assert made.durable.mesh_id != half.mesh_id
    assert made.durable == stored(folder)


# -- joining -----------------------------------------------------------------------------------------------------------


async def test_with_a_token_a_mesh_is_joined(folder: DataFolder, mesh: Elsewhere) -> None:
    made = await boot(folder, mesh.token(), HOSTS)
    assert mesh.joins == [("0" * 16, HOSTS)]
    assert made.seeds == (("f" * 32, "h:1"), ("e" * 32, "h:2"))
    assert not made.founded
    assert made.durable.committed == mesh.record
    assert made.durable.voted_for is None
    assert made.durable == stored(folder)
    assert made.membership == folder.membership()
    assert msgspec.msgpack.decode((folder.path / PEERS_FILE).read_bytes()) == [["f" * 32, "h:1"], ["e" * 32, "h:2"]]


async def test_a_join_that_is_refused_leaves_no_trace(folder: DataFolder, mesh: Elsewhere) -> None:
    mesh.refuses = Refused("revoked")
    with pytest.raises(ConfigError, match="revoked"):
        await boot(folder, mesh.token(), HOSTS)
    assert (folder.membership(), folder.election_journal().load()) == (None, None)


async def test_a_record_that_cannot_be_read(folder: DataFolder, mesh: Elsewhere) -> None:
    mesh.raw = b"\xc1"
    with pytest.raises(ConfigError, match="record that cannot be read"):
        await boot(folder, mesh.token(), HOSTS)
    assert folder.membership() is None


async def test_what_is_no_token(folder: DataFolder, mesh: Elsewhere) -> None:
    with pytest.raises(ConfigError, match="join token"):
        await boot(folder, "mesh1.garbage", HOSTS)
    assert mesh.joins == []


# -- returning ---------------------------------------------------------------------------------------------------------


async def member_since(folder: DataFolder, mesh: Elsewhere, age: float) -> Boot:
    """This node joined when its certificate had lived ``age`` of its life less."""
    made = await boot(folder, mesh.token(), HOSTS)
    old = mesh.member(folder.identity(), time.time() - age * LEAF_LIFE_S)
    folder.save_membership(old)
    return msgspec.structs.replace(made, membership=old)


@pytest.mark.parametrize("with_token", [False, True])
async def test_the_same_node_returns(with_token: bool, folder: DataFolder, mesh: Elsewhere) -> None:
    before = await member_since(folder, mesh, 0.1)
    after = await boot(folder, mesh.token() if with_token else "", HOSTS)
    assert after.identity.node_id == before.identity.node_id
    assert (after.durable, after.seeds) == (before.durable, before.seeds)
    assert (after.membership == before.membership) is not with_token
    assert (len(mesh.joins), len(mesh.rejoins), after.founded) == (1, with_token, False)


async def test_a_token_says_where_everybody_is_now(folder: DataFolder, mesh: Elsewhere) -> None:
    """They moved while this node was away: only the token's seeds answer."""
    await member_since(folder, mesh, 0.1)
    remember_peers(folder, (("f" * 32, "h:7"), ("d" * 32, "h:8")))
    after = await boot(folder, mesh.token(), HOSTS)
    assert after.seeds == (("f" * 32, "h:1"), ("d" * 32, "h:8"), ("e" * 32, "h:2"))
    mesh.refuses = PeerUnreachable("nobody there")
    assert (await boot(folder, "", HOSTS)).seeds == after.seeds, "it remembers, should it crash at once"
    assert (await boot(folder, mesh.token(), HOSTS)).seeds == after.seeds


async def test_a_founder_returns_as_a_member(folder: DataFolder) -> None:
    before = await boot(folder, "", HOSTS)
    after = await boot(folder, "", HOSTS)
    assert (after.founded, after.durable) == (False, before.durable)


async def test_a_folder_of_one_mesh_does_not_join_another(folder: DataFolder, mesh: Elsewhere) -> None:
    await member_since(folder, mesh, 0.1)
    with pytest.raises(ConfigError, match="another --data-dir"):
        await boot(folder, mesh.token(OTHER_MESH), HOSTS)
    assert len(mesh.joins) == 1


async def test_an_old_certificate_is_renewed_by_the_last_peers(folder: DataFolder, mesh: Elsewhere) -> None:
    before = await member_since(folder, mesh, 0.6)
    after = await boot(folder, "", HOSTS)
    assert mesh.rejoins == [(before.membership, ("h:1", "h:2"))]
    assert after.membership.renew_at > time.time()
    assert folder.membership() == after.membership


async def test_a_token_names_more_peers_to_ask(folder: DataFolder, mesh: Elsewhere) -> None:
    await member_since(folder, mesh, 0.6)
    remember_peers(folder, (("f" * 32, "h:9"), ("e" * 32, "h:2")))
    await boot(folder, mesh.token(), HOSTS)
    ((_, asked),) = mesh.rejoins
    assert asked == ("h:1", "h:2", "h:9")


async def test_an_old_certificate_is_used_where_nobody_renews_it(folder: DataFolder, mesh: Elsewhere) -> None:
    before = await member_since(folder, mesh, 0.6)
    mesh.refuses = PeerUnreachable("nobody there")
    after = await boot(folder, "", HOSTS)
    assert after.membership == before.membership == folder.membership()


async def test_an_expired_certificate_is_not_used(folder: DataFolder, mesh: Elsewhere) -> None:
    await member_since(folder, mesh, 1.1)
    mesh.refuses = PeerUnreachable("nobody there")
    with pytest.raises(ConfigError, match="expired and no member renewed it: nobody there"):
        await boot(folder, "", HOSTS)
    mesh.refuses = None
    assert (await boot(folder, "", HOSTS)).membership.expires > time.time()


# -- damage ------------------------------------------------------------------------------------------------------------


async def test_a_lost_vote_is_no_new_vote(folder: DataFolder, mesh: Elsewhere) -> None:
    await member_since(folder, mesh, 0.1)
    for path in folder.path.glob("election*"):
        path.unlink()
    with pytest.raises(ConfigError, match="lost its election state"):
        await boot(folder, "", HOSTS)


@pytest.mark.parametrize("raw", [b"\xc1", b"\x01", b"\x91\x01", b'"'])
async def test_damaged_peers(raw: bytes, folder: DataFolder, mesh: Elsewhere) -> None:
    await member_since(folder, mesh, 0.1)
    (folder.path / PEERS_FILE).write_bytes(raw)
    with pytest.raises(ConfigError, match="peers is damaged"):
        await boot(folder, "", HOSTS)


async def test_no_peers_are_remembered(folder: DataFolder, mesh: Elsewhere) -> None:
    await member_since(folder, mesh, 0.1)
    (folder.path / PEERS_FILE).unlink()
    assert (await boot(folder, "", HOSTS)).seeds == ()
