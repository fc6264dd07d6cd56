"""Letting a node in: what it claims, how it proves it, and who decides.

    joiner                                           any member                         holder of the CA key
      TLS handshake only: read the chain, compare the CA with the token's; nothing was said yet
      POST /peer/join/start  client nonce      ->
                                               <-    server nonce
      POST /peer/join/finish claim, proofs     ->    checks the nonce     -> ``admit``  -> judge, commit the use, sign
                                               <-    leaf certificate, CA, gossip keys, members, record

The claim names both nonces, so a recorded join is worth nothing later.  It is signed by the identity key, and proved
either by an HMAC under the token's verifier (a join) or by the node's earlier certificate, expired or not (a renewal,
a return after a long absence).  The secret of a token never travels.
"""

from __future__ import annotations

import hmac
import os
import struct

import msgspec

from mesh.election.record import Content
from mesh.errors import ConfigError, PeerError
from mesh.types import MeshId, NodeId
from node.identity import Identity, SealKey, verify, verify_seal_key
from node.security import token as tokens
from node.security.ca import (
    MAX_HOSTS,
    Authority,
    check_host,
    check_issued,
    load_certificate,
    load_csr,
    make_csr,
    new_leaf_key,
    subject_of,
)
from node.security.membership import Membership

NONCE_BYTES = 16
MAX_REQUEST_BYTES = 32 * 1024
MAX_REPLY_BYTES = 16 * 2**20
PURPOSE = "join"
CHALLENGE_LIFE_S = 60.0
REMEMBERED = 1024
"""Recent admissions that a repeated request finds again."""

WHY = {
    "expired": "the token has expired: make a new one with `python -m node token create`",
    "used_up": "the token has been used up: make a new one with `python -m node token create`",
    "revoked": "the token has been revoked",
    "unknown_token": "the mesh knows no such token",
    "wrong_mesh": "the request is for another mesh",
    "node_revoked": "this node has been revoked: it cannot return; start with a new --data-dir",
    "bad_proof": "the proof of the token, certificate or identity is wrong",
    "malformed": "the request is malformed",
    "stale": "the join took too long, or was recorded and replayed: try again",
    "unavailable": "the mesh cannot admit members right now (no coordinator)",
}


class Refused(ConfigError):
    """The mesh said no; ``why`` is a key of ``WHY``, ``transient`` whether asking again may help."""

    def __init__(self, why: str, detail: str = "") -> None:
        super().__init__(detail or WHY.get(why, why))
        self.why = why
        self.transient = why == "unavailable"


class Start(msgspec.Struct, frozen=True, array_like=True):
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, array_like=True):
    nonce: bytes


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """Who wants in.  Signed and proved as the bytes that were sent, so there is nothing to canonicalise."""

    mesh_id: MeshId
    node_id: NodeId
    seal_key: SealKey
    csr: bytes
    hosts: tuple[str, ...]
    client_nonce: bytes
    server_nonce: bytes
    token_id: str = ""
    certificate: bytes = b""
    """DER of the earlier leaf, for a renewal or return."""


class Request(msgspec.Struct, frozen=True, array_like=True):
    """``claim`` is an encoded ``Claim``."""

    claim: bytes
    signed: bytes
    """``Identity.sign("join", claim)``."""
    proof: bytes = b""
    """``tokens.prove(verifier, claim)``; empty for a renewal."""


class SeedMember(msgspec.Struct, frozen=True, array_like=True):
    """A member to gossip with first."""

    id: NodeId
    address: str
    record: bytes = b""
    """Its own signed member record, as gossip encodes it."""


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """What makes a joiner a member."""

    certificate: bytes
    cas: tuple[bytes, ...]
    mesh_id: MeshId
    gossip_keys: tuple[bytes, ...] = ()
    members: tuple[SeedMember, ...] = ()
    record: bytes = b""
    """The committed record, as the composition root encodes it."""


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """The other answer: ``Refused`` on the wire."""

    why: str
    detail: str


