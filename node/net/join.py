"""The joiner's side: recognise the mesh, prove the token, take the answer (see ``node.security.admission``)."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from cryptography import x509

from mesh.errors import ConfigError, MeshError, PeerError, PeerUnreachable
from mesh.types import MeshId
from node.identity import Identity
from node.net.address import parse_address
from node.net.calls import new_session, post, unreachable
from node.security import admission
from node.security.admission import Applicant, Challenge, Reply, Start
from node.security.ca import check_issued, fingerprint, load_certificate, mesh_name, subject_of
from node.security.membership import Membership
from node.security.tls import looking_client, pinned_client, unverified_chain
from node.security.token import JoinToken

STEP_S = 10.0
"""For one step with one seed."""
AGAIN_S = 0.5
"""Between rounds, when the mesh has no coordinator for the moment."""


class Joined(msgspec.Struct, frozen=True):
    """What a join or a return gave."""

    membership: Membership
    reply: Reply


async def join(identity: Identity, token: JoinToken, hosts: tuple[str, ...], timeout_s: float = 30.0) -> Joined:
    """Join by ``token``; ``hosts`` are the names this node is reached by.

    Raises ``Refused`` with the mesh's reason, or ``ConfigError`` in one line when no seed answers.
    """

    async def ask(address: str) -> Joined:
        ca = await recognise(address, token)
        applicant = Applicant(identity, token.mesh_id, hosts, token=token)
        return await _apply(address, applicant, token.mesh_id, ca.der, (ca.der,))

    return await _ask_all(token.seeds, ask, timeout_s)


async def rejoin(
    identity: Identity, membership: Membership, hosts: tuple[str, ...], seeds: tuple[str, ...], timeout_s: float = 30.0
) -> Joined:
    """A new leaf for a member, by its old one (expired or not) and its identity key: renewal, or return.

    Raises as ``join`` does.
    """

    async def ask(address: str) -> Joined:
        applicant = Applicant(identity, membership.mesh_id, hosts, membership=membership)
        return await _apply(address, applicant, membership.mesh_id, membership.cas[0], membership.cas)

    return await _ask_all(seeds, ask, timeout_s)


class RecognisedCa(msgspec.Struct, frozen=True):
    """The CA certificate (DER) that hashed to what the token says."""

    der: bytes


async def recognise(address: str, token: JoinToken) -> RecognisedCa:
    """The mesh's CA, read from the TLS handshake with a seed; not one byte of ours was sent inside it.

    The handshake proves that the seed holds the leaf's key, the leaf names the mesh, the CA signed the leaf, and the
    CA is the token's.  Raises ``PeerError`` otherwise, ``PeerUnreachable`` without a handshake.
    """
    chain = await _chain_of(address)
    ca = next((der for der in chain[1:] if fingerprint(der) == token.ca_sha256), None)
    if ca is None:
        raise PeerError("it is not of the token's mesh (its CA has another fingerprint)")
    leaf: x509.Certificate = load_certificate(chain[0])
    check_issued(leaf, load_certificate(ca))
    if subject_of(leaf).mesh_id != token.mesh_id:
        raise PeerError("it is not of the token's mesh (its certificate names another)")
    return RecognisedCa(ca)


async def _chain_of(address: str) -> list[bytes]:
    host, port = parse_address(address, "seed address")
    try:
        async with asyncio.timeout(STEP_S):
            _, writer = await asyncio.open_connection(host, port, ssl=looking_client(), ssl_shutdown_timeout=1.0)
    except (OSError, TimeoutError, ssl.SSLError) as error:
        raise unreachable(address, error) from error
    try:
        chain = unverified_chain(writer.get_extra_info("ssl_object"))
    finally:
        writer.transport.abort()
    if not chain:
        raise PeerError("it showed no certificate")
    return chain


async def _apply(address: str, applicant: Applicant, mesh_id: MeshId, ca: bytes, cas: tuple[bytes, ...]) -> Joined:
    """Start and finish, both on connections that only a node of that mesh can answer."""
    context = pinned_client(cas)

    async with new_session() as session:

        async def step(path: str, payload: bytes, limit: int) -> bytes:
            return await post(
                *(session, address, path, payload),
                context=context,
                server_name=mesh_name(mesh_id),
                timeout_s=STEP_S,
                limit=limit,
            )

        raw = await step("/peer/join/start", msgspec.msgpack.encode(Start(applicant.client_nonce)), 1024)
        try:
            challenge = msgspec.msgpack.decode(raw, type=Challenge)
        except msgspec.DecodeError:
            raise PeerError("not an answer to a join") from None
        request = msgspec.msgpack.encode(applicant.request(challenge.nonce))
        reply = admission.decode_answer(await step("/peer/join/finish", request, admission.MAX_REPLY_BYTES))
        return Joined(applicant.accept(reply, ca), reply)


async def _ask_all(
    seeds: tuple[str, ...], ask: Callable[[str], Coroutine[Any, Any, Joined]], timeout_s: float
) -> Joined:
    """The first answer of any seed; a refusal that is not for the moment only ends it."""
    deadline = time.monotonic() + timeout_s
    while True:
        failures, transient = [], False
        for address in seeds:
            try:
                return await ask(address)
            except admission.Refused as refused:
                if not refused.transient:
                    raise
                transient = True
                failures.append(f"{address}: {refused}")
            except PeerUnreachable as error:
                failures.append(str(error))
            except MeshError as error:
                failures.append(f"{address}: {error}")
        if not transient or time.monotonic() + AGAIN_S > deadline:
            raise ConfigError("could not join: " + "; ".join(failures or ["there is no seed to ask"]))
        await asyncio.sleep(AGAIN_S)
