"""Who may ask what: Host and Origin, content type, API keys and scopes.

A browser page on another site can reach a loopback API in two ways: by a cross-site request (it carries a foreign
Origin) and by DNS rebinding (it carries a foreign Host name).  Both are refused before anything else is looked at;
address literals as Host are safe, since no page can make its own origin out of our address.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from aiohttp import web

from mesh.errors import ConfigError, RequestError
from node.api.service import Caller, Scope, Service

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/health", "/ready", "/version")
"""Need no key even where keys are needed: load balancers and probes have none."""


def is_loopback(host: str) -> bool:
    """Whether a bind address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, has_keys: bool) -> None:
    """ConfigError for a public address without any API key: an open door to the mesh's compute."""
    if not is_loopback(host) and not has_keys:
        raise ConfigError(
            f"--api {host}: an address that others can reach needs an API key; make one with "
            "`python -m node key create --scope infer` while the API is on loopback"
        )


class Guard:
    """The rules of one node's public door."""

    def __init__(self, host: str, names: tuple[str, ...] = (), origins: tuple[str, ...] = ()) -> None:
        self.keyless = is_loopback(host)
        self._names = frozenset(n.lower() for n in (*LOOPBACK_NAMES, host.strip("[]"), *names))
        self._origins = frozenset(o.lower().rstrip("/") for o in origins)

    def check_source(self, request: web.Request) -> None:
        """RequestError 403 for a foreign Host or Origin, 415 for a POST that is not JSON."""
        host = request.headers.get("Host", "")
        if not self._known(host):
            raise RequestError(f"Host {host[:100]!r} is not served here", code="host_not_allowed", status=403)
        origin = request.headers.get("Origin")
        if origin is not None and not self._same(origin, host):
            raise RequestError(f"Origin {origin[:100]!r} is not allowed", code="origin_not_allowed", status=403)
        if request.method == "POST" and request.content_type != "application/json":
            raise RequestError("a POST needs Content-Type: application/json", code="unsupported_media_type", status=415)

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name is not None and (name in self._names or _is_address(name))

    def _same(self, origin: str, host: str) -> bool:
        scheme, _, rest = origin.lower().partition("://")
        return (scheme in ("http", "https") and rest == host.lower()) or origin.lower() in self._origins

    def caller(self, request: web.Request, service: Service) -> Caller:
        """Who asks.  RequestError 401 where a key is needed and none or a wrong one came.

        On a keyless loopback door an unknown key is ignored: OpenAI's SDK cannot be used without one, so people
        send placeholders.
        """
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        known = service.check_key(key.strip()) if scheme.lower() == "bearer" and key.strip() else None
        if known is not None:
            return known
        if self.keyless or request.path in OPEN_PATHS:
            return Caller()
        raise RequestError(
            "a valid API key is needed (Authorization: Bearer mk-...)", code="invalid_api_key", status=401
        )


def need(caller: Caller, scope: Scope) -> None:
    """RequestError unless ``caller`` may do what ``scope`` stands for."""
    if scope in caller.scopes:
        return
    if scope == "admin":
        raise RequestError("this needs the admin key", code="invalid_api_key", status=401)
    raise RequestError(f"this key lacks the scope {scope}", code="insufficient_scope", status=403)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
