"""API keys: made once, kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import TypeVar

PREFIX = "mk-"
T = TypeVar("T")


def make_key() -> str:
    """A fresh key of 192 bits."""
    return PREFIX + secrets.token_urlsafe(24)


def hash_key(key: str) -> str:
    """SHA-256 (hex).  A plain hash is enough: the keys are random, there is nothing to guess."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def match_key(presented: str, stored: Iterable[tuple[str, T]]) -> T | None:
    """What belongs to the stored hash of ``presented``; every pair is looked at, match or not."""
    wanted, found = hash_key(presented).encode(), None
    for hashed, owner in stored:
        if hmac.compare_digest(wanted, hashed.encode()):
            found = owner
    return found
