"""What makes a node a member: its leaf certificate and key, and the CA that it trusts, in one PEM file."""

from __future__ import annotations

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mesh.errors import PeerError
from mesh.types import MeshId, NodeId
from node.security.ca import load_certificate, subject_of


class Membership(msgspec.Struct, frozen=True):
    """One node's place in one mesh.  All certificates are DER."""

    mesh_id: MeshId
    node_id: NodeId
    leaf: bytes
    cas: tuple[bytes, ...]
    """Trusted authorities, the one that signed ``leaf`` first (more than one only while the CA is rotated)."""
    key: bytes
    """Private key of ``leaf``, PKCS8 DER."""

    @classmethod
    def of(cls, key: ec.EllipticCurvePrivateKey, leaf: bytes, cas: tuple[bytes, ...]) -> Membership:
        """Raises ``PeerError`` when ``leaf`` names no node or is not for ``key``."""
        certificate = load_certificate(leaf)
        if certificate.public_key() != key.public_key():
            raise PeerError("the certificate is for another key")
        subject = subject_of(certificate)
        secret = key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return cls(subject.mesh_id, subject.node_id, leaf, cas, secret)

    def to_pem(self) -> bytes:
        """Leaf, authorities, key: the order that ``SSLContext.load_cert_chain`` wants."""
        key = serialization.load_der_private_key(self.key, None)
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        parts = [load_certificate(der).public_bytes(pem) for der in (self.leaf, *self.cas)]
        return b"".join([*parts, key.private_bytes(pem, pkcs8, serialization.NoEncryption())])

    @classmethod
    def from_pem(cls, pem: bytes) -> Membership:
        """Raises ``ValueError`` when the file is damaged."""
        certificates = [c.public_bytes(serialization.Encoding.DER) for c in x509.load_pem_x509_certificates(pem)]
        # cryptography finds the first private key block; certificates before it are skipped by their label.
        key = serialization.load_pem_private_key(pem[pem.index(b"-----BEGIN PRIVATE KEY") :], None)
        if len(certificates) < 2 or not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("it must hold a leaf certificate, a CA certificate and a P-256 key")
        try:
            return cls.of(key, certificates[0], tuple(certificates[1:]))
        except PeerError as error:
            raise ValueError(str(error)) from None

    @property
    def renew_at(self) -> float:
        """Unix seconds at half of the leaf's life, when a new one should be asked for."""
        certificate = load_certificate(self.leaf)
        start, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
        return (start + end) / 2

    @property
    def expires(self) -> float:
        """Unix seconds."""
        return load_certificate(self.leaf).not_valid_after_utc.timestamp()
