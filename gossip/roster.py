"""The members table in motion: claims are proved and merged, suspicions run, the own record refutes, news waits."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import msgspec

from gossip.broadcast import BroadcastQueue
from gossip.config import GossipConfig
from gossip.events import Confirmed, Conflict, MemberChanged, Refuted
from gossip.health import LocalHealth
from gossip.members import Member, Members, decide, says_nothing_new
from gossip.messages import DATAGRAM_CODEC, STATE_NAMES, MemberRecord, SavedIncarnation, State, Update
from gossip.suspicion import Suspicion, unite
from mesh.core import Effect, Emit, Persist, Rejected
from mesh.types import MeshId, NodeId

Verify = Callable[[NodeId, bytes, bytes, bytes], bool]
"""(node id, public key, message, signature): the id is the key's hash, and the key signed the message."""


CONFIRMED = 2
"""Accusers that make a death more than the word of one, who may be the ill one itself."""


class Identity(msgspec.Struct, frozen=True):
    """Who this node is, and how it proves that and checks others; the two functions must be pure."""

    node: NodeId
    mesh_id: MeshId
    key: bytes
    sign: Callable[[bytes], bytes]
    verify: Verify


class Roster:
    """Everything known of who is here.  Appends its effects to ``out``, which the core returns."""

    def __init__(
        self,
        identity: Identity,
        config: GossipConfig,
        health: LocalHealth,
        rng: random.Random,
        out: list[Effect],
    ) -> None:
        self.identity, self.config, self.health, self._out = identity, config, health, out
        self.members = Members(identity.node, rng)
        self.news: BroadcastQueue[Update] = BroadcastQueue(DATAGRAM_CODEC.size)
        self.to_tell: list[tuple[NodeId, Update]] = []
        """Claims that go to one member at once; the core sends and clears them."""
        self.revived: list[NodeId] = []
        """Members held dead that have said themselves that they live; the core compares tables and clears this."""
        self.last_calls: list[NodeId] = []
        """Suspects to be probed before their verdict; the core does that and clears this."""
        self.recently_dead: dict[NodeId, float] = {}
        """When each was declared dead, for as long as it is still gossiped to."""
        self.leaving = False
        self._suspects: dict[NodeId, float] = {}
        """Deadline of each running suspicion."""
        self._no_verdict_before = -math.inf
        self._verdict_at: float | None = None
        """The smallest of them; ``None``: to be computed."""
        self._expelled: dict[NodeId, None] = {}

    # -- the own record

    def start(self, address: str, incarnation: int, now: float) -> None:
        """Come into being: the record is durable before anybody hears of it."""
        self._issue(address, incarnation, now)

    def _issue(self, address: str, incarnation: int, now: float, left: bool = False) -> None:
        me = self.identity
        bare = MemberRecord(me.node, incarnation, address, left, me.key, b"")
        record = msgspec.structs.replace(bare, signature=me.sign(bare.signed_bytes(me.mesh_id)))
        self._out.append(Persist(SavedIncarnation(incarnation)))
        member = self.members.get(me.node) or Member(record, State.ALIVE, now)
        member.record, member.changed_at = record, now
        member.state = State.LEFT if left else State.ALIVE
        self.members.put(member)
        self.news.add(me.node, member.update())

    @property
    def own(self) -> Member:
        member = self.members.get(self.identity.node)
        assert member is not None, "join comes first"
        return member

    def move(self, address: str, now: float) -> None:
        """The own address is another now."""
        self._issue(address, self.own.record.incarnation + 1, now)

    def leave(self, now: float) -> None:
        self.leaving = True
        self._issue(self.own.record.address, self.own.record.incarnation + 1, now, left=True)

    def _about_me(self, update: Update, sender: NodeId, now: float) -> bool:
        """Somebody speaks of this node.  A larger incarnation is of an earlier life with a faster clock, or of a
        twin: go above it; suspicion at the current one is refuted; anything older is stale."""
        mine, theirs = self.own.record, update.record
        stale = theirs.incarnation < mine.incarnation
        if stale or self.leaving or not self._proved(theirs, self.own, sender):
            return False
        if theirs.incarnation == mine.incarnation and update.state is State.ALIVE:
            return False
        self._refute(theirs.incarnation + 1, update.state, sender, now)
        return True

    def _refute(self, incarnation: int, held: State, sender: NodeId, now: float) -> None:
        self._issue(self.own.record.address, incarnation, now)
        self.health.add(+1)
        self.to_tell.append((sender, self.own.update()))
        self._out.append(Emit(Refuted(incarnation, STATE_NAMES[held], sender)))

    # -- claims

    def apply(self, update: Update, sender: NodeId, now: float, *, synced: bool = False, age_s: float = 0.0) -> bool:
        """Merge one claim (the table in ``members``); True: it was news.  ``synced``: from a comparison of tables."""
        record, node = update.record, update.record.node
        if node in self._expelled:
            return False
        if (update.state is State.LEFT) != record.left:
            self._reject(sender, f"{node} is said to be {STATE_NAMES[update.state]} against its own record")
            return False
        if node == self.identity.node:
            return self._about_me(update, sender, now)
        held = self.members.get(node)
        if held is not None and says_nothing_new(held, update, sender):
            return False
        state = self._next_state(held, update, synced)
        if state is None or not self._proved(record, held, sender):
            return False
        accuses = update.state in (State.SUSPECT, State.DEAD)
        by = (update.by or (sender,)) if accuses else ()
        if held is None:
            return self._meet(update, state, by, now, age_s)
        old = held.state
        changed = self._change(held, record, state, by, now, age_s)
        if changed and synced and state is State.SUSPECT and self.config.subject_first:
            self.to_tell.append((node, held.update()))
        if changed and old is State.DEAD and state is State.ALIVE and sender == node:
            self.revived.append(node)
        return changed

    def _next_state(self, held: Member | None, update: Update, synced: bool) -> State | None:
        incarnation = update.record.incarnation
        if held is None:
            return decide(None, 0, update.state, incarnation, synced)
        same = incarnation == held.record.incarnation
        accusers = unite(held.accusers if same else (), update.by)
        hearsay = synced or (self.config.last_call and len(accusers) < CONFIRMED)
        return decide(held.state, held.record.incarnation, update.state, incarnation, hearsay)

    def _proved(self, record: MemberRecord, held: Member | None, sender: NodeId) -> bool:
        """The record is its owner's.  Checked once per incarnation: an equal one was proved before."""
        if held is not None and record == held.record:
            return True
        me = self.identity
        if not me.verify(record.node, record.key, record.signed_bytes(me.mesh_id), record.signature):
            self._reject(sender, f"a record of {record.node} that it did not sign")
            return False
        if held is not None and record.incarnation == held.record.incarnation:
            self._out.append(Emit(Conflict(record.node, held.record.address, record.address)))
            return False  # two lives share an incarnation; the first one heard stays until one of them refutes
        return True

    def _meet(self, update: Update, state: State, by: tuple[NodeId, ...], now: float, age_s: float) -> bool:
        """A member or tombstone not heard of before."""
        if age_s >= self.config.tombstone_s or not self._make_room(now):
            return False
        member = Member(update.record, State.ALIVE, now)
        member.state = State.DEAD  # so that `_change` sees it come into the ring
        self._change(member, update.record, state, by, now, age_s, new=True)
        return True

    def _make_room(self, now: float) -> bool:
        if len(self.members) < self.config.max_members:
            return True
        tombs = [member for member in self.members if not member.present and member.record.node != self.identity.node]
        if tombs:
            self.members.forget(min(tombs, key=lambda member: member.changed_at).record.node)
        return bool(tombs)

    def _change(
        self,
        member: Member,
        record: MemberRecord,
        state: State,
        by: tuple[NodeId, ...],
        now: float,
        age_s: float = 0.0,
        new: bool = False,
    ) -> bool:
        """Hold ``state`` at ``record``'s incarnation; True if anything is different now."""
        old, risen = member.state, new or record.incarnation > member.record.incarnation
        accusers = () if state in (State.ALIVE, State.LEFT) else unite(() if risen else member.accusers, by)
        if not risen and state is old and accusers == member.accusers:
            return False
        confirmed = not risen and state is old
        member.record, member.state, member.accusers = record, state, accusers
        if confirmed:
            self._out.append(Emit(Confirmed(record.node, len(accusers))))
        else:
            member.changed_at = now - age_s
            self._out.append(
                Emit(
                    MemberChanged(
                        record.node,
                        None if new else STATE_NAMES[old],
                        STATE_NAMES[state],
                        record.incarnation,
                        len(accusers),
                    )
                )
            )
        self.members.put(member)
        self.members.track(member, old < State.DEAD)
        self._settle(member, old, risen, now)
        if age_s < self.config.dead_gossip_s:
            self.news.add(record.node, member.update())
        return True

    def _settle(self, member: Member, old: State, risen: bool, now: float) -> None:
        """Start, hasten or end the suspicion that belongs to the member's state."""
        node, state = member.record.node, member.state
        if state is State.SUSPECT:
            if member.suspicion is None or risen:
                member.suspicion = Suspicion(self.members.n, now, self.config)
            self._suspects[node] = member.suspicion.deadline(len(member.accusers))
            self._verdict_at = None
        elif member.suspicion is not None:
            member.suspicion = None
            del self._suspects[node]
            self._verdict_at = None
        if state is State.DEAD and old is not State.DEAD:
            self.recently_dead[node] = now
        elif state is not State.DEAD:
            self.recently_dead.pop(node, None)

    # -- suspicion

    def accuse(self, node: NodeId, incarnation: int, now: float) -> None:
        """The own probe of ``node``, sent while it was at ``incarnation``, failed.  One that has risen since lives: it
        refuted, or came back."""
        member = self.members.get(node)
        if member is None or not member.present or member.record.incarnation != incarnation:
            return
        changed = self._change(member, member.record, State.SUSPECT, (self.identity.node,), now)
        if changed and self.config.subject_first:
            self.to_tell.append((node, member.update()))

    @property
    def deadline(self) -> float:
        """Of the next verdict."""
        if self._verdict_at is None:
            self._verdict_at = max(self._no_verdict_before, min(self._suspects.values(), default=math.inf))
        return self._verdict_at

    def tick(self, now: float) -> None:
        """Declare dead whoever did not refute in time; where a single member accuses, after one last probe.

        The suspicion may have been lost with everything else that an ill accuser sent, so that its subject never heard
        of it; the last ping brings it, and one answer clears it.
        """
        for node in [node for node, deadline in self._suspects.items() if deadline <= now]:
            member, suspicion = self._suspect(node)
            if len(member.accusers) < CONFIRMED and self.config.last_call and not suspicion.called:
                suspicion.called = True
                suspicion.excused += now - self._suspects[node] + self.health.period_s(now)
                self._suspects[node] = suspicion.deadline(len(member.accusers))
                self.last_calls.append(node)
            else:
                self._change(member, member.record, State.DEAD, member.accusers, now)
        self._verdict_at = None

    def _suspect(self, node: NodeId) -> tuple[Member, Suspicion]:
        member = self.members.get(node)
        assert member is not None, node
        assert member.suspicion is not None, node
        return member, member.suspicion

    def excuse(self, seconds: float, earliest: float) -> None:
        """This node slept for ``seconds``: refutations may have come and gone.  No verdict before ``earliest``, even
        where confirmations that came meanwhile would bring it forward."""
        self._no_verdict_before = earliest
        self._verdict_at = None
        for node in self._suspects:
            member, suspicion = self._suspect(node)
            suspicion.excused += seconds
            self._suspects[node] = suspicion.deadline(len(member.accusers))

    # -- the dead

    def gossip_targets(self, count: int, now: float, rng: random.Random) -> list[NodeId]:
        """Random present or recently dead members."""
        for node in [node for node, at in self.recently_dead.items() if at < now - self.config.dead_gossip_s]:
            del self.recently_dead[node]
        if not self.recently_dead:
            return self.members.sample(count)
        pool = self.members.present + list(self.recently_dead)
        return rng.sample(pool, min(count, len(pool)))

    def dead(self) -> list[NodeId]:
        return [member.record.node for member in self.members if member.state is State.DEAD]

    def sweep(self, now: float) -> list[NodeId]:
        """Forget tombstones that are old enough; who was forgotten."""
        old = [
            member.record.node
            for member in self.members
            if not member.present
            and member.record.node != self.identity.node
            and member.changed_at <= now - self.config.tombstone_s
        ]
        for node in old:
            self.members.forget(node)
        return old

    def expel(self, node: NodeId, now: float) -> None:
        """``node`` was revoked: it is dead from now on, whatever anybody claims."""
        self._expelled[node] = None
        member = self.members.get(node)
        if member is not None and member.present:
            self._change(member, member.record, State.DEAD, (self.identity.node,), now)

    def is_expelled(self, node: NodeId) -> bool:
        return node in self._expelled

    def _reject(self, sender: NodeId, why: str) -> None:
        self._out.append(Emit(Rejected(sender, why)))
