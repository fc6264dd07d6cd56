"""Network namespaces joined by one bridge: a network that can be cut and made lossy on one machine.

Linux, root, iproute2; ``lose`` and ``block`` need nftables too.  Packets vanish without an error, as on a pulled cable:
``cut`` writes a wrong link address on both sides, the others drop what comes in.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Collection
from typing import TypeVar

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
NOWHERE = "02:00:00:00:00:fe"
TABLE = "table inet murmur"


class NoRights(RuntimeError):
    """This machine lacks a right or a tool for namespaces; the message names it."""


class Network:
    """``count`` namespaces with addresses 10.77.0.1, .2, ...; a context manager that removes them."""

    def __init__(self, count: int) -> None:
        self.names = [f"murmur-{os.getpid()}-{i}" for i in range(count)]
        self.hub = f"murmur-{os.getpid()}-hub"

    def __enter__(self) -> Network:
        if shutil.which("ip") is None:
            raise NoRights("the command ip is missing: install iproute2")
        try:
            self._make()
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            raise NoRights(f"network namespaces are not permitted here (root is needed): {_why(error)}") from error
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

    def lose(self, percent: int) -> None:
        """Each namespace drops so much of what comes in, by chance: UDP and TCP, so both ways of every connection."""
        for index in range(len(self.names)):
            self._drop(index, f"numgen random mod 100 < {percent}")

    def block(self, at: Collection[int], of: Collection[int]) -> None:
        """``at`` hear nothing of ``of``: one way.  What was dropped before at ``at`` is heard again."""
        sources = ", ".join(self.address(index) for index in of)
        for index in at:
            self._drop(index, f"ip saddr {{ {sources} }}")

    def clear(self) -> None:
        """Nothing is dropped any more."""
        for index in range(len(self.names)):
            self._nft(index, f"{TABLE}\ndelete {TABLE}\n")

    def _drop(self, at: int, match: str) -> None:
        rules = f'type filter hook input priority 0\niifname "eth0" {match} drop\n'
        self._nft(at, f"{TABLE}\ndelete {TABLE}\n{TABLE} {{\nchain input {{\n{rules}}}\n}}\n")

    def _nft(self, at: int, script: str) -> None:
        if shutil.which("nft") is None:
            raise NoRights("the command nft is missing: install nftables")
        command = ["ip", "netns", "exec", self.names[at], "nft", "-f", "-"]
        done = subprocess.run(command, input=script, capture_output=True, text=True)
        if done.returncode != 0:
            raise NoRights(f"nft cannot drop packets here: {done.stderr.strip()}")

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


def _why(error: OSError | subprocess.CalledProcessError) -> str:
    return error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
