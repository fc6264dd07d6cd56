import asyncio
import time
from typing import Any

import aiohttp
import msgspec
import pytest

from mesh.errors import ConfigError
from mesh.types import MeshId
from node.identity import Identity
from node.net import join as join_module
from node.net.address import bind_pair
from node.net.calls import new_session
from node.net.door import admit_verb
from node.net.join import join, rejoin
from node.security import admission
from node.security import token as tokens
from node.security.admission import Applicant, Refused, Reply, Request
from node.security.ca import fingerprint, mesh_name
from node.security.membership import Membership
from node.security.tls import pinned_client


def mint(town: Any, registrar: Any = None, **options: Any) -> tokens.JoinToken:
    registrar = registrar or town.registrar
    seeds = options.pop("seeds", (registrar.address,))
    mesh_id = options.pop("mesh_id", registrar.office.mesh_id)
    token, kept = tokens.mint(
        mesh_id, seeds, fingerprint(registrar.authority.der), time.time(), created_by=town.members[0].id, **options
    )
    content = registrar.content
    registrar.content = msgspec.structs.replace(content, tokens=(*content.tokens, kept))
    return tokens.JoinToken.decode(token.encode())


async def test_a_token_makes_a_member(town: Any) -> None:
    founder = await town.member()
    newcomer = Identity.generate()
    joined = await join(newcomer, mint(town), ("node.example", "10.1.2.3"))
    assert joined.membership.node_id == newcomer.node_id
    assert joined.membership.cas == (town.registrar.authority.der,)
    assert joined.reply.gossip_keys == town.registrar.content.gossip_keys
    assert joined.reply.members[0].record == b"signed member record"
    assert town.registrar.content.tokens[0].uses_left == 0
    assert founder.door.counts.joins == 1


async def test_each_refusal_says_why(town: Any) -> None:
    await town.member()
    registrar = town.registrar
    expired = mint(town, ttl_s=1)
    registrar.now = lambda: time.time() + 5
    with pytest.raises(Refused, match="expired"):
        await join(Identity.generate(), expired, ())
    registrar.now = time.time
    once = mint(town, uses=1)
    await join(Identity.generate(), once, ())
    with pytest.raises(Refused, match="used up"):
        await join(Identity.generate(), once, ())
    revoked = mint(town)
    kept = registrar.content.tokens
    registrar.content = msgspec.structs.replace(registrar.content, tokens=(*kept[:-1], tokens.revoked(kept[-1])))
    with pytest.raises(Refused, match="revoked"):
        await join(Identity.generate(), revoked, ())
    forged = msgspec.structs.replace(mint(town), secret=bytes(32))
    with pytest.raises(Refused, match="proof"):
        await join(Identity.generate(), forged, ())
    unknown = msgspec.structs.replace(forged, token_id="0")
    with pytest.raises(Refused, match="no such token"):
        await join(Identity.generate(), unknown, ())
    banned = Identity.generate()
    registrar.content = msgspec.structs.replace(registrar.content, tombstones=(banned.node_id,))
    with pytest.raises(Refused, match="revoked: it cannot return"):
        await join(banned, mint(town), ())


async def test_a_lost_answer_can_be_asked_for_again(town: Any) -> None:
    await town.member()
    token, newcomer = mint(town, uses=1), Identity.generate()
    await join(newcomer, token, ())
    again = await join(newcomer, token, ())
    assert again.membership.node_id == newcomer.node_id
    assert town.registrar.content.tokens[0].uses_left == 0


