"""Planned moves, at the successor: sessions that are on their way to this node.

Room is reserved first; then the pages are fetched piece by piece, so that what is in flight is bounded by who asks for
it, and a lost piece is asked for again.  Having caught up, a successor says so and keeps up until the ``Open`` comes,
which takes what is here (``take``) if it names the epoch in which it was shipped.  Nothing here touches a session that
is open at this node; what no ``Open`` comes for is freed.
"""

from __future__ import annotations

import msgspec

from mesh.core import Effect, Emit, Rejected, Send
from mesh.pipeline import messages as m
from mesh.pipeline.checkpoints import Checkpoints, Segment
from mesh.pipeline.work import Free, Import, Reserve
from mesh.types import Hop, NodeId


class ArrivalsConfig(msgspec.Struct, frozen=True):
    """Times in seconds of a successor."""

    fetching: int = 4
    """Pieces that may be in flight to this node; each is at most a few MiB."""
    again_s: float = 0.5
    """A piece that does not come is asked for again."""
    follow_s: float = 0.05
    """How often one that has caught up looks for more."""
    lease_s: float = 10.0
    """What comes no further, and is not opened, is freed."""
    max_sessions: int = 256


class Arrival:
    """One session on its way."""

    def __init__(self, prepare: m.Prepare, key: str, now: float, lease_s: float) -> None:
        self.prepare, self.key = prepare, key
        self.have = 0
        self.checkpoints = Checkpoints()
        self.reserved = self.caught_up = False
        self.asked = self.waits = False
        """A piece is on its way; or would be, were there not so many others."""
        self.fetch_at = now
        self.until = now + lease_s

    @property
    def hop(self) -> Hop:
        return self.prepare.route.hops[self.prepare.hop]

    def fetch(self) -> Send:
        """For the next piece."""
        layers = (self.hop.start, self.hop.end)
        return Send(self.prepare.source, m.Fetch(self.prepare.session, self.prepare.epoch, layers, self.have))

    def usable(self, message: m.Open) -> int:
        """Positions that hold under ``message``; 0: none."""
        route, shipped = message.route, message.shipped
        if not self.reserved or shipped is None or shipped[0] != self.prepare.epoch:
            return 0
        if route.hops[message.hop] != self.hop or route.model != self.prepare.route.model:
            return 0
        last = message.hop == len(route.hops) - 1
        # The sampler's last position is computed again, to draw.
        return min(self.have, shipped[1], message.accepted - 1 if last else message.accepted)


