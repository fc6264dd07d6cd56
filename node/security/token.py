"""Join tokens: one line of text that lets a machine into a mesh, and lets it recognise that mesh first.

The committed record keeps a *verifier* derived from the secret, not the secret, which is never stored or sent.  To be
honest about it: who reads the record (every member does) could use the verifier to pose as the token's bearer while the
token lives.  That gains nothing that a member does not have; it is why a token expires, and is not a password.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets

import msgspec

from mesh.election import record
from mesh.errors import ConfigError
from mesh.types import MeshId, NodeId

PREFIX = "mesh1."
DEFAULT_TTL_S = 86_400.0
UNLIMITED = -1
MAX_TOKEN_CHARS = 4096
MAX_SEEDS = 16
_SECRET_BYTES = 32


class JoinToken(msgspec.Struct, frozen=True, array_like=True):
    """What the text of a token holds."""

    mesh_id: MeshId
    seeds: tuple[str, ...]
    """``host:port`` of members to ask, in this order."""
    ca_sha256: bytes
    token_id: str
    secret: bytes

    def encode(self) -> str:
        """``mesh1.`` and base64url without padding (about 200 characters)."""
        return PREFIX + base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).rstrip(b"=").decode()

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        """Raises ``ConfigError`` in one line for text that is no token."""
        text = text.strip()
        if not text.startswith(PREFIX) or len(text) > MAX_TOKEN_CHARS:
            raise ConfigError(f"not a join token: it must start with {PREFIX} and be one line")
        body = text.removeprefix(PREFIX)
        try:
            raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            token = msgspec.msgpack.decode(raw, type=cls)
        except (binascii.Error, ValueError, msgspec.DecodeError):
            raise ConfigError("the join token is damaged or cut short: copy it again") from None
        whole = len(token.ca_sha256) == 32 and len(token.secret) == _SECRET_BYTES
        if not whole or not 0 < len(token.seeds) <= MAX_SEEDS:
            raise ConfigError("the join token is damaged: copy it again")
        return token


def mint(
    mesh_id: MeshId,
    seeds: tuple[str, ...],
    ca_sha256: bytes,
    now: float,
    *,
    ttl_s: float = DEFAULT_TTL_S,
    uses: int = 1,
    created_by: NodeId,
) -> tuple[JoinToken, record.JoinToken]:
    """A new token to hand out, and the record of it to commit.  ``now`` is unix seconds; ``uses`` -1 is unlimited."""
    if ttl_s <= 0 or uses < UNLIMITED or uses == 0:
        raise ConfigError("a token needs a time to live above 0 s, and at least one use (or -1: unlimited)")
    secret = secrets.token_bytes(_SECRET_BYTES)
    token = JoinToken(mesh_id, seeds[:MAX_SEEDS], ca_sha256, secrets.token_hex(8), secret)
    kept = record.JoinToken(token.token_id, verifier(secret), now + ttl_s, uses, created_by)
    return token, kept


def verifier(secret: bytes) -> bytes:
    """The key that proofs are checked with: one way from the secret (256 random bits, so no slow hash is needed)."""
    return hashlib.sha256(b"murmur join token 1" + secret).digest()


def prove(key: bytes, claim: bytes) -> bytes:
    """HMAC-SHA-256 over a join claim, under ``verifier(secret)``."""
    return hmac.digest(key, claim, "sha256")


def revoked(kept: record.JoinToken) -> record.JoinToken:
    """``kept``, closed for good; it stays in the record until pruned, so that refusals can say why."""
    return msgspec.structs.replace(kept, expires_unix_s=0.0)


def why_closed(kept: record.JoinToken, now: float) -> str:
    """``revoked``, ``expired`` or ``used_up``; empty: the token is good."""
    if not kept.expires_unix_s:
        return "revoked"
    if now >= kept.expires_unix_s:
        return "expired"
    return "used_up" if kept.uses_left == 0 else ""


def used(kept: record.JoinToken) -> record.JoinToken:
    """``kept`` after one more admission."""
    return kept if kept.uses_left == UNLIMITED else msgspec.structs.replace(kept, uses_left=kept.uses_left - 1)
