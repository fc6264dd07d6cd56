"""Host names of peers, looked up without making anybody wait."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time

KEEP_S = 60.0
MAX_NAMES = 4096


class Names:
    """A cache in front of the resolver; an address passes through untouched."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[tuple[str, int], float]] = {}
        self._asking: dict[tuple[str, int], asyncio.Task[None]] = {}

    def find(self, address: tuple[str, int]) -> tuple[str, int] | None:
        """The IP and port of ``address`` if they are known; else ``None``, and a look-up begins."""
        known = self._known.get(address)
        if known is None:
            if _is_ip(address[0]):
                return self._keep(address, address, float("inf"))
            self._ask(address)
            return None
        if known[1] < time.monotonic():
            self._ask(address)  # the old answer serves until the new one is here
        return known[0]

    def close(self) -> None:
        for task in self._asking.values():
            task.cancel()

    def _ask(self, address: tuple[str, int]) -> None:
        if address not in self._asking and len(self._asking) < MAX_NAMES:
            self._asking[address] = asyncio.get_running_loop().create_task(self._look_up(address))

    async def _look_up(self, address: tuple[str, int]) -> None:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(*address, type=socket.SOCK_DGRAM)
        except (OSError, UnicodeError):
            return  # asked again by the next datagram
        finally:
            del self._asking[address]
        where = found[0][4]
        self._keep(address, (str(where[0]), int(where[1])), time.monotonic() + KEEP_S)

    def _keep(self, address: tuple[str, int], where: tuple[str, int], until: float) -> tuple[str, int]:
        while len(self._known) >= MAX_NAMES:
            self._known.pop(next(iter(self._known)))
        self._known[address] = (where, until)
        return where


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
