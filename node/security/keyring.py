"""The seal on gossip datagrams: AES-256-GCM under a ring of keys, bound to the mesh.

    version u8 | key id u8 | nonce 96 bit | AES-256-GCM( sender 16 bytes | unix seconds u32 | message ) + tag 16 bytes
    additional data: "murmur gossip", version, key id, mesh id

In the committed record a key is its id and its 32 bytes; the first of them seals, all of them open.  So a rotation is
three commits: add the new key last, move it to the front, drop the old one.  Nonces are random:
at most 2^32 datagrams under one key keep a collision below 2^-32 (NIST SP 800-38D), which is 50 days of a mesh of 100
nodes at 10 datagrams a second each; the key must be rotated within that.  Replays: a datagram older than
``CLOCK_SKEW_S`` is dropped; within it, incarnations and sequence numbers of the gossip protocol hold.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mesh.errors import PeerError
from mesh.types import MeshId, NodeId
from node.identity import ID_BYTES
from node.security.ca import CLOCK_SKEW_S

VERSION = 1
KEY_BYTES = 32
MAX_DATAGRAM = 1200
"""Bytes of UDP payload: fits every path that IPv6 allows, headers included."""
_NONCE_BYTES, _TAG_BYTES, _HEAD = 12, 16, 2
_STAMP = struct.Struct("!I")
OVERHEAD = _HEAD + _NONCE_BYTES + _TAG_BYTES + ID_BYTES + _STAMP.size
MAX_MESSAGE = MAX_DATAGRAM - OVERHEAD
MIN_DATAGRAM = OVERHEAD


def new_gossip_key(ring: tuple[bytes, ...] = ()) -> bytes:
    """A fresh key for the record (id byte, 32 bytes) with an id that no key of ``ring`` has."""
    used = {key[0] for key in ring}
    key_id = next(key_id for key_id in range(256) if key_id not in used)
    return bytes((key_id,)) + os.urandom(KEY_BYTES)


class KeyRing:
    """The keys in use.  ``set_keys`` replaces them while datagrams flow."""

    def __init__(self, mesh_id: MeshId, keys: Sequence[bytes]) -> None:
        self._mesh = mesh_id.encode()
        self.set_keys(keys)

    def set_keys(self, keys: Sequence[bytes]) -> None:
        """``keys`` as in the record.  Raises ``PeerError`` where there is none, or one is malformed."""
        if not keys or any(len(key) != 1 + KEY_BYTES for key in keys) or len({key[0] for key in keys}) < len(keys):
            raise PeerError("a gossip key ring holds keys of 33 bytes with distinct ids, and at least one")
        self._ciphers = {key[0]: AESGCM(key[1:]) for key in keys}
        self._primary = keys[0][0]

    def seal(self, sender: NodeId, message: bytes, now: float) -> bytes:
        """A datagram; ``now`` is unix seconds.  Raises ``ValueError`` when ``message`` passes ``MAX_MESSAGE``."""
        if len(message) > MAX_MESSAGE:
            raise ValueError(f"{len(message)} bytes do not fit a datagram of {MAX_MESSAGE}: use the peer stream")
        head = bytes((VERSION, self._primary))
        nonce = os.urandom(_NONCE_BYTES)
        plain = bytes.fromhex(sender) + _STAMP.pack(int(now)) + message
        return head + nonce + self._ciphers[self._primary].encrypt(nonce, plain, self._aad(head))

    def open(self, datagram: bytes, now: float) -> tuple[NodeId, bytes]:
        """Sender and message.  Raises ``PeerError`` for anything not sealed by this mesh, too long, or too old."""
        if not MIN_DATAGRAM <= len(datagram) <= MAX_DATAGRAM or datagram[0] != VERSION:
            raise PeerError("not a datagram of ours")
        cipher = self._ciphers.get(datagram[1])
        if cipher is None:
            raise PeerError("sealed with an unknown key")
        nonce, body = datagram[_HEAD : _HEAD + _NONCE_BYTES], datagram[_HEAD + _NONCE_BYTES :]
        try:
            plain = cipher.decrypt(nonce, body, self._aad(datagram[:_HEAD]))
        except InvalidTag:
            raise PeerError("sealed by another mesh, or changed") from None
        (stamp,) = _STAMP.unpack_from(plain, ID_BYTES)
        if abs(now - stamp) > CLOCK_SKEW_S:
            raise Stale(f"sealed {now - stamp:.0f} s ago by the sender's clock")
        return NodeId(plain[:ID_BYTES].hex()), plain[ID_BYTES + _STAMP.size :]

    def _aad(self, head: bytes) -> bytes:
        return b"murmur gossip" + head + self._mesh


class Stale(PeerError):
    """Rightly sealed, but outside the time window: a replay, or a clock that is wrong."""