class Applicant:
    """The side that asks: one fresh leaf key, one claim."""

    def __init__(
        self,
        identity: Identity,
        mesh_id: MeshId,
        hosts: tuple[str, ...],
        *,
        token: tokens.JoinToken | None = None,
        membership: Membership | None = None,
    ) -> None:
        """By ``token`` (a join) or by ``membership`` (a renewal or return)."""
        assert (token is None) != (membership is None), "an applicant has a token or a certificate"
        self._identity, self._mesh_id, self._hosts = identity, mesh_id, hosts
        self._token, self._membership = token, membership
        self._key = new_leaf_key()
        self.client_nonce = os.urandom(NONCE_BYTES)

    def request(self, server_nonce: bytes) -> Request:
        claim = msgspec.msgpack.encode(
            Claim(
                mesh_id=self._mesh_id,
                node_id=self._identity.node_id,
                seal_key=self._identity.seal_key,
                csr=make_csr(self._key),
                hosts=self._hosts,
                client_nonce=self.client_nonce,
                server_nonce=server_nonce,
                token_id=self._token.token_id if self._token else "",
                certificate=self._membership.leaf if self._membership else b"",
            )
        )
        proof = tokens.prove(tokens.verifier(self._token.secret), claim) if self._token else b""
        return Request(claim, self._identity.sign(PURPOSE, claim), proof)

    def accept(self, reply: Reply, ca: bytes) -> Membership:
        """The membership that ``reply`` gives.  Raises ``PeerError`` unless it is ours, under the authority ``ca``."""
        membership = Membership.of(self._key, reply.certificate, reply.cas)
        if ca not in reply.cas or reply.mesh_id != self._mesh_id:
            raise PeerError("the answer to the join is for another mesh")
        if (membership.mesh_id, membership.node_id) != (self._mesh_id, self._identity.node_id):
            raise PeerError("the certificate in the answer names another node")
        check_issued(load_certificate(reply.certificate), load_certificate(reply.cas[0]))
        return membership


class Challenges:
    """Server nonces that need no memory until they are used: a flood of strangers fills nothing.

    A nonce is (unix ms, 16 random bytes, MAC over both and the client's nonce under a key of this process).
    """

    _STAMP = struct.Struct("!Q")

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._spent: dict[bytes, float] = {}

    def issue(self, client_nonce: bytes, now: float) -> bytes:
        """``now`` is unix seconds."""
        body = self._STAMP.pack(int(now * 1000)) + os.urandom(NONCE_BYTES)
        return body + self._mac(body, client_nonce)

    def check(self, claim: Claim, now: float) -> None:
        """Raise ``Refused`` unless the claim's server nonce is ours, fresh, and did not let anyone in before."""
        body, mac = claim.server_nonce[:-32], claim.server_nonce[-32:]
        if len(body) != self._STAMP.size + NONCE_BYTES or len(claim.client_nonce) != NONCE_BYTES:
            raise Refused("malformed")
        age_s = now - self._STAMP.unpack_from(body)[0] / 1000
        ours = hmac.compare_digest(mac, self._mac(body, claim.client_nonce))
        if not ours or not -1.0 <= age_s <= CHALLENGE_LIFE_S or body in self._spent:
            raise Refused("stale")

    def spend(self, claim: Claim, now: float) -> None:
        """After an admission: this nonce lets nobody in again."""
        self._spent = {body: at for body, at in self._spent.items() if now - at <= CHALLENGE_LIFE_S}
        self._spent[claim.server_nonce[:-32]] = now

    def _mac(self, body: bytes, client_nonce: bytes) -> bytes:
        return hmac.digest(self._key, body + client_nonce, "sha256")


class Verdict(msgspec.Struct, frozen=True):
    """An application that passed; ``content`` is what must be committed before ``Office.sign``, if anything."""

    claim: Claim
    content: Content | None


