"""The nodes that a client knows: which to ask next, which to leave alone for a while.  Pure but for its rng."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Container, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

DOWN_S = 1.0
"""How long a node is left alone after its first failure; doubles with each further one."""
DOWN_MAX_S = 30.0
MAX_NODES = 1_000


@dataclass(slots=True)
class _Node:
    outstanding: int = 0
    failures: int = 0
    down_until: float = 0.0


class Nodes:
    """URLs given by the caller and those learned from the mesh.  ``now`` is any one monotonic clock, in seconds."""

    def __init__(self, urls: Iterable[str], rng: random.Random) -> None:
        self._given = tuple(dict.fromkeys(clean_url(url) for url in urls))
        if not self._given:
            raise ValueError("at least one URL of a node is needed")
        self._nodes = {url: _Node() for url in self._given}
        self._rng = rng

    def urls(self) -> list[str]:
        return list(self._nodes)

    def pick(self, now: float, tried: Container[str] = ()) -> str | None:
        """The one with the fewest requests under way, at random among equals; nodes that are down come last."""
        left = [(url, node) for url, node in self._nodes.items() if url not in tried]
        if not left:
            return None
        up = [pair for pair in left if pair[1].down_until <= now]
        if not up:
            return min(left, key=lambda pair: pair[1].down_until)[0]
        least = min(node.outstanding for _, node in up)
        return self._rng.choice([url for url, node in up if node.outstanding == least])

    def began(self, url: str) -> None:
        self._nodes[url].outstanding += 1

    def ended(self, url: str) -> None:
        if url in self._nodes:
            self._nodes[url].outstanding -= 1

    def failed(self, url: str, now: float) -> None:
        """It did not answer, or broke off."""
        node = self._nodes.get(url)
        if node is not None:
            node.down_until = now + min(DOWN_MAX_S, DOWN_S * 2.0**node.failures)
            node.failures = min(node.failures + 1, 10)

    def worked(self, url: str) -> None:
        node = self._nodes.get(url)
        if node is not None:
            node.failures, node.down_until = 0, 0.0

    def learn(self, urls: Iterable[str], source: str) -> None:
        """Take in what the node at ``source`` says of its mesh; forget learned nodes that are idle and gone from it.

        A loopback address of another machine means this one, and a key that went out over TLS must not go out in
        clear: such URLs are left out.
        """
        told = {url for url in map(_try_clean, urls) if url is not None and _safe(url, source)}
        for url in sorted(told)[:MAX_NODES]:
            self._nodes.setdefault(url, _Node())
        for url, node in list(self._nodes.items()):
            if url not in told and url not in self._given and not node.outstanding:
                del self._nodes[url]


def clean_url(url: str) -> str:
    """``url`` without a trailing slash or /v1; ValueError unless it is http or https with a host."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"not a URL of a node: {url!r}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def _try_clean(url: str) -> str | None:
    try:
        return clean_url(url) if "://" in url else None
    except ValueError:
        return None


def _safe(url: str, source: str) -> bool:
    learned, known = urlsplit(url), urlsplit(source)
    if known.scheme == "https" and learned.scheme != "https":
        return False
    return _loopback(known.hostname) or not _loopback(learned.hostname)


def _loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
