"""The full table of the oracle on real processes, with partitions where the machine permits them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from scripts.bench_models import Models
from scripts.local_mesh import LocalMesh, LocalNode
from scripts.namespaces import Network, NoRights, enter
from scripts.recovery.oracle import LAYERS, NODES, Case, Oracle, Outcome, sweep
from scripts.recovery.striking import Strikes

T = TypeVar("T")
PROCESS_FAULTS = ("kill", "freeze", "slow")
NETWORK_FAULTS = ("partition", "deaf", "mute")
FLAGS = ["--memory", "512MiB"]
PATIENCE_S = 600.0
Tell = Callable[[str], None]


class SpacedNode(LocalNode):
    """A node in a network namespace of its own, and whoever asks it goes there."""

    def place(self, network: Network, index: int) -> None:
        self.network, self.index = network, index
        self.peer = f"{network.address(index)}:9400"

    def start(self, token: str = "") -> None:
        self.within(lambda: super(SpacedNode, self).start(token))

    def get(self, path: str, timeout: float = 5.0) -> Any:
        return self.within(lambda: super(SpacedNode, self).get(path, timeout))

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        return self.within(lambda: super(SpacedNode, self).admin(method, path, body))

    def within(self, act: Callable[[], T]) -> T:
        done: Future[T] = Future()

        def run() -> None:
            try:
                enter(self.network.names[self.index])
                done.set_result(act())
            except BaseException as error:  # it is raised where it is waited for
                done.set_exception(error)

        threading.Thread(target=run).start()
        return done.result()


class Cuts(Strikes):
    """Strikes that also cut a node off: ``partition`` both ways, ``deaf`` (it hears nothing), ``mute`` (nobody hears
    it)."""

    def __init__(self, mesh: LocalMesh, network: Network) -> None:
        super().__init__(mesh)
        self.network = network

    def strike(self, fault: str, *nodes: LocalNode) -> None:
        if fault not in NETWORK_FAULTS:
            return super().strike(fault, *nodes)
        cut = [self.mesh.nodes.index(node) for node in nodes]
        others = [index for index in range(len(self.mesh.nodes)) if index not in cut]
        if fault in ("partition", "deaf"):
            self.network.block(cut, others)
        if fault in ("partition", "mute"):
            self.network.block(others, cut)
        self.note(fault, *nodes)

    def undo(self) -> None:
        self.network.clear()
        super().undo()


def swept(models: Models, only: str, tell: Tell) -> dict[str, Any]:
    """Every case of the table whose name has ``only`` in it, and what failed."""
    folder = models.tiny_words(LAYERS)
    outcomes: list[Outcome] = []
    cases = [case for case in sweep(PROCESS_FAULTS) if only in case.name]
    if cases:
        with LocalMesh(NODES, [str(folder)], flags=FLAGS, patience_s=PATIENCE_S) as mesh, Strikes(mesh) as strikes:
            outcomes += _play(mesh, strikes, cases, tell)
    left_out = ""
    cut = [case for case in sweep(NETWORK_FAULTS) if case.fault in NETWORK_FAULTS and only in case.name]
    if cut:
        try:
            outcomes += _play_cut(folder, cut, tell)
        except NoRights as error:
            left_out = str(error)
            tell(f"partitions are left out: {error}")
    return {"sweep": _judged(outcomes, left_out)}


def _play_cut(folder: Path, cases: list[Case], tell: Tell) -> list[Outcome]:
    with Network(NODES) as network:
        network.clear()  # whoever may not drop packets learns it before the mesh is started
        mesh = LocalMesh(NODES, [str(folder)], flags=FLAGS, patience_s=PATIENCE_S)
        nodes = [SpacedNode(n.name, n.folder, int(n.api.rpartition(":")[2]), 0, n.flags) for n in mesh.nodes]
        mesh.nodes = list(nodes)
        for index, node in enumerate(nodes):
            node.place(network, index)
        with mesh, Cuts(mesh, network) as strikes:
            return _play(mesh, strikes, cases, tell)


def _play(mesh: LocalMesh, strikes: Strikes, cases: list[Case], tell: Tell) -> list[Outcome]:
    mesh.wait_holders(NODES)
    oracle, outcomes = Oracle(mesh, strikes, "model"), []
    for case in cases:
        outcome = oracle.play(case)
        outcomes.append(outcome)
        told = [f"{x['cause']}@{x['hop']} {x['pause_ms']:.0f} ms" for x in outcome.recoveries]
        tell(f"{case.name}: {outcome.failure or 'equal'}; pause {outcome.pause_s:.2f} s; {', '.join(told)}")
        if outcome.failure:
            tell(f"  route {outcome.route}, struck {outcome.struck}; again: "
                 f"scripts/bench_recovery --sweep --filter {case.name}")  # fmt: skip
    return outcomes


def _judged(outcomes: list[Outcome], left_out: str) -> dict[str, Any]:
    failed = [outcome for outcome in outcomes if outcome.failure]
    found = {
        "cases": len(outcomes),
        "equal": len(outcomes) - len(failed),
        "by_fault": dict(Counter(outcome.case.fault for outcome in outcomes)),
        "recovered": sum(bool(outcome.recoveries) for outcome in outcomes),
        "causes": dict(Counter(x["cause"] for outcome in outcomes for x in outcome.recoveries)),
        "longest_pause_s": max((outcome.pause_s for outcome in outcomes), default=0.0),
        "failed": {outcome.case.name: outcome.failure[:200] for outcome in failed},
        "left_out": left_out,
    }
    what = "the oracle's table: (hop, moment, fault, greedy or seeded)"
    return {"what": what, "value": found, "unit": "cases", "goal": "all equal", "holds": bool(outcomes) and not failed,
            "anchor": None}  # fmt: skip
