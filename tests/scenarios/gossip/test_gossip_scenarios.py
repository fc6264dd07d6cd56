"""Plays the transcripts of this folder: commands, and what the members then hold of each other.

The form is that of ``tests/scenarios``: lines with ``|`` are the output of the command above them, all of it;
``python tests/scenarios/gossip/test_gossip_scenarios.py`` writes what it sees into the files.

Time is virtual, links take 1 ms, chance comes from a fixed seed.  A node writes one line for each change of what it
holds (``a: b alive -> suspect``), for each refutation and rejection; equal lines of several nodes within a tenth of a
second are one line.

    mesh a b c                 members of one mesh, which joined through the first of them; it takes a second
    config wan | probe_period_s=1 ...   before ``mesh``
    stranger x through a       a node of another mesh that was given a's address
    newcomer d through a       a node of this mesh
    run 2.5                    seconds
    crash a | crash a silently      kill -9 (its peers see a reset), or the power goes
    restart a   pause a   resume a  wipe a    a restarted node has another address; ``wipe``: and lost its disk
    leave a    move a host:port
    part a b | c d             the mesh in two; ``cut a b`` one link; ``loss 0.3`` on all links; ``heal`` mends all
    state                      one line per node: what it holds, with incarnations counted from 0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gossip import config as configs
from gossip import events as ev
from mesh.core import Rejected
from mesh.types import MeshId, NodeId
from tests.sim.gossip_checks import GossipChecks
from tests.sim.gossip_world import MESH, WireCodec, add_node
from tests.sim.world import Fault, NetParams, World

HERE = Path(__file__).parent
SCRIPTS = sorted(HERE.glob("*.txt"))
OTHER_MESH = MeshId("x" * 32)


class Player:
    """One transcript's world, and what it has said since the last command."""

    def __init__(self) -> None:
        self.config = configs.lan()
        net = NetParams(base_s=0.001, jitter_s=0.0)
        self.world = World(1, net, codec=WireCodec(), reliable=lambda message: type(message).__name__ in STREAM_NAMES)
        self.checks = GossipChecks(self.world)
        self.told: list[tuple[float, str, str]] = []

    def play(self, command: str) -> list[str]:
        verb, *words = command.split()
        answer = getattr(self, f"_{verb}")(words) or []
        told, self.told = self.told, []
        return [*answer, *_folded(told)]

    # -- members

    def _config(self, words: list[str]) -> None:
        for word in words:
            name, eq, value = word.partition("=")
            self.config = (
                msgspec.structs.replace(self.config, **{name: float(value)}) if eq else getattr(configs, name)()
            )

    def _mesh(self, words: list[str]) -> None:
        for name in words:
            self._add(name, words[0], MESH)
            self.world.run(self.world.now + 0.05)
        self.world.run(self.world.now + 1.0)
        self.told.clear()

    def _newcomer(self, words: list[str]) -> None:
        self._add(words[0], words[2], MESH)

    def _stranger(self, words: list[str]) -> None:
        self._add(words[0], words[2], OTHER_MESH)

    def _add(self, name: str, seed: str, mesh: MeshId) -> None:
        ids = [NodeId(seed), NodeId(name)] if name != seed else [NodeId(name)]
        add_node(self.world, ids, len(ids) - 1, self.config, known=1, mesh=mesh)
        self.world.nodes[name].on_emit = lambda event, now: self._note(name, event)

    def _note(self, name: str, event: Any) -> None:
        if isinstance(event, ev.MemberChanged):
            self.told.append((self.world.now, name, f"{event.node} {event.old or 'unknown'} -> {event.new}"))
        elif isinstance(event, ev.Refuted):
            self.told.append((self.world.now, name, f"refutes: {event.sender} held it {event.held}"))
        elif isinstance(event, Rejected):
            self.told.append((self.world.now, name, f"rejects {event.why}"))
        elif isinstance(event, ev.Departed):
            self.told.append((self.world.now, name, "has left"))

    # -- time and weather

    def _run(self, words: list[str]) -> None:
        self.world.run(self.world.now + float(words[0]))

    def _fault(self, kind: Any, nodes: list[str], other: tuple[str, ...] = (), value: float = 0.0) -> None:
        self.world.apply(Fault(self.world.now, kind, tuple(nodes), other, value))

    def _crash(self, words: list[str]) -> None:
        self._fault("crash", words[:1], ("silent",) if "silently" in words else ())

    def _restart(self, words: list[str]) -> None:
        self._fault("restart", words)

    def _wipe(self, words: list[str]) -> None:
        self._fault("wipe", words)

    def _pause(self, words: list[str]) -> None:
        self._fault("pause", words)

    def _resume(self, words: list[str]) -> None:
        self._fault("resume", words)

    def _part(self, words: list[str]) -> None:
        at = words.index("|")
        self._fault("partition", words[:at], tuple(words[at + 1 :]))

    def _cut(self, words: list[str]) -> None:
        self._fault("partition", words[:1], tuple(words[1:]))

    def _loss(self, words: list[str]) -> None:
        self._fault("loss", [], value=float(words[0]))

    def _heal(self, words: list[str]) -> None:
        self._fault("heal", [])

    def _leave(self, words: list[str]) -> None:
        self.world.do(words[0], lambda core, now: core.leave(now))

    def _move(self, words: list[str]) -> None:
        self.world.do(words[0], lambda core, now: core.set_address(words[1], now))

    def _state(self, words: list[str]) -> list[str]:
        return [self._line(name) for name in words or self.world.nodes]

    def _line(self, name: str) -> str:
        core = self.world.core(name)
        if core is None:
            return f"{name} is down"
        held = sorted(core.members(), key=lambda info: info.node)
        return f"{name} holds " + ", ".join(
            f"{info.node} {info.state} {self._life(info.node, info.incarnation)} at {info.address}" for info in held
        )

    def _life(self, node: str, incarnation: int) -> str:
        """Incarnations are times; told are their ranks among all that the node ever issued."""
        issued = sorted({record.incarnation for record in self.world.nodes[node].written})
        return f"#{issued.index(incarnation)}"


STREAM_NAMES = ("StreamPing", "StreamAck", "Join", "Buckets", "SyncRows", "BigRows")


def _folded(told: list[tuple[float, str, str]]) -> list[str]:
    """Equal lines of several nodes that come close together as one."""
    lines: list[tuple[float, list[str], str]] = []
    for at, name, what in told:
        same = next((line for line in lines if line[2] == what and at - line[0] < 0.1 and name not in line[1]), None)
        if same is not None:
            same[1].append(name)
        else:
            lines.append((at, [name], what))
    return [f"{at:8.3f} {' '.join(sorted(names))}: {what}" for at, names, what in lines]


def perform(text: str) -> tuple[list[str], list[str]]:
    """(the transcript as written, as it plays): equal, or the scenario does not hold."""
    player, played = Player(), []
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith("|"):
            continue
        played.append(line)
        if bare and not bare.startswith("#"):
            played += [f"| {answer}" for answer in player.play(bare)]
    return text.splitlines(), played


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: re.sub(r"\.txt$", "", path.name))
def test_scenario(script: Path) -> None:
    written, played = perform(script.read_text())
    assert played == written


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or SCRIPTS:
        path.write_text("\n".join(perform(path.read_text())[1]) + "\n")
