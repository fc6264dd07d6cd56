"""TLS 1.3 between peers: our CA alone, both ends by certificate, checked by OpenSSL in the handshake.

The server takes connections without a certificate, because a joiner has none yet; the peer door's middleware lets those
reach ``/peer/join`` only (``ssl`` has no way to ask per path).  The client always knows whom it calls: it names
``node_name(mesh, id)`` as the server, and OpenSSL's own host name check refuses any other node before a byte is sent.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError, PeerError
from mesh.types import MeshId
from node.security.ca import Subject, parse_uris
from node.security.membership import Membership


class PeerTls:
    """The two contexts of a member; ``reload`` puts a renewed certificate on them while they serve."""

    def __init__(self, pem: Path, membership: Membership) -> None:
        """``pem`` is ``Membership.to_pem()`` on disk: the ssl module reads keys from files only."""
        self.pem = pem
        self.mesh_id: MeshId = membership.mesh_id
        self.server = _context(ssl.PROTOCOL_TLS_SERVER, membership.cas)
        self.server.verify_mode = ssl.CERT_OPTIONAL
        # A resumed session would carry a client's identity past its certificate's end.
        self.server.num_tickets = 0
        self.client = pinned_client(membership.cas)
        self.reload()

    def reload(self, membership: Membership | None = None) -> None:
        """Use the certificate and key now in the file for every handshake from here on.  Raises ``ConfigError``.

        With ``membership``, its authorities are trusted as well; ssl can add a root to a live context, not remove one.
        """
        for context in (self.server, self.client):
            _trust(context, membership.cas if membership else ())
        try:
            self.server.load_cert_chain(self.pem)
            self.client.load_cert_chain(self.pem)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"cannot load {self.pem}: {error}") from error


def pinned_client(cas: tuple[bytes, ...]) -> ssl.SSLContext:
    """A client context that believes servers of these authorities (DER) only, by the server name it is given."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, cas)
    context.check_hostname = True
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def looking_client() -> ssl.SSLContext:
    """A client context that believes anybody: only for reading a chain before anything is said."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def peer_subject(ssl_object: Any) -> Subject | None:
    """Whom the other end's verified certificate names; ``None`` where it showed none.

    Raises ``PeerError`` for a certificate of ours that names no node (the CA's own, say).
    """
    certificate = ssl_object.getpeercert() if ssl_object is not None else None
    if not certificate:
        return None
    return parse_uris(value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI")


def unverified_chain(ssl_object: Any) -> list[bytes]:
    """What the server sent in the handshake, leaf first, as DER.

    Public since Python 3.13; in 3.11 and 3.12, which no longer change, the same call sits on the inner object.
    """
    if hasattr(ssl_object, "get_unverified_chain"):
        return list(ssl_object.get_unverified_chain() or ())
    import _ssl

    chain = ssl_object._sslobj.get_unverified_chain() or ()
    return [certificate.public_bytes(_ssl.ENCODING_DER) for certificate in chain]


def _context(protocol: int, cas: tuple[bytes, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _trust(context, cas)
    return context


def _trust(context: ssl.SSLContext, cas: tuple[bytes, ...]) -> None:
    for der in cas:
        try:
            context.load_verify_locations(cadata=der)
        except ssl.SSLError as error:
            raise PeerError(f"not a CA certificate: {error.reason}") from None
