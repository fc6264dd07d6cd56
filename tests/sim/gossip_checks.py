"""G1-G6 of the membership protocol, checked from outside.

Shares no code with the core: it reads what is on disks, what was delivered, and what ``members()`` says.  Usage::

    checks = GossipChecks(world)          # hooks itself into the world: G1-G4 after every step
    ... world.run(...)
    checks.all_views(bound_s=...)         # G5, G6: runs the world until they hold, or fails
"""

from __future__ import annotations

from typing import Any

from mesh.core import Emit
from tests.sim.world import World

ORDER = {"alive": 0, "suspect": 1, "dead": 2, "left": 3}


class GossipChecks:
    """``steady``: nodes that no fault touches, so none of them may hold another dead (G4)."""

    def __init__(self, world: World, steady: list[str] | None = None, full_every: int = 200) -> None:
        self.world, self.full_every = world, full_every
        self.steady = dict.fromkeys(steady or [])
        self.issued: dict[str, int] = {}
        """Largest incarnation that each node has made durable."""
        self.seen: dict[tuple[str, int], dict[str, tuple[str, int]]] = {}
        """(observer, its life) -> subject -> (state, incarnation) when last looked at."""
        self.evidence: dict[tuple[str, int], dict[str, int]] = {}
        """(observer, its life) -> subject -> largest incarnation delivered to it."""
        self.looks = 0
        self.steps = 0
        world.after_step.append(self.after_step)

    def after_step(self, world: World, observer: str) -> None:
        self.steps += 1
        node = world.nodes[observer]
        for record in node.disk[-1:]:
            self.issued[observer] = max(self.issued.get(observer, 0), record.incarnation)
        said = self._claims(world.heard)
        heard = self.evidence.setdefault((observer, node.life), {})
        for subject, incarnation in said:
            heard[subject] = max(heard.get(subject, 0), incarnation)
        changed = [e.event.node for e in world.effects if type(e) is Emit and hasattr(e.event, "old")]
        subjects = dict.fromkeys([subject for subject, _ in said] + changed)
        if self.steps % self.full_every == 0:
            self._look_at_all(node)
        else:
            for subject in subjects:
                self._look(node, subject, node.core.member(subject))

    @staticmethod
    def _claims(message: Any) -> list[tuple[str, int]]:
        """(subject, incarnation) of every claim in a message."""
        updates = list(getattr(message, "updates", ()))
        updates += [row.update for row in getattr(message, "rows", ()) if hasattr(row, "update")]
        updates += [message.update] if hasattr(message, "update") else []
        return [(update.record.node, update.record.incarnation) for update in updates]

    def _look_at_all(self, node: Any) -> None:
        for info in node.core.members():
            self._look(node, info.node, info)

    def _look(self, node: Any, subject: str, info: Any) -> None:
        """G1-G4 for what ``node`` holds of ``subject``."""
        self.looks += 1
        seen = self.seen.setdefault((node.id, node.life), {})
        before = seen.get(subject)
        if info is None:
            assert before is None or before[0] in ("dead", "left"), f"{node.id} forgot {subject}, which was {before}"
            seen.pop(subject, None)
            return
        now = (info.state, info.incarnation)
        where = f"at {self.world.now:.3f} {node.id} holds {subject} {now}, before {before}"
        assert info.incarnation <= self.issued.get(subject, 0), f"G1: never issued: {where}"
        assert info.incarnation >= self.evidence[node.id, node.life].get(subject, 0), f"G2: heard of a larger: {where}"
        if before is not None:
            assert now[1] >= before[1], f"G2: fell: {where}"
            if before[0] in ("dead", "left") and now[0] in ("alive", "suspect"):
                assert now[1] > before[1], f"G3: resurrected: {where}"
            if now[1] == before[1]:
                assert ORDER[now[0]] >= ORDER[before[0]], f"G3: cleared without a new incarnation: {where}"
        if now[0] == "dead" and subject in self.steady and node.id in self.steady:
            raise AssertionError(f"G4: a steady member is dead: {where}")
        seen[subject] = now

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
