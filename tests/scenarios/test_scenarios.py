"""Plays the transcripts of this folder: commands, and the lines that must follow.

A transcript is text.  Blank lines and lines with ``#`` are for the reader.  A line that starts with ``|`` is expected
output of the command above it; everything must match.  ``python tests/scenarios/test_scenarios.py`` writes the output
that it sees into the files: read the difference before you believe it.

Time is virtual, links take 1 ms, chance is switched off: a node's time-outs are those of its ``patience`` (0 to 9, by
default its place in the alphabet), so that "a" campaigns before "b".

    mesh a b c d voting a b c       members that agree on record (1,1) with these voters
    config wan | eligible_after_s=2 ...   before ``mesh``
    patience b 0                    how soon a node campaigns
    run 2.5                         seconds
    crash a | crash a silently      kill -9 (its peers see a reset), or the power goes
    restart a   pause a   resume a  wipe: ``replace a by x`` (a lost disk comes back under a new id)
    cut a b     part a b | c d      one link, or the mesh, in two; ``heal`` mends all
    lose ask_vote from a            messages of that kind from that node are lost; ``heal`` ends it
    propose a "text"                a placement; ``voters a +d``, ``revoke a d``
    transfer a [b]   leave a   takeover a [by force]   join x
    open a under 3 of b             work under the placement that is b's (or "under 3": its counter) is opened at a
    obey a term 2                   a coordinator's command of that term reaches a
    state                           one line per node
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesh.election import config as configs
from mesh.election import events as ev
from mesh.election.record import Record, epoch_counter
from tests.sim.election_world import EPOCH, ElectionWorld
from tests.sim.world import Fault, NetParams

HERE = Path(__file__).parent
SCRIPTS = sorted(HERE.glob("*.txt"))


class Steady(random.Random):
    """No chance: ``uniform`` is where in the interval this node's patience puts it."""

    def __init__(self, patience: float) -> None:
        super().__init__(0)
        self.patience = patience

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) * self.patience


class Player:
    """One transcript's world and what it has said so far."""

    def __init__(self) -> None:
        self.world: ElectionWorld | None = None
        self.config = configs.lan()
        self.patience: dict[str, Steady] = {}
        self.lost: list[tuple[str, str]] = []
        self.heard = 0

    def play(self, command: str) -> list[str]:
        """What ``command`` brings about, one line per event."""
        verb, *words = command.split()
        answer = getattr(self, f"_{verb}")(words, command) or []
        return [*answer, *self._news()]

    def _news(self) -> list[str]:
        if self.world is None:
            return []
        told, self.heard = self.world.told[self.heard :], len(self.world.told)
        return [f"{at:7.3f} {node} {_says(event)}" for at, node, event in told]

    # -- commands

    def _config(self, words: list[str], _: str) -> None:
        for word in words:
            name, eq, value = word.partition("=")
            if not eq:
                self.config = getattr(configs, name)()
            else:
                self.config = msgspec.structs.replace(self.config, **{name: float(value)})

    def _mesh(self, words: list[str], command: str) -> None:
        at = words.index("voting")
        names, voters = words[:at], words[at + 1 :]
        net = NetParams(base_s=0.001, jitter_s=0.0)
        self.world = _Quiet(self, names, voters, net)

    def _patience(self, words: list[str], _: str) -> None:
        self.rng(words[0]).patience = float(words[1]) / 10.0

    def _run(self, words: list[str], _: str) -> None:
        self.w.run(until=self.w.now + float(words[0]))

    def _crash(self, words: list[str], _: str) -> None:
        names = tuple(w for w in words if w != "silently")
        self.w.apply(Fault(self.w.now, "crash", names, ("silent",) if "silently" in words else ()))

    def _restart(self, words: list[str], _: str) -> None:
        self.w.apply(Fault(self.w.now, "restart", tuple(words)))

    def _pause(self, words: list[str], _: str) -> None:
        self.w.apply(Fault(self.w.now, "pause", tuple(words)))

    def _resume(self, words: list[str], _: str) -> None:
        self.w.apply(Fault(self.w.now, "resume", tuple(words)))

    def _cut(self, words: list[str], _: str) -> None:
        self.w.apply(Fault(self.w.now, "partition", (words[0],), tuple(words[1:])))

    def _part(self, words: list[str], _: str) -> None:
        at = words.index("|")
        self.w.apply(Fault(self.w.now, "partition", tuple(words[:at]), tuple(words[at + 1 :])))

    def _lose(self, words: list[str], _: str) -> None:
        self.lost.append((words[0].replace("_", ""), words[2]))

    def _heal(self, words: list[str], _: str) -> None:
        self.lost.clear()
        self.w.apply(Fault(self.w.now, "heal"))

    def _join(self, words: list[str], _: str) -> None:
        self.w.join(words[0])

    def _replace(self, words: list[str], _: str) -> None:
        old, new = words[0], words[2]
        self.w.apply(Fault(self.w.now, "crash", (old,)))
        self.w.join(new)

    def _propose(self, words: list[str], command: str) -> list[str]:
        return self._try(self.w.propose(words[0], command.split('"')[1].encode()))

    def _voters(self, words: list[str], _: str) -> list[str]:
        def change(core: Any, now: float) -> list[Any]:
            voters = set(core.record.voters)
            for word in words[1:]:
                voters = voters | {word[1:]} if word[0] == "+" else voters - {word[1:]}
            return core.propose(now, voters=sorted(voters))

        return self._try(self.w.ask(words[0], change))

    def _revoke(self, words: list[str], _: str) -> list[str]:
        def change(core: Any, now: float) -> list[Any]:
            old = core.record.content
            return core.propose(now, msgspec.structs.replace(old, tombstones=(*old.tombstones, words[1])))

        return self._try(self.w.ask(words[0], change))

    def _transfer(self, words: list[str], _: str) -> list[str]:
        to = words[1] if len(words) > 1 else None
        return self._try(self.w.ask(words[0], lambda core, now: core.transfer(now, to)))

    def _leave(self, words: list[str], _: str) -> list[str]:
        return self._try(self.w.ask(words[0], lambda core, now: core.leave(now)))

    def _takeover(self, words: list[str], _: str) -> list[str]:
        return self._try(self.w.ask(words[0], lambda core, now: core.takeover(now, force="force" in words)))

    def _open(self, words: list[str], _: str) -> list[str]:
        node = words[0]
        epoch = self.w.core(words[4]).epoch if len(words) > 4 else self.w.core(node).epoch
        answer, effects = self.w.core(node).may_open((epoch, int(words[2])), words[4] if len(words) > 4 else node)
        self.w.do(node, lambda core, now: effects)
        return [f"{answer.verdict}, active is {epoch_counter(answer.newer[0])}.{answer.newer[1]}"]

    def _obey(self, words: list[str], _: str) -> list[str]:
        said: list[str] = []

        def ask(core: Any, now: float) -> list[Any]:
            answer, effects = core.obey(EPOCH, int(words[2]), "x", now)
            said.append(
                f"{answer.verdict}, highest seen is term {answer.newer[1]} of epoch {epoch_counter(answer.newer[0])}"
            )
            return effects

        self.w.do(words[0], ask)
        return said

    def _state(self, words: list[str], _: str) -> list[str]:
        return [_state(name, self.w.core(name)) for name in words or self.w.nodes]

    # -- helpers

    @property
    def w(self) -> ElectionWorld:
        assert self.world is not None, "the transcript must start with 'mesh'"
        return self.world

    def rng(self, name: str) -> Steady:
        default = min(ord(name[0]) - ord("a"), 9) / 10.0
        return self.patience.setdefault(name, Steady(default))

    def _try(self, refusal: str) -> list[str]:
        return [refusal] if refusal else []


