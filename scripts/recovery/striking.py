"""Faults on the nodes of a local mesh, and one stream while they strike: for live tests and benchmarks of recovery."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from client import MeshClient
from scripts.local_mesh import LocalMesh, LocalNode

FROZEN_S = 4.0
"""How long a frozen node stands still: past every deadline of a session, so that it wakes to a route without it."""
SLOWED_S = 6.0
SLICE_S = 0.01
"""A slow node runs for this long of ten times as long."""


class Strikes:
    """What was done to a mesh's nodes, and its undoing.  A context manager: at its end all run again, as before."""

    def __init__(self, mesh: LocalMesh) -> None:
        self.mesh = mesh
        self.done: list[tuple[float, str, str]] = []
        """(``time.monotonic()``, fault, node), in order."""
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Strikes:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def strike(self, fault: str, *nodes: LocalNode) -> None:
        """``kill``, ``freeze`` (for ``FROZEN_S``) or ``slow`` (tenfold, for ``SLOWED_S``) all ``nodes`` at once."""
        self.note(fault, *nodes)
        for node in nodes:
            if fault == "kill":
                node.signal(signal.SIGKILL)
            else:
                node.signal(signal.SIGSTOP)
                self._spawn(self._wake if fault == "freeze" else self._slow_down, node)

    def note(self, fault: str, *nodes: LocalNode) -> None:
        self.done += [(time.monotonic(), fault, node.name) for node in nodes]

    def wait(self) -> None:
        """Until what is frozen or slow runs again by itself."""
        for thread in self._threads:
            thread.join()

    def undo(self) -> None:
        """Wake and restart, and wait until every node serves again."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._over.clear()
        self._threads.clear()
        killed = {name for _, fault, name in self.done if fault == "kill"}  # the last of them may still be dying
        for node in [node for node in self.mesh.nodes if node.name in killed or not node.running]:
            node.kill()  # reaps it
            node.start()
        if self.done:
            self.mesh.wait_ready()
        self.done.clear()

    def _spawn(self, act: Callable[[LocalNode], None], node: LocalNode) -> None:
        thread = threading.Thread(target=act, args=(node,))
        self._threads.append(thread)
        thread.start()

    def _wake(self, node: LocalNode) -> None:
        self._over.wait(FROZEN_S)
        node.signal(signal.SIGCONT)

    def _slow_down(self, node: LocalNode) -> None:
        end = time.monotonic() + SLOWED_S
        while time.monotonic() < end and node.running:
            node.signal(signal.SIGSTOP)
            if self._over.wait(9 * SLICE_S):
                break
            node.signal(signal.SIGCONT)
            time.sleep(SLICE_S)
        node.signal(signal.SIGCONT)


class Streamed:
    """One completion through the SDK: its text, when each piece came, what was told of it."""

    def __init__(self, mesh: LocalMesh, entry: LocalNode, body: dict[str, Any], patience_s: float = 60.0) -> None:
        self.mesh, self.entry, self.body, self.patience_s = mesh, entry, body, patience_s
        self.pieces: list[tuple[float, int]] = []
        """(when, characters so far)."""
        self.text = ""
        self.finish: str | None = None
        self.route: tuple[str, ...] = ()
        """Names of its hops when it began."""
        self.recoveries: tuple[dict[str, Any], ...] = ()
        self.moves = 0
        self.asked_at = 0.0
        self.error = ""

    def run(self, on_piece: Callable[[int], None] = lambda count: None) -> Streamed:
        """To its end.  ``on_piece``: called with the count of pieces so far."""
        prompt = self.body["prompt"]
        params = {name: value for name, value in self.body.items() if name != "prompt"}
        self.asked_at = time.monotonic()
        with knowing(self.mesh, self.entry, self.patience_s) as client:
            stream = client.complete(prompt, stream=True, **params)
            try:
                for piece in stream:
                    self.route = self.route or hops(piece.route)
                    self.finish = piece.finish_reason or self.finish
                    self.recoveries = piece.usage.recoveries if piece.usage is not None else self.recoveries
                    if piece.text:
                        self.text += piece.text
                        self.pieces.append((time.monotonic(), len(self.text)))
                        on_piece(len(self.pieces))
            finally:
                self.moves = stream.progress.moves
        return self

    def try_run(self, on_piece: Callable[[int], None] = lambda count: None) -> Streamed:
        """As ``run``; an error is kept in ``error``."""
        try:
            return self.run(on_piece)
        except Exception as error:  # whatever it is, it is the outcome
            self.error = f"{type(error).__name__}: {error}"
            return self

    def pause_s(self, since: float) -> float:
        """The longest time without a piece that ended after ``since``, counted from then at the earliest."""
        times = [at for at, _ in self.pieces]
        begins = [since, *(at for at in times if at > since)]
        return max((b - a for a, b in itertools.pairwise(begins)), default=0.0)

    def gaps(self, start: float, end: float) -> list[float]:
        """Between the pieces that came in [start, end)."""
        times = [at for at, _ in self.pieces if start <= at < end]
        return [b - a for a, b in itertools.pairwise(times)]


@contextlib.contextmanager
def knowing(mesh: LocalMesh, entry: LocalNode, patience_s: float = 60.0) -> Any:
    """A client that asks ``entry`` first and knows the others."""
    with MeshClient([entry.api], patience_s=patience_s) as client:
        nodes = client._client.nodes
        nodes.learn([node.api for node in mesh.nodes], entry.api)
        for node in mesh.nodes:
            if node is not entry:
                nodes.began(node.api)
        yield client


def hops(route: str) -> tuple[str, ...]:
    """The names in ``node-1:0-4,node-2:4-8``."""
    return tuple(hop.split(":")[0] for hop in route.split(",")) if route else ()


def by_name(mesh: LocalMesh, names: Sequence[str]) -> list[LocalNode]:
    return [node for name in names for node in mesh.nodes if node.name == name]


def running_route(entry: LocalNode) -> tuple[str, ...]:
    """Names of the hops of the session that ``entry`` runs, once it has a route; else empty."""
    status = entry.get("/mesh/status")
    names = {member["id"]: member["name"] for member in status["members"]}
    routes = [item["route"] for item in status["sessions"]["items"] if item["route"]]
    return tuple(names[hop["node"]] for hop in routes[0]) if routes else ()


def coordinator_of(mesh: LocalMesh, timeout: float = 60.0) -> LocalNode:
    """The node that all running nodes hold for the coordinator."""
    found: list[LocalNode] = []

    def agreed() -> bool:
        try:
            said = [node.get("/mesh/status") for node in mesh.nodes if node.running]
        except OSError:  # it is busy, or has just been struck
            return False
        leaders = {status["coordinator"] for status in said}
        names = {member["id"]: member["name"] for member in said[0]["members"]}
        found[:] = by_name(mesh, [names.get(leader, "") for leader in leaders])
        return len(leaders) == 1 and len(found) == 1

    mesh.wait(agreed, "one coordinator", timeout)
    return found[0]