class Arrivals:
    """All of one node."""

    def __init__(self, me: NodeId, config: ArrivalsConfig) -> None:
        self.me, self.config = me, config
        self._arrivals: dict[m.SessionId, Arrival] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._arrivals)

    def prepare(self, message: m.Prepare, now: float) -> list[Effect]:
        """Make room for a session; it was checked that this node may hold it."""
        known = self._arrivals.get(message.session)
        if known is not None and known.prepare.epoch >= message.epoch:
            known.fetch_at = min(known.fetch_at, now)  # asked again: the last word may have been lost
            return self._fetch(now)
        freed = self.drop(message.session)
        if len(self._arrivals) >= self.config.max_sessions:
            full = f"{self.config.max_sessions} sessions are on their way here already"
            return [*freed, self._refusal(message, "busy", full, 1.0)]
        self._serial += 1
        arrival = Arrival(message, f"{message.session}>{self._serial}", now, self.config.lease_s)
        self._arrivals[message.session] = arrival
        hop, room = arrival.hop, (message.max_positions, message.priority, len(message.route.hops))
        return [*freed, Emit(Reserve(arrival.key, message.route.model, hop.start, hop.end, *room, None, ()))]

    def reserved(self, key: str, now: float) -> list[Effect] | None:
        """The engine has room; ``None``: nobody here asked for it (any more)."""
        arrival = self._of(key)
        if arrival is None:
            return None
        arrival.reserved = True
        return self._fetch(now)

    def refused(self, key: str, code: str, why: str, retry_after_s: float) -> list[Effect] | None:
        arrival = self._of(key)
        if arrival is None:
            return None
        del self._arrivals[arrival.prepare.session]
        return [self._refusal(arrival.prepare, code, why, retry_after_s)]

    def receive(self, message: m.Pages, sender: NodeId, now: float) -> list[Effect]:
        """The next piece; anything else than the next is dropped, and asked for again."""
        arrival = self._arrivals.get(message.session)
        if arrival is None or not arrival.reserved or message.epoch != arrival.prepare.epoch:
            return []
        if sender != arrival.prepare.source or message.n < 0 or message.start < 0:
            return [Emit(Rejected(sender, "ships pages that it was not asked for"))]
        if message.start + message.n > arrival.prepare.max_positions or (message.n and len(message.rows) % message.n):
            return [Emit(Rejected(sender, "ships pages past the end of the session, or rows of unequal size"))]
        if message.start != arrival.have:
            return []
        arrival.asked = False
        if message.n:
            arrival.until = now + self.config.lease_s
        effects = self._take_in(arrival, message)
        arrival.caught_up = arrival.have >= message.done or not message.n
        arrival.fetch_at = now + (self.config.follow_s if arrival.caught_up else 0.0)
        told = m.Arrived(message.session, message.epoch, arrival.prepare.hop, arrival.have, arrival.caught_up)
        return [*effects, Send(arrival.prepare.epoch[1], told), *self._fetch(now)]

    @staticmethod
    def _take_in(arrival: Arrival, message: m.Pages) -> list[Effect]:
        if not message.n:
            return []
        arrival.have += message.n
        if message.rows:
            # A copy: a view would keep the whole frame alive, with the keys and values in it.
            arrival.checkpoints.append(Segment(message.start, message.n, memoryview(bytes(message.rows))))
        else:
            arrival.checkpoints.skip(arrival.have)
        return [Emit(Import(arrival.key, message.start, message.n, message.payload))]

    def take(self, message: m.Open) -> Arrival | None:
        """What has arrived of the session that is opened now, if it holds under ``message``."""
        arrival = self._arrivals.get(message.session)
        if arrival is None or not arrival.usable(message):
            return None
        return self._arrivals.pop(message.session)

    def drop(self, session: m.SessionId) -> list[Effect]:
        """Nobody will open it here."""
        arrival = self._arrivals.pop(session, None)
        return [Emit(Free(arrival.key))] if arrival is not None and arrival.reserved else []

    def spoiled(self, key: str) -> list[Effect]:
        """What came could not be written."""
        arrival = self._of(key)
        if arrival is None:
            return []
        why = "pages came that are none of this model's"
        return [*self.drop(arrival.prepare.session), self._refusal(arrival.prepare, "failed", why, 1.0)]

    @property
    def next_due(self) -> float | None:
        return min((min(x.until, x.fetch_at) for x in self._arrivals.values()), default=None)

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for session, arrival in list(self._arrivals.items()):
            if now >= arrival.until:
                effects += self.drop(session)
            elif now >= arrival.fetch_at:
                arrival.asked = False
        return [*effects, *self._fetch(now)]

    def _fetch(self, now: float) -> list[Effect]:
        """Ask for the next pieces: of the oldest session first, and of those that have caught up last."""
        effects: list[Effect] = []
        room = self.config.fetching - sum(arrival.asked for arrival in self._arrivals.values())
        for arrival in sorted(self._arrivals.values(), key=lambda arrival: arrival.caught_up):
            if not arrival.reserved or arrival.asked or not (arrival.waits or now >= arrival.fetch_at):
                continue
            arrival.asked, arrival.waits = room > 0, room <= 0
            arrival.fetch_at = now + (self.config.again_s if arrival.asked else self.config.follow_s)
            if arrival.asked:
                room -= 1
                effects.append(arrival.fetch())
        return effects

    def _of(self, key: str) -> Arrival | None:
        return next((arrival for arrival in self._arrivals.values() if arrival.key == key), None)

    @staticmethod
    def _refusal(message: m.Prepare, code: str, why: str, retry_after_s: float) -> Effect:
        refused = m.Refused(message.session, message.epoch, message.hop, code, why, retry_after_s)  # type: ignore[arg-type]
        return Send(message.epoch[1], refused)
