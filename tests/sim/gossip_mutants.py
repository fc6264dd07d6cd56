"""Negative controls: the membership core with one rule switched off.  Each must be caught by the checkers.

Each is a subclass that overrides one small method of the core, or a setting that ends the rule; and the mixture of
weather in which it is searched for.
``python -m tests.sim.gossip_mutants [SCHEDULES] [NAME]`` searches for the first seed that catches each.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from gossip.config import GossipConfig
from gossip.members import Member
from gossip.messages import State, Update
from gossip.roster import Roster
from gossip.swim import Swim
from mesh.core import Effect
from tests.sim.gossip_weather import Mix, Storm
from tests.sim.world import NetParams


class _Altered(Swim):
    """A core whose ``roster`` is another."""

    roster_type: type[Roster] = Roster

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.roster.__class__ = self.roster_type


class _Silent(Roster):
    def _about_me(self, update: Update, sender: Any, now: float) -> bool:
        return False


class NoRefutation(_Altered):
    """A suspect says nothing (SWIM 4.2)."""

    roster_type = _Silent


class _Forgetful(Roster):
    def _next_state(self, held: Member | None, update: Update, synced: bool) -> State | None:
        if held is not None and held.state is State.DEAD and update.state is State.DEAD:
            return None
        return super()._next_state(held, update, synced)


class ForgetsTheLargestIncarnation(_Altered):
    """What is dead already stores nothing of a later death (memberlist PR #197)."""

    roster_type = _Forgetful


class _Gullible(Roster):
    def _next_state(self, held: Member | None, update: Update, synced: bool) -> State | None:
        state = super()._next_state(held, update, synced)
        return State.DEAD if state is State.SUSPECT and update.state is State.DEAD else state


class TakesDeadAsDead(_Altered):
    """Hearsay buries: a death told in a sync, or found by one member alone, is not a suspicion."""

    roster_type = _Gullible


class _Reviving(Roster):
    def apply(self, update: Update, sender: Any, now: float, **how: Any) -> bool:
        held = self.members.get(update.record.node)
        if (
            held is not None
            and held.state is State.DEAD
            and update.state is State.ALIVE
            and held.record == update.record
        ):
            return self._change(held, update.record, State.ALIVE, (), now)
        return super().apply(update, sender, now, **how)


class OldNewsRevives(_Altered):
    """The dead return at the incarnation at which they died."""

    roster_type = _Reviving


class NotSavedBeforeSaid(Swim):
    """A new incarnation is told before it is durable."""

    def _finish(self, now: float) -> list[Effect]:
        effects = super()._finish(now)
        return sorted(effects, key=lambda effect: type(effect).__name__ == "Persist")


_CUTS = Mix(4, 40.0, ("cut", "loss"), every_s=3.0)
_SPLITS = Mix(6, 60.0, ("crash", "partition"), every_s=3.0)

CONTROLS: dict[str, dict[str, Any]] = {
    "no refutation": {"make": NoRefutation, "mix": _CUTS},
    "the largest incarnation is forgotten": {"make": ForgetsTheLargestIncarnation, "mix": _SPLITS},
    "dead is taken as dead": {"make": TakesDeadAsDead, "mix": Mix(3, 60.0, ("partition",))},
    "no indirect probes": {
        "config": GossipConfig(helpers=0),
        "mix": Mix(5, 40.0, ("links",), net=NetParams(), one_link=True),
    },
    "no wake guard": {
        "config": GossipConfig(wake_guard=False),
        "mix": Mix(6, 40.0, ("pause", "silent"), every_s=1.0, net=NetParams(inbox=0)),
    },
    "old news revives the dead": {
        "make": OldNewsRevives,
        "mix": Mix(5, 40.0, ("silent", "pause"), every_s=3.0, net=NetParams(loss=0.05, reorder=0.3, reorder_s=20.0)),
    },
    "an incarnation is told before it is saved": {
        "make": NotSavedBeforeSaid,
        "mix": Mix(5, 60.0, ("crash_mid", "fsync", "loss"), every_s=1.0),
    },
    "the dead are not written to": {
        "config": GossipConfig(announce_targets=0, dead_gossip_s=0.0),
        "mix": Mix(4, 60.0, ("partition",), every_s=4.0),
    },
}
"""Name -> how ``Storm`` is made."""


def play(seed: int, mix: Mix, **how: Any) -> str:
    """The property that a schedule breaks, and how; empty: none."""
    try:
        Storm(seed, mix, **how).run()
    except AssertionError as violation:
        return str(violation)
    return ""


def main(schedules: int, only: str = "") -> None:
    """Search, one line per control."""
    for name, how in CONTROLS.items():
        if only in name:
            start = time.monotonic()
            found = next(((seed, why) for seed in range(schedules) if (why := play(seed, **how))), None)
            seen = f"seed {found[0]}: {found[1][:110]}" if found else f"not caught in {schedules}"
            print(f"{name}: {seen} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000, " ".join(sys.argv[2:]))
