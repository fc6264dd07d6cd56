"""What the nodes of a mesh say of themselves, watched over their own APIs: for the benchmarks of real processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.local_mesh import LocalMesh, LocalNode
from scripts.namespaces import Network, enter

EVERY_S = 0.01


Said = dict[str, Any]


def waited_s(node: LocalNode) -> float:
    """Seconds in which the node's loop was ready to run and got no processor, since it started (Linux; else 0).

    What a busy machine does to a figure: a node that could not run for half a second could not answer either.
    """
    try:
        return int(Path(f"/proc/{node.pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def digest(status: dict[str, Any]) -> Said:
    """What matters of /mesh/status to who watches members, coordinator and record."""
    states = {member["id"]: member["state"] for member in status["members"]}
    placement = status["placement"]
    return {
        "me": status["node_id"],
        "coordinator": status["coordinator"],
        "record": (*placement["id"][:1], placement["term"], placement["version"]),
        "voters": sorted(status["voters"]),
        "states": states,
    }


class Watcher(threading.Thread):
    """What one node says of itself and of the others, each change with its time."""

    def __init__(
        self,
        node: LocalNode,
        namespace: str = "",
        every_s: float = EVERY_S,
        digest: Callable[[dict[str, Any]], Said] = digest,
    ) -> None:
        super().__init__(daemon=True)
        self.node, self.namespace, self.every_s, self.digest = node, namespace, every_s, digest
        self.seen: list[tuple[float, Said]] = []
        self.stopping = threading.Event()

    def run(self) -> None:
        if self.namespace:
            enter(self.namespace)
        connection = http.client.HTTPConnection(self.node.api.removeprefix("http://"), timeout=5.0)
        while not self.stopping.wait(self.every_s):
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                connection.request("GET", "/mesh/status")
                now = self.digest(json.loads(connection.getresponse().read()))
                if not self.seen or self.seen[-1][1] != now:
                    self.seen.append((time.monotonic(), now))
                continue
            connection.close()
        connection.close()

    @property
    def now(self) -> Said:
        """What it said last; nothing before its first answer."""
        return self.seen[-1][1] if self.seen else {}

    def first(self, since: float, holds: Callable[[Said], bool]) -> float | None:
        """When it first said something for which ``holds``, s after ``since``."""
        return next((at - since for at, said in self.seen if at >= since and holds(said)), None)


def mesh_within(network: Network, models: list[str], flags: list[str]) -> LocalMesh:
    """A mesh, not started, whose nodes listen in the namespaces of ``network``, one each."""
    mesh = LocalMesh(len(network.names), models, flags=flags)
    for index, node in enumerate(mesh.nodes):
        node.peer = f"{network.address(index)}:9400"
    return mesh


def start_within(network: Network, mesh: LocalMesh) -> None:
    """As ``LocalMesh.start``, each node in its own namespace."""
    founder = mesh.nodes[0]
    network.within(0, founder.start)
    mesh.wait(lambda: network.within(0, founder.answers), "the founder to answer", 60.0)
    token = network.within(0, mesh.new_token)
    for index, node in enumerate(mesh.nodes[1:], start=1):
        network.within(index, lambda node=node: node.start(token))
