"""Detours: a neighbour carries a message to a voter that does not answer on the direct link.

With one detour any two voters with a common neighbour hear each other, so that a partly connected set of voters
behaves as a full mesh where plain Raft stalls (OmniPaxos; cockroach #107060).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from mesh.election import messages as m
from mesh.election.outbox import Outbox
from mesh.types import NodeId

Sign = Callable[[bytes], bytes]


class Post:
    """Sends requests and replies, round a broken link where there is one."""

    def __init__(self, outbox: Outbox, relay_after_s: float, sign: Sign | None) -> None:
        """``sign``: this node's signature over bytes; None: nothing is relayed for it."""
        self._outbox, self._relay_after_s, self._sign = outbox, relay_after_s, sign
        self._unanswered: dict[NodeId, float] = {}
        """Since when requests on the direct link got no answer."""
        self._carrier: dict[NodeId, NodeId] = {}
        """Who carried the last message from a node that is not heard directly."""
        self._via: NodeId | None = None
        self._turn = 0

    def lost(self, to: NodeId) -> None:
        """The connection to ``to`` was reset and could not be made again: do not wait before going round."""
        self._unanswered[to] = float("-inf")

    def heard(self, sender: NodeId, via: NodeId | None) -> None:
        """A message of ``sender`` arrived, directly or carried by ``via``; replies to it go back the same way."""
        self._via = via
        if via is None:
            self._unanswered.pop(sender, None)
            self._carrier.pop(sender, None)
        else:
            self._carrier[sender] = via

    def request(self, to: NodeId, message: m.Relayable, carriers: Callable[[], Sequence[NodeId]], now: float) -> None:
        self._outbox.send(to, message)
        since = self._unanswered.setdefault(to, now)
        if now - since >= self._relay_after_s:
            carrier = self._choose(to, [n for n in carriers() if n != to])
            self._carry(carrier, to, message)

    def reply(self, to: NodeId, message: m.Relayable) -> None:
        """Directly, and back the way the question came: links may fail in one direction."""
        self._outbox.send(to, message)
        self._carry(self._via, to, message)

    def _choose(self, to: NodeId, neighbours: Sequence[NodeId]) -> NodeId | None:
        """Who carried last, as long as answers go on naming it; else each neighbour in turn."""
        carrier = self._carrier.pop(to, None)
        if carrier in neighbours:
            return carrier
        self._turn += 1
        return neighbours[self._turn % len(neighbours)] if neighbours else None

    def _carry(self, carrier: NodeId | None, to: NodeId, message: m.Relayable) -> None:
        if carrier is None or self._sign is None:
            return
        relayed = m.Relayed(
            message.mesh,
            message.epoch,
            message.term,
            origin=self._outbox.durable.node_id,
            to=to,
            payload=m.encode(message),
            signature=b"",
        )
        self._outbox.send(carrier, msgspec.structs.replace(relayed, signature=self._sign(m.signed(relayed))))
