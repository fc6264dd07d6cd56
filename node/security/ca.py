"""The mesh's own small certificate authority, and the leaf certificates that it signs.

P-256 throughout (browsers refuse Ed25519 servers).  The CA's private key lives in memory, and sealed to each voter in
the committed record; it is never in clear on disk or wire.  A leaf names its node three ways:

    spiffe://<mesh id>/node/<node id>              who a client is: read by the server after the handshake
    <node id>.<mesh id>.murmur.internal (DNS)      who a server is: OpenSSL itself refuses the handshake with another
    <mesh id>.murmur.internal (DNS)                for a joiner, who knows the mesh but not yet its nodes

and carries the names and addresses it may be reached at, for clients of the public API.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import re
from collections.abc import Iterable

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.errors import PeerError
from mesh.types import MeshId, NodeId
from node.identity import Identity, SealKey, is_node_id, verify_seal_key
from node.security.seal import seal

LEAF_LIFE_S = 7 * 86_400.0
CA_LIFE_S = 10 * 365 * 86_400.0
CLOCK_SKEW_S = 600.0
"""How far the clocks of two machines of one mesh may differ."""

DOMAIN = "murmur.internal"
ALWAYS_HOSTS = ("localhost", "127.0.0.1", "::1")
MAX_HOSTS = 16
MAX_CSR_BYTES = 4096
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")


def mesh_name(mesh_id: MeshId) -> str:
    """The TLS server name that any node of the mesh answers to."""
    return f"{mesh_id}.{DOMAIN}"


def node_name(mesh_id: MeshId, node_id: NodeId) -> str:
    """The TLS server name that one node alone answers to."""
    return f"{node_id}.{mesh_id}.{DOMAIN}"


class Subject(msgspec.Struct, frozen=True):
    """Whom a leaf certificate names."""

    mesh_id: MeshId
    node_id: NodeId


class Authority:
    """A CA with its private key.  Only founder and voters ever hold one, and only in memory."""

    def __init__(self, mesh_id: MeshId, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self.mesh_id, self._key, self._certificate = mesh_id, key, certificate
        self.der = certificate.public_bytes(serialization.Encoding.DER)

    @classmethod
    def found(cls, mesh_id: MeshId, now: float) -> Authority:
        """A new CA for a new mesh (or in rotation); ``now`` is unix seconds."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"murmur mesh {mesh_id[:8]}")])
        builder = _builder(name, name, key.public_key(), key.public_key(), now, CA_LIFE_S)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(key_cert_sign=True), critical=True)
        return cls(mesh_id, key, builder.sign(key, hashes.SHA256()))

    def issue(self, csr: bytes, node_id: NodeId, hosts: Iterable[str], now: float) -> bytes:
        """A leaf (DER) for the key in ``csr`` that names ``node_id``; nothing else of the request is believed.

        Raises ``PeerError`` for a bad request or a host name that a node may not claim.
        """
        request = load_csr(csr)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"murmur node {node_id[:8]}")])
        builder = _builder(name, self._certificate.subject, request, self._key.public_key(), now, LEAF_LIFE_S)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(digital_signature=True), critical=True)
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(both, critical=False)
        builder = builder.add_extension(self._names(node_id, hosts), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)

    def sealed_to(self, node_id: NodeId, key: SealKey) -> bytes:
        """This CA with its private key, for ``node_id`` alone.  Raises ``PeerError`` when ``key`` is not its own."""
        if not verify_seal_key(node_id, key):
            raise PeerError(f"the seal key offered for node {node_id[:8]} is not signed by it")
        secret = self._key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return seal(key.public, msgspec.msgpack.encode((self.der, secret)), _seal_aad(self.mesh_id, node_id))

    @classmethod
    def unsealed(cls, identity: Identity, mesh_id: MeshId, sealed: bytes) -> Authority:
        """The CA that was sealed to ``identity``.  Raises ``PeerError`` when it was not, or does not hold together."""
        plain = identity.unseal(sealed, _seal_aad(mesh_id, identity.node_id))
        try:
            der, secret = msgspec.msgpack.decode(plain, type=tuple[bytes, bytes])
            key = serialization.load_der_private_key(secret, None)
        except (msgspec.DecodeError, ValueError):
            raise PeerError("the sealed CA key is malformed") from None
        certificate = load_certificate(der)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise PeerError("the sealed CA key does not fit its certificate")
        return cls(mesh_id, key, certificate)

    def _names(self, node_id: NodeId, hosts: Iterable[str]) -> x509.SubjectAlternativeName:
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(f"spiffe://{self.mesh_id}/node/{node_id}"),
            x509.DNSName(node_name(self.mesh_id, node_id)),
            x509.DNSName(mesh_name(self.mesh_id)),
        ]
        wanted = dict.fromkeys([*ALWAYS_HOSTS, *(check_host(host) for host in hosts)])
        if len(wanted) > MAX_HOSTS:
            raise PeerError(f"a certificate names at most {MAX_HOSTS} hosts, not {len(wanted)}")
        return x509.SubjectAlternativeName(names + [_host_name(host) for host in wanted])


