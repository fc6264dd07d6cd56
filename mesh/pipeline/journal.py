"""Who else knows a session: the journals that a node holds, and what it does when an owner is lost.

A journal is the whole request and every token: enough to own the session.  Its holders are the sampler, hop 0, and a
witness where the owner is both of them.  An owner is lost when its connection breaks for good, when gossip says so,
when it says itself that it does not own the session (``Disown``), or when it neither renews the lease nor answers a
``Held``.  Then the holders adopt, each after a delay of its own, so that mostly one does; where two claim, the hops
follow the higher epoch, and the other yields (mesh/pipeline/session.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from mesh.core import Effect, Emit, Send
from mesh.pipeline import messages as m
from mesh.types import NodeId, Route


class JournalConfig(msgspec.Struct, frozen=True):
    """Times in seconds of a journal's holder."""

    lease_s: float = 60.0
    """An owner that has not renewed for this long is asked ..."""
    ask_s: float = 5.0
    """... and lost without an answer in this time."""
    adopt_step_s: float = 1.0
    """The sampler adopts at once, hop 0 this much later, the witness twice as much."""
    max_witnessed: int = 4096
    """Journals that a node holds as a witness; beyond them it refuses."""


GIVEN = "given away"


class Adopt(msgspec.Struct, frozen=True):
    """Event: the owner of a session is lost; go on with it (``Session.adopt``)."""

    session: m.SessionId
    epoch: m.Epoch
    route: Route
    request: m.SessionRequest
    drawn: tuple[int, ...]
    left_s: float
    detected_by: str
    given: bool = False
    """Its owner gave it away, and lives."""


def holders(route: Route, witness: NodeId | None) -> list[NodeId]:
    """Whoever holds the journal besides the owner, in the order in which they adopt."""
    ends = [route.hops[-1].node, route.hops[0].node]
    return list(dict.fromkeys([*ends, *([witness] if witness else [])]))


def needs_witness(route: Route, owner: NodeId) -> bool:
    """No end of the route is another node than the owner."""
    return all(node == owner for node in holders(route, None))


def disclaim(message: m.ToSession, sender: NodeId, ended: bool, heir: NodeId | None = None) -> list[Effect]:
    """The answer of a node that is spoken to as owner of a session which it does not own.

    ``heir``: it has just given it away: nobody but the heir needs to know.  ``ended``: it did own it, and the session
    is over: free it.  Else it forgot (a restart): whoever holds the journal adopts.
    """
    if isinstance(message, m.Ahead | m.Refused):
        return []
    if heir:
        return [Send(sender, m.Disown(message.session, message.epoch, heir))] if sender == heir else []
    answer = m.Release if ended else m.Disown
    return [Send(sender, answer(message.session, message.epoch))]


class Journal:
    """One session at one holder."""

    def __init__(self, message: m.Open, now: float) -> None:
        self.follow(message, now)

    def follow(self, message: m.Open, now: float) -> None:
        """Take over what the owner knows under a new epoch."""
        assert message.request is not None
        self.session, self.epoch, self.route = message.session, message.epoch, message.route
        self.hop, self.max_positions = message.hop, message.max_positions
        self.request = message.request
        self.tokens = [*message.request.prompt, *message.drawn]
        self.ends_at = now + message.left_s
        self.claims = 0
        self.renew(now)

    def renew(self, now: float) -> None:
        """The owner lives."""
        self.lease_from = now
        self.asked_at: float | None = None
        self.adopt_at: float | None = None
        self.cause = ""

    @property
    def owner(self) -> NodeId:
        return self.epoch[1]

    @property
    def drawn(self) -> tuple[int, ...]:
        return tuple(self.tokens[len(self.request.prompt) :])

    @property
    def complete(self) -> bool:
        return m.finish_reason(self.request, self.tokens, len(self.request.prompt)) is not None

    @property
    def witnessed(self) -> bool:
        """Held as a witness: no hop of the session is here."""
        return self.hop == len(self.route.hops)

    def held(self) -> Send:
        """What the owner is told of this journal."""
        return Send(self.owner, m.Held(self.session, self.epoch, len(self.tokens)))

    def has_more(self, message: m.Open) -> bool:
        """A claim by another owner lacks tokens that are known here."""
        if message.epoch[1] == self.owner or len(self.tokens) <= message.accepted:
            return False
        return message.request is None or self.drawn[: len(message.drawn)] == message.drawn

    def learn(self, start: int, tokens: tuple[int, ...]) -> bool:
        """Append what is new of the tokens from ``start`` on; False: some before them are missing."""
        if start > len(self.tokens):
            return False
        self.tokens += tokens[len(self.tokens) - start :]
        return True

    def deadline(self, config: JournalConfig) -> float:
        if self.adopt_at is not None:
            return self.adopt_at
        if self.asked_at is not None:
            return self.asked_at + config.ask_s
        return self.lease_from + config.lease_s