async def test_a_seed_of_another_mesh_hears_not_one_byte(town: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await town.member()
    foreign = await town.member(type(town.registrar)(MeshId("f" * 32)))
    said: list[object] = []
    monkeypatch.setattr(asyncio.StreamWriter, "write", lambda _, data: said.append(data))
    monkeypatch.setattr(join_module, "post", lambda *args, **options: said.append(args))
    with pytest.raises(ConfigError, match="not of the token's mesh"):
        await join(Identity.generate(), mint(town, seeds=(foreign.address,)), ())
    # The right CA, but the token names another mesh than the certificates do.
    with pytest.raises(ConfigError, match="certificate names another"):
        await join(Identity.generate(), mint(town, mesh_id=MeshId("e" * 32)), ())
    assert not said


async def test_all_seeds_are_tried(town: Any) -> None:
    founder = await town.member()
    tcp, udp = bind_pair("127.0.0.1", 0)
    dead = f"127.0.0.1:{tcp.getsockname()[1]}"
    tcp.close(), udp.close()
    joined = await join(Identity.generate(), mint(town, seeds=(dead, founder.address)), ())
    assert joined.membership.mesh_id == town.registrar.office.mesh_id
    with pytest.raises(ConfigError, match=f"could not join: {dead}: .*refused"):
        await join(Identity.generate(), mint(town, seeds=(dead,)), ())


async def test_a_member_without_the_ca_key_passes_the_join_on(town: Any) -> None:
    leader, other = await town.member(), await town.member()

    async def pass_on(request: Request) -> Reply:
        raw = await other.links.request(leader.id, leader.address, "admit", msgspec.msgpack.encode(request), 5.0)
        return admission.decode_answer(raw)

    leader.door.on_rpc("admit", admit_verb(town.registrar.admit))
    other.door._admit = pass_on
    newcomer = Identity.generate()
    joined = await join(newcomer, mint(town, seeds=(other.address,)), ())
    assert joined.membership.node_id == newcomer.node_id
    with pytest.raises(Refused, match="used up"):
        await join(Identity.generate(), mint(town, seeds=(other.address,), uses=1) and _used(town, other), ())


def _used(town: Any, other: Any) -> tokens.JoinToken:
    token = mint(town, seeds=(other.address,), uses=1)
    kept = town.registrar.content.tokens
    town.registrar.content = msgspec.structs.replace(town.registrar.content, tokens=(*kept[:-1], tokens.used(kept[-1])))
    return token


async def test_no_coordinator_is_waited_for(town: Any) -> None:
    founder = await town.member()
    tries = 0

    async def after_an_election(request: Request) -> Reply:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise Refused("unavailable")
        return await town.registrar.admit(request)

    founder.door._admit = after_an_election
    assert await join(Identity.generate(), mint(town), ())
    tries = -99
    founder.door._admit = _never
    with pytest.raises(ConfigError, match="no coordinator"):
        await join(Identity.generate(), mint(town), (), timeout_s=0.1)


async def _never(request: Request) -> Reply:
    raise Refused("unavailable")


async def test_a_recorded_join_is_worth_nothing(town: Any) -> None:
    founder = await town.member()
    token = mint(town, uses=-1)
    applicant = Applicant(Identity.generate(), token.mesh_id, (), token=token)
    challenge = await call(town, founder, "start", msgspec.msgpack.encode(admission.Start(applicant.client_nonce)))
    request = applicant.request(msgspec.msgpack.decode(challenge, type=admission.Challenge).nonce)
    recorded = msgspec.msgpack.encode(request)
    assert admission.decode_answer(await call(town, founder, "finish", recorded))
    with pytest.raises(Refused, match="replayed"):
        admission.decode_answer(await call(town, founder, "finish", recorded))
    other = await town.member()
    with pytest.raises(Refused, match="replayed"):
        admission.decode_answer(await call(town, other, "finish", recorded))


async def call(town: Any, member: Any, step: str, payload: bytes) -> bytes:
    async with (
        new_session() as session,
        session.post(
            f"https://{member.address}/peer/join/{step}",
            data=payload,
            ssl=pinned_client((town.registrar.authority.der,)),
            server_hostname=mesh_name(town.registrar.office.mesh_id),
        ) as response,
    ):
        return await response.read()


async def test_a_member_returns_by_its_old_certificate_even_expired(town: Any) -> None:
    founder = await town.member()
    newcomer = Identity.generate()
    joined = await join(newcomer, mint(town), ())
    old = Applicant(newcomer, joined.membership.mesh_id, (), membership=joined.membership)
    leaf = town.registrar.authority.issue(
        msgspec.msgpack.decode(old.request(b"").claim, type=admission.Claim).csr,
        newcomer.node_id,
        (),
        time.time() - 30 * 86_400,
    )
    expired: Membership = msgspec.structs.replace(joined.membership, leaf=leaf)
    back = await rejoin(newcomer, expired, ("home.example",), (founder.address,))
    assert back.membership.node_id == newcomer.node_id
    assert back.membership.leaf != joined.membership.leaf
    assert back.membership.renew_at > time.time()
    with pytest.raises(Refused, match="proof"):
        await rejoin(Identity.generate(), expired, (), (founder.address,))
    town.registrar.content = msgspec.structs.replace(town.registrar.content, tombstones=(newcomer.node_id,))
    with pytest.raises(Refused, match="revoked"):
        await rejoin(newcomer, expired, (), (founder.address,))


async def test_joiners_without_a_certificate_reach_nothing_else(town: Any) -> None:
    founder = await town.member()
    context = pinned_client((town.registrar.authority.der,))
    name = mesh_name(town.registrar.office.mesh_id)
    async with aiohttp.ClientSession() as session:
        for method, path in (
            ("GET", "/peer/stream?lane=control"),
            ("POST", "/peer/rpc/echo"),
            ("GET", "/peer/files/x"),
            ("GET", "/"),
            ("GET", "/peer/join"),
        ):
            async with session.request(
                method, f"https://{founder.address}{path}", ssl=context, server_hostname=name
            ) as response:
                assert response.status == 403, path
                assert (await response.json())["error"] == "forbidden"
    assert founder.door.counts.strangers == 5


async def test_a_foreign_certificate_is_refused(town: Any) -> None:
    founder = await town.member()
    stranger = await town.member(type(town.registrar)(MeshId("f" * 32)))
    context = pinned_client((town.registrar.authority.der,))
    context.load_cert_chain(stranger.tls.pem)
    async with aiohttp.ClientSession() as session:
        with pytest.raises((aiohttp.ClientError, OSError)):
            async with session.post(
                f"https://{founder.address}/peer/rpc/echo",
                ssl=context,
                server_hostname=mesh_name(town.registrar.office.mesh_id),
            ):
                pass
    stranger.links.send(founder.id, founder.address, "vote", b"")
    _, why = await stranger.unreachable.get()
    assert "certificate" in why


async def test_a_revoked_member_is_cut_off_and_kept_out(town: Any) -> None:
    a, b = await town.member(), await town.member()
    a.send(b, "vote")
    await b.frames.get()
    b.revoked.add(a.id)
    b.door.drop(a.id)
    assert await a.lost.get() == b.id
    assert b.door.counts.revoked >= 1
    a.send(b, "vote")
    assert "403" in (await a.unreachable.get())[1]


async def test_a_renewed_certificate_serves_at_once(town: Any) -> None:
    a, b = await town.member(), await town.member()
    renewed = await rejoin(b.identity, b.membership, (), (a.address,))
    b.tls.pem.write_bytes(renewed.membership.to_pem())
    b.tls.reload()
    _, writer = await asyncio.open_connection(
        *b.address.split(":"), ssl=a.tls.client, server_hostname=mesh_name(a.tls.mesh_id)
    )
    assert writer.get_extra_info("ssl_object").getpeercert(binary_form=True) == renewed.membership.leaf
    writer.transport.abort()
