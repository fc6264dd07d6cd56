"""Network namespaces joined by one bridge: a network that can be cut on one machine.  Linux, iproute2, and the rights.

A cut is a wrong link address on both sides, so packets vanish without an error, as on a pulled cable.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
NOWHERE = "02:00:00:00:00:fe"


class NoRights(RuntimeError):
    """This machine does not let us make namespaces; the message says why."""


class Network:
    """``count`` namespaces with addresses 10.77.0.1, .2, ...; a context manager that removes them."""

    def __init__(self, count: int) -> None:
        self.names = [f"murmur-{os.getpid()}-{i}" for i in range(count)]
        self.hub = f"murmur-{os.getpid()}-hub"

    def __enter__(self) -> Network:
        try:
            self._make()
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            why = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
            raise NoRights(f"network namespaces are not permitted here: {why}") from error
        return self

    def __exit__(self, *error: object) -> None:
        for name in [*self.names, self.hub]:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip("netns", "delete", name)

    def _make(self) -> None:
        _ip("netns", "add", self.hub)
        _ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.hub, "link", "set", "bridge", "up")
        for index, name in enumerate(self.names):
            _ip("netns", "add", name)
            _ip("-n", self.hub, "link", "add", f"port{index}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self.hub, "link", "set", f"port{index}", "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address(index)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    @staticmethod
    def address(index: int) -> str:
        return f"10.77.0.{index + 1}"

    def cut(self, index: int) -> None:
        """Nothing arrives between ``index`` and any other."""
        for other in range(len(self.names)):
            if other != index:
                self._neighbour("replace", index, other, "lladdr", NOWHERE, "nud", "permanent")
                self._neighbour("replace", other, index, "lladdr", NOWHERE, "nud", "permanent")

    def heal(self, index: int) -> None:
        for other in range(len(self.names)):
            if other != index:
                self._neighbour("delete", index, other)
                self._neighbour("delete", other, index)

    def _neighbour(self, verb: str, at: int, of: int, *rest: str) -> None:
        _ip("-n", self.names[at], "neighbour", verb, self.address(of), *rest, "dev", "eth0")

    def within(self, index: int, act: Callable[[], T]) -> T:
        """``act()`` with every socket and process that it makes inside namespace ``index``."""
        results: list[T] = []

        def run() -> None:
            enter(self.names[index])
            results.append(act())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return results[0]


def enter(name: str) -> None:
    """Move the calling thread into a namespace; it cannot come back, so let it be a thread of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as handle:
        if libc.setns(handle.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {name}")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
