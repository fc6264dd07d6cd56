"""Keys of people and programs: the admin key of one node, API keys of the mesh.

An API key is shown once, when it is made.  The record keeps SHA-256 of it: keys hold 256 random bits, so there is
nothing for a slow password hash to protect.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import Literal

from mesh.election.record import ApiKey

ADMIN_PREFIX = "mka-"
API_PREFIX = "mk-"
MAX_KEY_CHARS = 200

Scope = Literal["infer", "rag", "admin"]
SCOPES: tuple[Scope, ...] = ("infer", "rag", "admin")


def new_admin_key() -> str:
    """A fresh admin key: ``mka-`` and 43 characters."""
    return ADMIN_PREFIX + secrets.token_urlsafe(32)


def new_api_key(scope: Scope, name: str = "", expires_unix_s: float | None = None) -> tuple[str, ApiKey]:
    """A fresh key (``mk-`` and 43 characters; shown once) and the record of it that is committed."""
    key = API_PREFIX + secrets.token_urlsafe(32)
    return key, ApiKey(secrets.token_hex(8), hash_key(key), scope, name, expires_unix_s)


def hash_key(key: str) -> bytes:
    """SHA-256: what is stored."""
    return hashlib.sha256(key.encode()).digest()


def find_api_key(records: Iterable[ApiKey], presented: str, now: float) -> ApiKey | None:
    """The unexpired record of ``presented`` at unix second ``now``; each record is compared in constant time."""
    if not presented.startswith(API_PREFIX) or len(presented) > MAX_KEY_CHARS:
        return None
    digest = hash_key(presented)
    found = None
    for record in records:
        live = record.expires_unix_s is None or now < record.expires_unix_s
        if hmac.compare_digest(record.hash, digest) and live:
            found = record
    return found


def is_admin_key(presented: str, admin_key: str) -> bool:
    """Constant-time check of a presented admin key."""
    return hmac.compare_digest(hash_key(presented[:MAX_KEY_CHARS]), hash_key(admin_key))


def bearer(authorization: str | None) -> str:
    """The key in an ``Authorization: Bearer ...`` header; empty where there is none."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