def check_host(host: str) -> str:
    """``host`` in lower case, if a leaf may carry it.  Raises ``PeerError``.

    Names under ``DOMAIN`` say which node a server is, so a node that could ask for one could pass for another.
    """
    host = host.lower().rstrip(".")
    if _address(host) is None and (not _HOST.fullmatch(host) or host == DOMAIN or host.endswith("." + DOMAIN)):
        raise PeerError(f"a certificate cannot name the host {host[:80]!r}")
    return host


def new_leaf_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def make_csr(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A signing request (DER) that proves possession of ``key``; it names nobody, the CA decides the names."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def load_csr(csr: bytes) -> ec.EllipticCurvePublicKey:
    """The public key in ``csr``.  Raises ``PeerError`` unless it is P-256 and signed by its own key."""
    try:
        request = x509.load_der_x509_csr(csr) if len(csr) <= MAX_CSR_BYTES else None
    except ValueError:
        request = None
    if request is None or not request.is_signature_valid:
        raise PeerError("not a valid certificate request")
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise PeerError("a certificate request must hold a P-256 key")
    return key


def load_certificate(der: bytes) -> x509.Certificate:
    """Raises ``PeerError`` where ``der`` is no certificate."""
    try:
        return x509.load_der_x509_certificate(der)
    except ValueError:
        raise PeerError("not a certificate") from None


def subject_of(leaf: x509.Certificate) -> Subject:
    """Whom ``leaf`` names; its signature is checked elsewhere.  Raises ``PeerError`` unless it names exactly one."""
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        raise PeerError("the certificate names no node") from None
    return parse_uris(names.get_values_for_type(x509.UniformResourceIdentifier))


def parse_uris(uris: Iterable[str]) -> Subject:
    """The one ``spiffe://<mesh>/node/<id>`` among the URIs of a certificate.  Raises ``PeerError``."""
    found = [uri.removeprefix("spiffe://").split("/") for uri in uris]
    if len(found) != 1 or len(found[0]) != 3 or found[0][1] != "node":
        raise PeerError("the certificate does not name one node of a mesh")
    mesh_id, _, node_id = found[0]
    if not is_node_id(node_id) or not is_node_id(mesh_id):
        raise PeerError("the certificate names a malformed id")
    return Subject(MeshId(mesh_id), NodeId(node_id))


def check_issued(leaf: x509.Certificate, ca: x509.Certificate) -> None:
    """Raise ``PeerError`` unless ``ca``'s key signed ``leaf``.  Dates are the caller's concern."""
    try:
        leaf.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        raise PeerError("the certificate is not signed by the mesh's CA") from None


def fingerprint(der: bytes) -> bytes:
    """SHA-256 of a certificate, as in the join token."""
    return hashlib.sha256(der).digest()


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    now: float,
    life_s: float,
) -> x509.CertificateBuilder:
    def at(seconds: float) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC)

    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(at(now - CLOCK_SKEW_S)).not_valid_after(at(now + life_s))
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _host_name(host: str) -> x509.GeneralName:
    address = _address(host)
    return x509.DNSName(host) if address is None else x509.IPAddress(address)


def _seal_aad(mesh_id: MeshId, node_id: NodeId) -> bytes:
    return f"murmur ca {mesh_id} {node_id}".encode()