class Office:
    """The side that decides, at the node that leads and holds the CA's key.

    It remembers whom it let in lately, so that a joiner whose answer was lost may repeat without a second use.
    """

    def __init__(self, mesh_id: MeshId) -> None:
        self.mesh_id = mesh_id
        self._admitted: dict[tuple[str, NodeId], None] = {}

    def judge(self, request: Request, content: Content, now: float) -> Verdict:
        """Check everything but the nonces (``Challenges`` did).  Raises ``Refused``; ``now`` is unix seconds."""
        claim = decode_claim(request)
        self._check_claim(claim, request, content)
        if claim.certificate:
            self._check_certificate(claim, content)
            return Verdict(claim, None)
        return Verdict(claim, self._check_token(claim, request, content, now))

    def sign(self, verdict: Verdict, authority: Authority, now: float) -> bytes:
        """The leaf (DER), once the verdict's content is committed."""
        claim = verdict.claim
        if claim.token_id:
            self._admitted[claim.token_id, claim.node_id] = None
            while len(self._admitted) > REMEMBERED:
                self._admitted.pop(next(iter(self._admitted)))
        return authority.issue(claim.csr, claim.node_id, claim.hosts, now)

    def _check_claim(self, claim: Claim, request: Request, content: Content) -> None:
        if claim.mesh_id != self.mesh_id:
            raise Refused("wrong_mesh")
        if claim.node_id in content.tombstones:
            raise Refused("node_revoked")
        if not verify(claim.node_id, PURPOSE, request.claim, request.signed):
            raise Refused("bad_proof")
        if not verify_seal_key(claim.node_id, claim.seal_key):
            raise Refused("bad_proof")
        if len(claim.hosts) > MAX_HOSTS // 2:
            raise Refused("malformed", f"more than {MAX_HOSTS // 2} host names")
        try:
            load_csr(claim.csr)
            for host in claim.hosts:
                check_host(host)
        except PeerError as error:
            raise Refused("malformed", str(error)) from None

    def _check_certificate(self, claim: Claim, content: Content) -> None:
        """An earlier leaf of ours for the same id, which the claim's signature proves; its dates do not matter."""
        try:
            leaf = load_certificate(claim.certificate)
            check_issued(leaf, load_certificate(content.ca_certificate))
            subject = subject_of(leaf)
        except PeerError:
            raise Refused("bad_proof") from None
        if (subject.mesh_id, subject.node_id) != (self.mesh_id, claim.node_id):
            raise Refused("bad_proof")

    def _check_token(self, claim: Claim, request: Request, content: Content, now: float) -> Content | None:
        kept = next((token for token in content.tokens if token.id == claim.token_id), None)
        if kept is None:
            raise Refused("unknown_token")
        if not hmac.compare_digest(tokens.prove(kept.secret_hash, request.claim), request.proof):
            raise Refused("bad_proof")
        why = tokens.why_closed(kept, now)
        repeated = (claim.token_id, claim.node_id) in self._admitted
        if why and not (why == "used_up" and repeated):
            raise Refused(why)
        if repeated or kept.uses_left == tokens.UNLIMITED:
            return None
        left = tuple(tokens.used(token) if token is kept else token for token in content.tokens)
        return msgspec.structs.replace(content, tokens=left)


def decode_request(raw: bytes) -> Request:
    """Raises ``Refused`` for bytes that are none."""
    try:
        if len(raw) <= MAX_REQUEST_BYTES:
            return msgspec.msgpack.decode(raw, type=Request)
    except msgspec.DecodeError:
        pass
    raise Refused("malformed")


def decode_claim(request: Request) -> Claim:
    """Raises ``Refused`` for bytes that are none."""
    try:
        return msgspec.msgpack.decode(request.claim, type=Claim)
    except msgspec.DecodeError:
        raise Refused("malformed") from None


def encode_answer(answer: Reply | Refused) -> bytes:
    """One byte says which, then msgpack."""
    if isinstance(answer, Refused):
        return b"\0" + msgspec.msgpack.encode(Refusal(answer.why, str(answer)))
    return b"\1" + msgspec.msgpack.encode(answer)


def decode_answer(raw: bytes) -> Reply:
    """Raises ``Refused`` for a refusal, ``PeerError`` for bytes that are no answer."""
    try:
        if raw[:1] == b"\1":
            return msgspec.msgpack.decode(memoryview(raw)[1:], type=Reply)
        refusal = msgspec.msgpack.decode(memoryview(raw)[1:], type=Refusal)
    except msgspec.DecodeError:
        raise PeerError("not an answer to a join") from None
    raise Refused(refusal.why, refusal.detail)


def found_membership(identity: Identity, authority: Authority, hosts: tuple[str, ...], now: float) -> Membership:
    """The founder signs for itself: the first member."""
    key = new_leaf_key()
    leaf = authority.issue(make_csr(key), identity.node_id, hosts, now)
    return Membership.of(key, leaf, (authority.der,))
