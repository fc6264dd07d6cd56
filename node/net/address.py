"""Addresses as ``host:port`` text, and the pair of sockets (TCP and UDP) that one of them names."""

from __future__ import annotations

import errno
import socket

from mesh.errors import ConfigError

_PAIR_TRIES = 20


def parse_address(text: str, field: str = "address") -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[v6]:port``.  Raises ``ConfigError`` naming ``field``."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # an IPv6 address without brackets: where it ends is a guess
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{field} must be HOST:PORT, not {text!r}")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """The text form, with brackets where the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind_pair(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """A listening TCP and a UDP socket on the same port, non-blocking; port 0 draws one that is free for both.

    Raises ``ConfigError`` that names the address, the protocol and the reason.
    """
    for _ in range(_PAIR_TRIES):
        tcp = _bind(host, port, socket.SOCK_STREAM)
        try:
            udp = _bind(host, tcp.getsockname()[1], socket.SOCK_DGRAM)
        except _InUse as error:
            tcp.close()
            if port:
                raise ConfigError(str(error)) from None
            continue
        except ConfigError:
            tcp.close()
            raise
        tcp.listen(256)
        return tcp, udp
    raise ConfigError(f"found no port on {host} that is free for both TCP and UDP")


class _InUse(ConfigError):
    """Another process has the port."""


def _bind(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    name = "TCP" if kind == socket.SOCK_STREAM else "UDP"
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host}: {error}") from None
    sock = socket.socket(family, kind)
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
    except OSError as error:
        sock.close()
        text = f"cannot listen on {format_address(host, port)} ({name}): {error.strerror}"
        raise (_InUse if error.errno == errno.EADDRINUSE else ConfigError)(text) from None
    sock.setblocking(False)
    return sock
