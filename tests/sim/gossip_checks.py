"""G1-G6 of the membership protocol, checked from outside.

Shares no code with the core: it reads what is on disks, what was delivered, and what ``members()`` says.  Usage::

    checks = GossipChecks(world)          # hooks itself into the world: G1-G4 after every step
    ... world.run(...)
    checks.all_views(bound_s=...)         # G5, G6: runs the world until they hold, or fails
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

from mesh.core import Emit
from tests.sim.world import World

ORDER = {"alive": 0, "suspect": 1, "dead": 2, "left": 3}


class Seen:
    """What one observer was heard to hold in one of its lives; by the number of the subject."""

    def __init__(self, count: int) -> None:
        self.evidence = array("q", bytes(8 * count))
        """Largest incarnation delivered to it."""
        self.held: list[tuple[str, int] | None] = [None] * count
        """(state, incarnation) when last looked at."""
        self.next = 0
        """The subject to be looked at next, changed or not."""

    def grow(self, count: int) -> None:
        missing = count - len(self.held)
        self.evidence.extend([0] * missing)
        self.held += [None] * missing


class GossipChecks:
    """``steady``: nodes that no fault touches, so none of them may hold another dead (G4); ``unsuspected``: nodes that
    always can be reached, at least through any third, so that nobody may even suspect them; ``wake_s``: for so long
    after a pause nobody declares others dead by its own clock.

    Looks at what a step may have changed (subjects of new evidence and of events), and after every ``sweep_every``th
    step at one more row, in turn, so that a change that nothing announced is seen as well."""

    def __init__(
        self,
        world: World,
        steady: Iterable[str] = (),
        unsuspected: Iterable[str] = (),
        wake_s: float = 0.0,
        sweep_every: int = 8,
    ) -> None:
        self.world, self.sweep_every = world, sweep_every
        self.steady, self.unsuspected = dict.fromkeys(steady), dict.fromkeys(unsuspected)
        self.wake_s = wake_s
        self.issued: dict[str, int] = {}
        """Largest incarnation that each node is known to have made durable."""
        self.numbers: dict[str, int] = {}
        self.names: list[str] = []
        self.seen: dict[tuple[str, int], Seen] = {}
        """(observer, its life) -> what it was seen to hold."""
        self._shared: dict[tuple[str, int], tuple[str, int]] = {}
        self.looks = self.steps = 0
        world.after_step.append(self.after_step)

    def after_step(self, world: World, observer: str) -> None:
        node = world.nodes[observer]
        seen = self._seen_of(node)
        if world.heard is not None:
            self._hear(node, seen, world.heard)
        for effect in world.effects:
            if type(effect) is Emit and hasattr(effect.event, "old"):
                self._look(node, seen, effect.event.node)
                self._judge(node, effect.event.node, effect.event.new)
        self.steps += 1
        if self.steps % self.sweep_every == 0:
            seen.next = (seen.next + 1) % len(self.names)
            self._look(node, seen, self.names[seen.next])

    def _seen_of(self, node: Any) -> Seen:
        if len(self.numbers) < len(self.world.nodes):
            for name in self.world.nodes:
                self._number(name)
        seen = self.seen.get((node.id, node.life))
        if seen is None:
            seen = self.seen[node.id, node.life] = Seen(len(self.names))
        return seen

    def _number(self, name: str) -> int:
        if name not in self.numbers:
            self.numbers[name] = len(self.names)
            self.names.append(name)
        return self.numbers[name]

    def _hear(self, node: Any, seen: Seen, message: Any) -> None:
        """Every claim in a message; one that says nothing new of an incarnation cannot break G2."""
        for update in getattr(message, "updates", ()):
            self._claim(node, seen, update.record)
        for row in getattr(message, "rows", ()):
            if hasattr(row, "update"):
                self._claim(node, seen, row.update.record)
        if hasattr(message, "update"):
            self._claim(node, seen, message.update.record)

    def _claim(self, node: Any, seen: Seen, record: Any) -> None:
        number = self._number(record.node)
        if number >= len(seen.held):
            seen.grow(len(self.names))
        if record.incarnation > seen.evidence[number]:
            seen.evidence[number] = record.incarnation
            self._look(node, seen, record.node)

    def _judge(self, node: Any, subject: str, state: str) -> None:
        """What a healthy, punctual node does not say of a subject (the other half of G4)."""
        where = f"at {self.world.now:.3f} {node.id} holds {subject} {state}"
        if state == "suspect" and subject in self.unsuspected:
            raise AssertionError(f"G4: suspected, though all others reach it: {where}")
        awake = self.world.now - node.woke_at
        if state == "dead" and self.world.heard is None and awake < self.wake_s and node.slept_s > 2 * self.wake_s:
            raise AssertionError(f"G4: judged {awake:.3f} s after it woke: {where}")

    def look_at_all(self, node: Any) -> None:
        for info in node.core.members():
            self._look(node, self._seen_of(node), info.node)

    def _look(self, node: Any, seen: Seen, subject: str) -> None:
        """G1-G4 for what ``node`` holds of ``subject``."""
        self.looks += 1
        info, number = node.core.member(subject), self._number(subject)
        if number >= len(seen.held):
            seen.grow(len(self.names))
        before = seen.held[number]
        if info is None:
            assert before is None or before[0] in ("dead", "left"), f"{node.id} forgot {subject}, which was {before}"
            seen.held[number] = None
            return
        now = (info.state, info.incarnation)
        if now == before and now[1] >= seen.evidence[number]:
            return
        now = seen.held[number] = self._shared.setdefault(now, now)
        where = f"at {self.world.now:.3f} {node.id} holds {subject} {now}, before {before}"
        assert now[1] <= self._issued(subject, now[1]), f"G1: never issued: {where}"
        assert now[1] >= seen.evidence[number], f"G2: heard of a larger: {where}"
        if before is not None:
            assert now[1] >= before[1], f"G2: fell: {where}"
            if before[0] in ("dead", "left") and now[0] in ("alive", "suspect"):
                assert now[1] > before[1], f"G3: resurrected: {where}"
            if now[1] == before[1]:
                assert ORDER[now[0]] >= ORDER[before[0]], f"G3: cleared without a new incarnation: {where}"
        if now[0] == "dead" and subject in self.steady and node.id in self.steady:
            raise AssertionError(f"G4: a steady member is dead: {where}")

    def _issued(self, subject: str, claimed: int) -> int:
        if claimed > self.issued.get(subject, 0):
            self.issued[subject] = max(record.incarnation for record in self.world.nodes[subject].written)
        return self.issued[subject]

    # -- G5, G6

    def disagreements(self) -> list[str]:
        """What keeps the views of live nodes from being equal and true."""
        live = {node.id: node for node in self.world.nodes.values() if node.up and not node.paused}
        found: list[str] = []
        for node in live.values():
            held = {info.node: info for info in node.core.members()}
            for other in self.world.nodes.values():
                info = held.get(other.id)
                if other.id in live:
                    if info is None or info.state != "alive" or info.incarnation != live[other.id].core.incarnation:
                        found.append(f"{node.id[:6]} holds the live {other.id[:6]} {info and info.state}")
                elif not other.up and info is not None and info.state not in ("dead", "left"):
                    found.append(f"{node.id[:6]} holds the dead {other.id[:6]} {info.state}")
        return found

    def all_views(self, bound_s: float, every_s: float = 1.0) -> float:
        """G5 and G6: with no faults any more all views become equal and true within ``bound_s``; how long it took."""
        start = self.world.now
        while wrong := self.disagreements():
            assert self.world.now - start < bound_s, f"after {bound_s} s: {len(wrong)}: {wrong[:10]}"
            self.world.run(self.world.now + every_s)
        return self.world.now - start
