"""Bytes that one node alone can open: X25519, HKDF-SHA256, ChaCha20-Poly1305 (the shape of HPKE, RFC 9180).

The private key of the mesh's CA travels and rests only in this form, once for each voter.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mesh.errors import PeerError

PUBLIC_BYTES = 32
TAG_BYTES = 16
# Each sealing draws its own key pair, so the derived key encrypts one message and the nonce may be constant.
_NONCE = bytes(12)


def seal(to_public: bytes, plaintext: bytes, aad: bytes) -> bytes:
    """``plaintext`` for the holder of ``to_public`` (raw X25519, 32 bytes): ephemeral public key, then ciphertext.

    ``aad`` is not sent: who opens must name the same.  Raises ``PeerError`` for a public key of low order.
    """
    ephemeral = X25519PrivateKey.generate()
    public = ephemeral.public_key().public_bytes_raw()
    key = _key(ephemeral, to_public, public + to_public)
    return public + ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, aad)


def unseal(private: X25519PrivateKey, sealed: bytes, aad: bytes) -> bytes:
    """The plaintext of ``sealed``.  Raises ``PeerError`` when it was changed, or sealed to another key or ``aad``."""
    if len(sealed) < PUBLIC_BYTES + TAG_BYTES:
        raise PeerError("sealed bytes are too short")
    public = sealed[:PUBLIC_BYTES]
    key = _key(private, public, public + private.public_key().public_bytes_raw())
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed[PUBLIC_BYTES:], aad)
    except InvalidTag:
        raise PeerError("sealed bytes are not for this key, or were changed") from None


def _key(private: X25519PrivateKey, public: bytes, salt: bytes) -> bytes:
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise PeerError("not an X25519 public key") from None
    return HKDF(hashes.SHA256(), length=32, salt=salt, info=b"murmur seal 1").derive(shared)