class _Quiet(ElectionWorld):
    """A world without chance whose transcript may lose messages by kind."""

    def __init__(self, player: Player, names: list[str], voters: list[str], net: NetParams) -> None:
        self.player = player
        super().__init__(0, names, voters, config=player.config, net=net, rng_of=player.rng)

    def _send(self, source: str, to: str, message: Any) -> None:
        if (type(message).__name__.lower(), source) not in self.player.lost:
            super()._send(source, to, message)


def _says(event: Any) -> str:
    tell: dict[type, Callable[[Any], str]] = {
        ev.BecameLeader: lambda e: f"leads term {e.term}",
        ev.SteppedDown: lambda e: f"steps down from term {e.term}: {e.why}",
        ev.LeaderIs: lambda e: f"follows {e.node} in term {e.term}",
        ev.LeaderLost: lambda e: f"lost {e.node}",
        ev.Committed: lambda e: f"committed {_record(e.record)}",
        ev.Released: lambda e: "may go",
    }
    return tell.get(type(event), str)(event)


def _record(record: Record) -> str:
    text = record.content.placement.decode()
    epoch = f" epoch {epoch_counter(record.epoch)}" if epoch_counter(record.epoch) != 1 else ""
    revoked = f" revoked {' '.join(record.content.tombstones)}" if record.content.tombstones else ""
    placed = f' "{text}" placement {record.content.placement_counter}' if text else ""
    return f"{record.id}{epoch} voters {' '.join(record.voters)}{placed}{revoked}"


def _state(name: str, core: Any) -> str:
    if core is None:
        return f"{name} down"
    role = core.role if core.is_voter or core.role == "leader" else "learner"
    pending = "" if core.committed.id == core.record.id else f"; uncommitted {_record(core.record)}"
    return f"{name} {role} term {core.term} of {core.leader or 'nobody'}: {_record(core.committed)}{pending}"


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
    if player.world is not None:
        player.world.checker.check_kept()
    return text.splitlines(), played


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: re.sub(r"\.txt$", "", path.name))
def test_scenario(script: Path) -> None:
    written, played = perform(script.read_text())
    assert played == written


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or SCRIPTS:
        path.write_text("\n".join(perform(path.read_text())[1]) + "\n")
