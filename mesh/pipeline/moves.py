"""Planned moves, at the owner: a hop that is to go is replaced by one that has its keys and values already.

A hop says that it is to go (``Vacate``: its node leaves, or its layers are placed elsewhere).  The owner finds a route
without it and asks the new hops to prepare; each fetches the pages from the old one, which serves on
(mesh/pipeline/arrivals.py).  When they have arrived the owner opens the new route as it opens any: the new hop starts
from what it has, and ``Gap`` brings it the few positions that were computed meanwhile.

Pages are of use under the epoch that they were shipped in, and for positions that were accepted in it; the ``Open``
says both.  Whatever goes wrong on the way costs a replay, as a crash would: what has arrived counts even when the old
hop dies in the middle, and a move that does not come on is given up.
"""

from __future__ import annotations

from collections.abc import Container

from mesh.core import Effect, Send
from mesh.pipeline import messages as m
from mesh.types import Hop, NodeId, Route

RESEND_S = 0.5


def sources(old: Route, new: Route) -> list[tuple[int, Hop, NodeId]]:
    """Hops of ``new`` that are not in ``old``: index, hop, and the old hop's node that computes all its layers."""
    found = []
    for index, hop in enumerate(new.hops):
        if hop not in old.hops:
            whole = [was.node for was in old.hops if was.start <= hop.start and hop.end <= was.end]
            found.append((index, hop, whole[0] if whole else NodeId("")))
    return found


class Move:
    """A move under way in one epoch."""

    def __init__(self, old: Route, route: Route, asks: dict[NodeId, m.Prepare], now: float, patience_s: float) -> None:
        """``asks``: what each new hop is asked; one that has no single source is left to replay."""
        self.route = route
        self.gone = [hop.node for hop in old.hops if hop not in route.hops]
        self.nodes = list(asks)
        self._waiting = dict(asks)
        self._have = dict.fromkeys(asks, -1)
        self._patience_s = patience_s
        self._ask_at, self.until = now, now + patience_s

    @property
    def ready(self) -> bool:
        return not self._waiting

    @property
    def deadline(self) -> float:
        return min(self._ask_at, self.until)

    def ask(self, now: float) -> list[Effect]:
        """Ask those that have not got everything, at first and again."""
        if now < self._ask_at:
            return []
        self._ask_at = now + RESEND_S
        return [Send(node, ask) for node, ask in self._waiting.items()]

    def arrived(self, sender: NodeId, message: m.Arrived, now: float) -> None:
        if message.have > self._have[sender]:
            self._have[sender], self.until = message.have, now + self._patience_s
        if message.ready:
            self._waiting.pop(sender, None)

    def keeps(self, lost: Container[NodeId]) -> bool:
        """Whether the next route goes by this one: all is there, or the hop that was to go is gone already."""
        return self.ready or any(node in lost for node in self.gone)
