"""Who a node is: an Ed25519 key whose hash is its id, and an X25519 key for what is sealed to it.

Ids certify themselves: ``node_id_of(public key)`` is the id, so a signature that carries its public key proves who made
it with no directory to ask.  Signatures name a purpose, so that one made for gossip can never pass as one for joining.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from mesh.types import NodeId
from node.security import seal

ID_BYTES = 16
KEY_BYTES = 32
SIGNED_BYTES = KEY_BYTES + 64
"""Length of what ``Identity.sign`` returns: public key, then signature."""

SEAL_PURPOSE = "seal key"


class SealKey(msgspec.Struct, frozen=True, array_like=True):
    """A node's X25519 public key, bound to its identity: what the CA's key may be sealed to."""

    public: bytes
    """Raw, 32 bytes."""
    signed: bytes
    """``Identity.sign`` over ``public``."""


class Identity:
    """The two private keys of one data folder; they never leave the process."""

    def __init__(self, signing: Ed25519PrivateKey, sealing: X25519PrivateKey) -> None:
        self._signing, self._sealing = signing, sealing
        self.public_key = signing.public_key().public_bytes_raw()
        self.node_id = node_id_of(self.public_key)
        public = sealing.public_key().public_bytes_raw()
        self.seal_key = SealKey(public, self.sign(SEAL_PURPOSE, public))

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def from_secrets(cls, signing: bytes, sealing: bytes) -> Identity:
        """From the two raw private keys (32 bytes each).  Raises ``ValueError`` for another length."""
        return cls(Ed25519PrivateKey.from_private_bytes(signing), X25519PrivateKey.from_private_bytes(sealing))

    def secrets(self) -> tuple[bytes, bytes]:
        """The raw private keys, for the data folder only."""
        return self._signing.private_bytes_raw(), self._sealing.private_bytes_raw()

    def sign(self, purpose: str, message: bytes) -> bytes:
        """Public key and signature over ``purpose`` and ``message``, 96 bytes (measured 55-90 us)."""
        return self.public_key + self._signing.sign(_signed_bytes(purpose, message))

    def signer(self, purpose: str) -> Callable[[bytes], bytes]:
        """``sign`` for one purpose, as a pure function to hand to a protocol core."""
        return lambda message: self.sign(purpose, message)

    def unseal(self, sealed: bytes, aad: bytes) -> bytes:
        """Open what was sealed to ``seal_key.public``.  Raises ``PeerError``."""
        return seal.unseal(self._sealing, sealed, aad)


def node_id_of(public_key: bytes) -> NodeId:
    """The id that a raw Ed25519 public key certifies."""
    return NodeId(hashlib.sha256(public_key).hexdigest()[: 2 * ID_BYTES])


def is_node_id(text: str) -> bool:
    """Whether ``text`` has the form of a node id."""
    return len(text) == 2 * ID_BYTES and all(c in "0123456789abcdef" for c in text)


def verify(node_id: NodeId, purpose: str, message: bytes, signed: bytes) -> bool:
    """Whether ``signed`` is ``node_id``'s own signature over ``purpose`` and ``message`` (measured 115-190 us)."""
    if len(signed) != SIGNED_BYTES or node_id_of(signed[:KEY_BYTES]) != node_id:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(signed[:KEY_BYTES]).verify(
            signed[KEY_BYTES:], _signed_bytes(purpose, message)
        )
    except (InvalidSignature, ValueError):
        return False
    return True


def verifier(purpose: str) -> Callable[[NodeId, bytes, bytes], bool]:
    """``(node_id, message, signed) -> bool`` for one purpose, as a pure function to hand to a protocol core."""
    return lambda node_id, message, signed: verify(node_id, purpose, message, signed)


def verify_seal_key(node_id: NodeId, key: SealKey) -> bool:
    """Whether ``key`` is what ``node_id`` itself wants things sealed to."""
    return len(key.public) == KEY_BYTES and verify(node_id, SEAL_PURPOSE, key.public, key.signed)


def _signed_bytes(purpose: str, message: bytes) -> bytes:
    # No purpose holds a zero byte, so no two (purpose, message) pairs have the same form.
    return b"murmur\0" + purpose.encode() + b"\0" + message