class Journals:
    """The journals of one node, as hop and as witness."""

    def __init__(self, me: NodeId, config: JournalConfig, free: Callable[[m.SessionId], list[Effect]]) -> None:
        """``free``: gives up everything that this node holds of a session, its journal included."""
        self.me, self.config, self._free = me, config, free
        self._journals: dict[m.SessionId, Journal] = {}

    def __iter__(self) -> Iterator[Journal]:
        return iter(self._journals.values())

    def get(self, session: m.SessionId) -> Journal | None:
        return self._journals.get(session)

    @property
    def witnessed(self) -> int:
        return sum(journal.witnessed for journal in self)

    def follow(self, message: m.Open, now: float) -> Journal:
        """Hold the journal of a session that is opened here, or take over its new epoch."""
        journal = self._journals.get(message.session)
        if journal is None:
            journal = self._journals[message.session] = Journal(message, now)
        else:
            journal.follow(message, now)
        return journal

    def drop(self, session: m.SessionId) -> None:
        self._journals.pop(session, None)

    # -- the witness ---------------------------------------------------------------------------------------------------

    def witness(self, message: m.Open, now: float) -> list[Effect]:
        """Hold a journal and no layers."""
        journal = self._journals.get(message.session)
        if journal is None and self.witnessed >= self.config.max_witnessed:
            why = f"{self.config.max_witnessed} journals are witnessed here already"
            return [Send(message.epoch[1], m.Refused(message.session, message.epoch, message.hop, "busy", why))]
        if journal is None or journal.epoch < message.epoch:  # sent again it would cut what was fed since
            self.follow(message, now)
        return [Send(message.epoch[1], m.Opened(message.session, message.epoch, message.hop, message.accepted))]

    def on_feed(self, journal: Journal, message: m.Feed) -> list[Effect]:
        """The owner's tokens, as a witness gets them; what is missing it sends again when it hears how far this is."""
        if message.start + len(message.tokens) <= journal.max_positions:
            journal.learn(message.start, message.tokens)
        return [journal.held()]

    def standing(self, journal: Journal) -> list[Effect]:
        """A witness's answer to Progress."""
        told = m.Progressing(journal.session, journal.epoch, journal.hop, 0, 0, len(journal.tokens))
        return [Send(journal.owner, told), journal.held()]

    # -- the owner's life ----------------------------------------------------------------------------------------------

    def lost(self, node: NodeId, cause: str, now: float) -> list[Effect]:
        """``node`` is gone: adopt what it owned."""
        mine = [journal for journal in self if journal.owner == node]
        return [effect for journal in mine for effect in self._orphaned(journal, cause, now)]

    def disowned(self, message: m.Disown, sender: NodeId, now: float) -> list[Effect]:
        journal = self._journals.get(message.session)
        if journal is None or (journal.epoch, journal.owner) != (message.epoch, sender):
            return []
        if not message.heir:
            return self._orphaned(journal, "disowned", now)
        journal.learn(len(journal.request.prompt), message.drawn)
        return self._orphaned(journal, GIVEN, now, message.heir)

    @property
    def next_due(self) -> float | None:
        return min((journal.deadline(self.config) for journal in self), default=None)

    def tick(self, now: float) -> list[Effect]:
        """Adopt what is due, ask after owners that do not renew."""
        effects: list[Effect] = []
        for journal in list(self):
            if journal.deadline(self.config) > now:
                continue
            if journal.adopt_at is not None:
                effects += self._adopt(journal, now)
            elif journal.asked_at is not None:
                effects += self._orphaned(journal, "lease", now)
            else:
                journal.asked_at = now
                effects.append(journal.held())
        return effects

    def _orphaned(self, journal: Journal, cause: str, now: float, heir: NodeId | None = None) -> list[Effect]:
        if journal.owner == self.me or journal.ends_at <= now:
            return self._free(journal.session)
        if journal.adopt_at is not None:
            return []
        line = [node for node in holders(journal.route, None) if node != journal.owner]
        place = line.index(self.me) if self.me in line else len(line)
        if heir:
            place = 0 if heir == self.me else place + 1
        journal.cause, journal.adopt_at = cause, now + place * self.config.adopt_step_s
        return self._adopt(journal, now) if place == 0 else []

    @staticmethod
    def _adopt(journal: Journal, now: float) -> list[Effect]:
        epoch = (journal.epoch[0] + journal.claims, journal.owner)  # no claim has the epoch of an earlier one
        found = (journal.session, epoch, journal.route, journal.request, journal.drawn)
        effect = Emit(Adopt(*found, journal.ends_at - now, journal.cause, journal.cause == GIVEN))
        journal.renew(now)  # should nothing come of it, the lease runs out again
        journal.claims += 1
        return [effect]
