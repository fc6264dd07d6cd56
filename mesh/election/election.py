"""The election core: all states and all transitions are in this file.

                      silence of the leader, or its loss seen (R8)            majority would vote
    follower ───────────────────────────────────────────────► precandidate ─────────────────────► candidate
       ▲ ▲ ▲                                                        │                                 │
       │ │ └── leader heard; record changed ────────────────────────┘      majority voted: restamp    │
       │ └──── newer term, leader heard, record changed, time-out (asks again as precandidate) ◄──────┤
       │                                                                                              ▼
       └──── newer term seen; no majority answers (R7); taken over by a newer epoch ◄────────────── leader

A *learner* is a follower that is no voter by its own record: it never campaigns, but answers when asked for a vote; a
leader of which it hears nothing more it forgets.
One idea dissolves log matching, snapshots and joint consensus: the log has length one.  A leader owns the whole record;
a vote is refused to candidates with an older one; a majority that holds exactly the leader's makes it committed.  This
is the logless reconfiguration of MongoDB (Schultz, Zhou, Dardik, Tripakis, OPODIS 2021), carrying its data along.

Rules R1-R10 are named where they are kept.  Where this file says more than they do:

* R9, voters: *uncommitted* records are taken from the current leader only; *committed* ones from anyone.  That a
  record is committed is true whoever says it (I4: every later leader's record descends from it), and a voter that was
  removed while it was away has no leader to hear it from.
* A lost candidacy is repeated after 2-4 heartbeats, doubling up to the election time-out, instead of a whole time-out,
  and within one where a majority refused: with PreVote a repeated question disturbs nobody.
* PreVotes are refused and own candidacies put off so that two voters seldom collide (``_gives_way``), and so that an
  ailing voter lets the others go first (``_time_out``).  Both are a matter of a fraction of a second, once per
  time-out: what is safe is not touched, since nobody ever has to grant a PreVote or to campaign.
* A node of an older epoch that meets a newer one takes its committed record and goes on as a learner: ``takeover`` is
  an explicit act, and the old side is refused until it has followed.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh.core import Effect, Rejected
from mesh.election import messages as m
from mesh.election.events import (
    Answer,
    BecameLeader,
    Busy,
    Committed,
    LeaderIs,
    LeaderLost,
    NotLeader,
    Refused,
    Released,
    SteppedDown,
)
from mesh.election.gate import objection, opened
from mesh.election.progress import Progress
from mesh.election.quorum import is_quorum
from mesh.election.record import (
    MAX_TERM,
    Content,
    PlacementId,
    Record,
    RecordId,
    epoch_counter,
    make_epoch,
    make_record,
    restamp,
)
from mesh.election.spread import Spread
from mesh.election.state import NEVER, State
from mesh.election.voters import MemberInfo
from mesh.types import NodeId


class Election(State):
    """One node's part in the election; see ``mesh/core.py`` for the contract and the module for the picture."""

    # ------------------------------------------------------------------ the contract

    def receive(self, message: m.Message, sender: NodeId, now: float) -> list[Effect]:
        """Handle ``message``; ``sender`` is who the connection was authenticated as."""
        if why := objection(message, sender, self.durable, self._revoked):
            self._emit(Rejected(sender, why))
        elif isinstance(message, m.Relayed):
            self._on_relayed(message, sender, now)
        else:
            self._post.heard(sender, None)
            self._dispatch(message, sender, now)
        return self._outbox.flush()

    def tick(self, now: float) -> list[Effect]:
        """Do what is due; early, late or repeated calls do no harm."""
        if self._deadline is not None and now >= self._deadline:
            if self._role == "leader":
                self._tick_leader(now)
            elif self._role == "follower":
                self._time_out(now)
            elif now >= self._round_ends:
                self._attempts = min(self._attempts + 1, 8)
                self._prevote(now)
            else:
                self._ask_again(now)
        if self._leave_at is not None and now >= self._leave_at:
            self._ask_to_leave(now)
        return self._outbox.flush()

    # ------------------------------------------------------------------ verbs

    def propose(
        self, now: float, content: Content | None = None, voters: Sequence[NodeId] | None = None
    ) -> list[Effect]:
        """Replace content, voters or both of the record; ``Committed`` tells when it holds.

        Start from ``record.content`` (``msgspec.structs.replace``); ``placement_counter`` is set here.  Voters that the
        new content revokes are dropped unless ``voters`` says otherwise.  Raises ``NotLeader``, ``Busy`` or
        ``Refused``: in each case nothing happened.
        """
        if self._role != "leader" or not self._has_quorum(now):
            raise NotLeader(None if self._role == "leader" else self._leader)
        if not self._may_propose():
            raise Busy("a change is being committed, or none of this term is committed yet")
        old = self.record
        after = old.content if content is None else self._counted(content)
        chosen = tuple(v for v in old.voters if v not in after.tombstones) if voters is None else tuple(voters)
        self._check_step(chosen, after)
        self._install(self._next_record(chosen, after), now)
        return self._outbox.flush()

    def note_lost(self, node: NodeId, now: float) -> list[Effect]:
        """R8: the connection to ``node`` was reset and could not be made again, or gossip confirmed it dead or left."""
        self._post.lost(node)
        if node == self._leader and self._role == "follower":
            self._lost = node, self.term, self._said + now - self._heard_leader
            self._set_leader(None)
            if self.is_voter:
                self._deadline = now + self._rng.uniform(0.0, self._config.forget_jitter_s)
                self._may_yield, self._waited_for_leader = True, False
        return self._outbox.flush()

    def note_members(self, members: Sequence[MemberInfo], now: float) -> list[Effect]:
        """What gossip says now of all members, this node included or not; replaces what it said before."""
        self._roster.note(members, self.record.voters, now)
        self._check_released()
        return self._outbox.flush()

    def note_health(self, local_health: int) -> None:
        """Lifeguard's multiplier of this node (0: well): an ailing node lets the others campaign first."""
        self._local_health = max(0, local_health)

    def transfer(self, now: float, to: NodeId | None = None) -> list[Effect]:
        """Hand leadership over to ``to`` or to the voter that is best informed.  Raises ``NotLeader``, ``Busy`` or
        ``Refused``; if the heir does not win within one election time-out, this node goes on leading."""
        if self._role != "leader":
            raise NotLeader(self._leader)
        if not self._settled():
            raise Busy("a change is being committed")
        if not self._hand_over(now, to):
            raise Refused("no voter is fit to take over")
        return self._outbox.flush()

    def leave(self, now: float) -> list[Effect]:
        """Ask to be replaced as voter (and as leader); ``Released`` tells when this node may go.  Bound the wait."""
        self._leave_at = now
        self._check_released()
        if self._leaving:
            self._ask_to_leave(now)
        return self._outbox.flush()

    def takeover(self, now: float, *, force: bool = False) -> list[Effect]:
        """Start a new epoch with this node as its single voter: a person's act, for a mesh that lost its majority.

        The old epoch is fenced wherever the new one is heard of.  What was not committed is dropped.  Raises
        ``Refused`` where nothing was ever committed here, or while a leader is heard (unless ``force``).
        """
        if not self.committed.voters:
            raise Refused("this node holds no committed record to start from")
        if self._leader is not None and not force:
            raise Refused(f"the mesh has a coordinator: {self._leader}")
        self._become_follower(self.term, "took over", now)
        epoch = make_epoch(epoch_counter(self.epoch) + 1, self._rng.getrandbits(32))
        old, term = self.committed, self.term + 1
        record = make_record(epoch, RecordId(term, old.id.version), (self.me,), old.content)
        self._save(epoch=epoch, term=term, voted_for=self.me, record=record, committed=record)
        self._lead(now)
        self._learnt()
        return self._outbox.flush()

    # ------------------------------------------------------------------ the fence

    def obey(self, epoch: int, term: int, sender: NodeId, now: float) -> tuple[Answer, list[Effect]]:
        """May a command of the coordinator of (``epoch``, ``term``) be obeyed?  Never below the highest seen (I7)."""
        known = (self.epoch, self.term)
        if (epoch, term) < known:
            return Answer("stale", known), []
        if epoch > self.epoch:
            self._send(sender, self._fetch())
            return Answer("fetch", known), self._outbox.flush()
        if term > MAX_TERM:
            return Answer("stale", known), []
        self._see_term(term, now)
        return Answer("ok", (self.epoch, self.term)), self._outbox.flush()

    def may_open(self, placement: PlacementId, source: NodeId) -> tuple[Answer, list[Effect]]:
        """May work under ``placement`` be opened or resumed here?  ``source`` is asked when this node is behind."""
        active = self.durable.active_placement
        if placement <= active:
            return Answer("ok" if placement == active else "stale", active), []
        self._send(source, self._fetch())
        return Answer("fetch", active), self._outbox.flush()

    # ------------------------------------------------------------------ transitions

    def _become_follower(self, term: int, why: str, now: float) -> None:
        """Any state -> follower; a newer term also clears the vote and the belief in a leader."""
        was = self._role
        if was == "leader":
            self._emit(SteppedDown(self.term, why))
            self._set_leader(None)
            self._transfer_until = NEVER
            self._roster.forget_leavers()
        self._role = "follower"
        if term > self.term:
            self._save(term=term, voted_for=None)
            self._set_leader(None)
        if was != "follower" or self._deadline is None:
            self._arm(now)

    def _time_out(self, now: float) -> None:
        """The leader was silent: an ailing voter, which may be the reason, lets the others go first.

        Its health counts now, not when the time-out was armed; and by a fixed time, not by a factor: where every voter
        has stalled, as after a freeze of the whole machine, all are ailing and somebody must lead.
        """
        if self._local_health and self._waited_for_leader:
            self._waited_for_leader = False
            self._deadline = now + self._config.yield_s
        else:
            self._prevote(now)

    def _prevote(self, now: float) -> None:
        """follower, precandidate or candidate -> precandidate (R3).  A non-voter never campaigns (R9)."""
        self._role = "follower"
        self._set_leader(None)
        if not self.is_voter:
            self._deadline = None
            return
        self._role = "precandidate"
        self._open_round(now)
        if self._ballot.won:
            self._campaign(now)

    def _campaign(self, now: float) -> None:
        """precandidate (or follower told to) -> candidate: a new term and the own vote, durable before asking (R2)."""
        self._role = "candidate"
        self._set_leader(None)
        self._save(term=self.term + 1, voted_for=self.me)
        self._open_round(now)
        if self._ballot.won:
            self._become_leader(now)

    def _become_leader(self, now: float) -> None:
        """candidate -> leader: restamp the record and replicate it (R4)."""
        self._save(record=self._restamped())
        self._lead(now)

    def _lead(self, now: float) -> None:
        self._role, self._attempts = "leader", 0
        self._progress, self._spread = Progress(now), Spread(self._config)
        self._last_step = now
        self._emit(BecameLeader(self.term))
        self._set_leader(self.me)
        self._replicate(now, whole=False)
        self._try_commit(now)

    def _open_round(self, now: float) -> None:
        """Ask all voters; the round ends sooner than an election time-out while few attempts failed."""
        short = self._rng.uniform(2.0, 4.0) * self._config.heartbeat_s * 2**self._attempts
        full = self._rng.uniform(self._config.election_min_s, self._config.election_max_s)
        self._round_opened, self._round_ends = now, now + min(short, full)
        self._ballot = self._new_ballot()
        self._ask_again(now)

    def _ask_again(self, now: float) -> None:
        """Requests get lost, and a voter may have changed its mind: ask all that have not granted."""
        for voter in self.record.voters:
            if not self._ballot.granted_by(voter):
                self._request(voter, self._question(), now)
        self._deadline = min(now + self._config.heartbeat_s, self._round_ends)

    # ------------------------------------------------------------------ votes

    def _on_ask_prevote(self, message: m.AskPreVote, sender: NodeId, now: float) -> None:
        granted = (
            message.term > self.term
            and self._at_least(message.record, self.record.id)
            and not self._hears_leader(now)
            and self._gives_way(message, sender, now)
        )
        self._post.reply(sender, m.PreVoted(*self._head(), campaign=message.term, granted=granted))
        if self._newer(self.committed.id, message.record):
            self._send(sender, self._announce())  # it was away, or cannot hear the leader: it need not stay behind

    def _gives_way(self, message: m.AskPreVote, sender: NodeId, now: float) -> bool:
        """Whether this voter's own candidacy stands back behind one that it would vote for.

        Voters that saw the loss of their leader at once would promise each other their votes, campaign in one term and
        split the vote.  So who promises waits, once; and of two that ask at once the lower in rank (record, then id)
        gives way, while the higher refuses: for one heartbeat, since one that cannot win must not be in the way.
        """
        outranks = message.record == self.record.id and self.me < sender
        if self._role == "precandidate" and outranks:
            if now < self._round_opened + self._config.heartbeat_s:
                self._request(sender, self._question(), now)  # it may have refused before it saw the loss
                return False
        elif self._may_yield and self._role != "candidate" and self.is_voter:
            self._role, self._may_yield = "follower", False
            self._deadline = max(now + self._config.yield_s, self._deadline or now)
        return True

    def _on_ask_vote(self, message: m.AskVote, sender: NodeId, now: float) -> None:
        self._see_term(message.term, now)
        granted = (
            message.term == self.term
            and self.durable.voted_for in (None, sender)
            and self._at_least(message.record, self.record.id)
        )
        if granted and self.durable.voted_for is None:
            self._save(voted_for=sender)
        if granted:
            self._become_follower(self.term, "voted", now)
            self._arm(now)
        self._post.reply(sender, m.Voted(*self._head(), granted=granted))

    def _on_prevoted(self, message: m.PreVoted, sender: NodeId, now: float) -> None:
        if message.term > self.term:
            self._see_term(message.term, now)
            self._deadline = now + self._rng.uniform(0.0, self._config.heartbeat_s) if self.is_voter else None
        elif message.granted and self._role == "precandidate" and message.campaign == self.term + 1:
            self._ballot.grant(sender)
            if self._ballot.won:
                self._campaign(now)

    def _on_voted(self, message: m.Voted, sender: NodeId, now: float) -> None:
        self._see_term(message.term, now)
        if self._role != "candidate" or message.term != self.term:
            return
        if message.granted:
            self._ballot.grant(sender)
        else:
            self._ballot.refuse(sender)
        if self._ballot.won:
            self._become_leader(now)
        elif self._ballot.lost:
            self._lose(now)

    def _lose(self, now: float) -> None:
        """candidate -> follower that asks again soon: a split vote need not cost a time-out."""
        self._role = "follower"
        self._deadline = now + self._rng.uniform(0.0, 1.0) * self._config.heartbeat_s * 2**self._attempts
        self._may_yield, self._waited_for_leader = True, False
        self._attempts = min(self._attempts + 1, 8)

    def _on_timeout_now(self, message: m.TimeoutNow, sender: NodeId, now: float) -> None:
        if message.term == self.term and sender == self._leader and self.is_voter and self._role == "follower":
            self._campaign(now)

    # ------------------------------------------------------------------ the record, at a follower

    def _on_append(self, message: m.Append, sender: NodeId, now: float) -> None:
        if message.term >= self.term:
            if self._role == "leader" and message.term == self.term:
                self._emit(Rejected(sender, f"claims term {self.term}, which this node leads"))
                return
            self._follow(message, sender, now)
        self._post.reply(sender, m.Appended(*self._head(), record_id=self.record.id, sent_at=message.sent_at))

    def _follow(self, message: m.Append, leader: NodeId, now: float) -> None:
        self._become_follower(message.term, "a newer leader", now)
        self._set_leader(leader)
        self._heard_leader, self._said, self._attempts = now, message.sent_at, 0
        if message.record is not None and self._newer(message.record.id, self.record.id):
            self._save(record=message.record)
        elif message.record_hash == self.record.hash and self._newer(message.record_id, self.record.id):
            self._save(record=restamp(self.record, message.record_id))
        if message.committed == self.record.id:
            self._commit()
        self._arm(now)

    def _commit(self) -> None:
        """The record held is committed: durable, then told."""
        if self._newer(self.record.id, self.committed.id):
            self._save(committed=self.record)
            self._learnt()

    def _adopt(self, record: Record, now: float) -> None:
        """Take a record that is known to be committed (R9)."""
        if not self._newer(record.id, self.committed.id):
            return
        if record.id.term > self.term:
            self._become_follower(record.id.term, "a newer leader", now)
        held = record if self._newer(record.id, self.record.id) else self.record
        changed = held is not self.record
        self._save(record=held, committed=record)
        if changed and self._role != "follower":
            self._become_follower(self.term, "the record changed", now)
        self._arm_if_idle(now)
        self._learnt()

    def _learnt(self) -> None:
        self._revoked = frozenset(self.committed.content.tombstones)
        self._emit(Committed(self.committed))
        self._check_released()

    # ------------------------------------------------------------------ the record, at the leader

    def _install(self, record: Record, now: float) -> None:
        if record.voters != self.record.voters:
            self._last_step = now
            for voter in record.voters:
                if voter not in self.record.voters:
                    self._progress.welcome(voter, now)
        self._save(record=record)
        self._replicate(now, whole=True)
        self._try_commit(now)

    def _on_appended(self, message: m.Appended, sender: NodeId, now: float) -> None:
        if sender not in self.record.voters:
            return  # of an ex-voter: what its term is no longer matters
        self._see_term(message.term, now)
        if self._role != "leader" or message.term < self.term:
            return
        self._progress.answered(sender, message.record_id, message.sent_at, now)
        if message.record_id == self.record.id:
            self._try_commit(now)
        elif self._progress.send_whole(sender, self.record.id, now, self._config.heartbeat_s):
            self._request(sender, self._append(now, whole=True), now)

    def _try_commit(self, now: float) -> None:
        """R5: a majority of its voters, counting this node, acknowledged exactly this record in this term."""
        holders = [*self._progress.holders(self.record.id), self.me]
        if self.committed.id != self.record.id and is_quorum(self.record.voters, holders):
            self._commit()
            self._replicate(now, whole=False)
            self._tell_learners(now)

    def _replicate(self, now: float, whole: bool) -> None:
        for voter in self.record.voters:
            if voter != self.me:
                send_whole = whole and self._progress.send_whole(voter, self.record.id, now, 0.0)
                self._request(voter, self._append(now, whole=send_whole), now)
        self._deadline = min(now + self._config.heartbeat_s, self._quorum_ends())

    def _tick_leader(self, now: float) -> None:
        if not self._has_quorum(now):  # R7
            return self._become_follower(self.term, "no majority answers", now)
        if now >= self._transfer_until:
            self._transfer_until = NEVER
        self._replicate(now, whole=False)
        self._tell_learners(now)
        self._remind_learners()
        if self._config.auto_voters:
            self._manage_voters(now)

    def _manage_voters(self, now: float) -> None:
        """Take the policy's next step, if one is due and its newcomer holds the committed record."""
        if not self.ready:
            return
        also_leaving = [self.me] if self._leaving else []
        voters = self._roster.wish(self.record, now, self._last_step, also_leaving)
        if voters is not None:
            self._step_voters(voters, now)
        elif self._leaving:
            self._hand_over(now, None)

    def _step_voters(self, voters: tuple[NodeId, ...], now: float) -> None:
        new = [v for v in voters if v not in self.record.voters]
        behind = [v for v in new if not self._spread.caught_up(v, self.committed.id, now)]
        for voter in behind:
            self._send(voter, self._notice())
        if not behind:
            self._install(self._next_record(voters, self.record.content), now)

    def _hand_over(self, now: float, to: NodeId | None) -> bool:
        """Tell the heir to campaign: one that holds the record and answered lately."""
        recent = self._progress.heard_since(now - self._config.election_min_s, self.record.voters)
        holders = self._progress.holders(self.record.id)
        fit = [v for v in recent if v in holders and to in (None, v) and not self._roster.is_leaving(v, now)]
        if not fit:
            return False
        self._request(fit[0], m.TimeoutNow(*self._head()), now)
        self._transfer_until = now + self._config.election_min_s
        return True

    # ------------------------------------------------------------------ learners

    def _tell_learners(self, now: float) -> None:
        for node in self._spread.due(self._learners(), self.committed.id, now):
            self._send(node, self._announce())

    def _remind_learners(self) -> None:
        for node in self._spread.reminded(self._learners(), self.committed.id):
            self._send(node, self._notice())

    def _on_announce(self, message: m.Announce, sender: NodeId, now: float) -> None:
        self._hear_of_leader(message.leader, message.term, now)
        news = self._newer(message.record.id, self.committed.id)
        self._adopt(message.record, now)
        answer = m.Announced(*self._head(), record_id=self.committed.id)
        self._send(sender, answer)
        if news and self._leader not in (None, self.me, sender):
            self._send(self._leader, answer)  # so that it need not tell this node as well
        if news:
            self._pass_on(sender)

    def _on_notice(self, message: m.Notice, sender: NodeId, now: float) -> None:
        self._hear_of_leader(message.leader, message.term, now)
        if self._newer(message.record_id, self.committed.id):
            self._send(sender, self._fetch())
        elif self._newer(self.committed.id, message.record_id):
            self._send(sender, self._notice())
        else:
            self._send(sender, m.Announced(*self._head(), record_id=self.committed.id))

    def _on_announced(self, message: m.Announced, sender: NodeId, now: float) -> None:
        if self._role == "leader":
            self._spread.acknowledged(sender, message.record_id, now)

    def _on_fetch(self, message: m.Fetch, sender: NodeId, now: float) -> None:
        if self._newer(self.committed.id, message.record_id):
            self._send(sender, self._announce())

    def _on_leaving(self, message: m.Leaving, sender: NodeId, now: float) -> None:
        if self._role != "leader":
            return
        self._roster.leaving(sender, now)
        if sender not in self.committed.voters:
            self._send(sender, self._announce())

    def _pass_on(self, sender: NodeId) -> None:
        """Learners tell a few others that there is news; voters have the leader for it."""
        others = self._roster.alive(besides=(sender, self._leader or sender))
        for node in self._rng.sample(others, min(self._config.gossip, len(others))):
            self._send(node, self._notice())

    def _hear_of_leader(self, leader: NodeId | None, term: int, now: float) -> None:
        """A learner believes what it is told, for a while; a voter only notes the term and waits for the leader."""
        if leader is None or leader == self.me or term < self.term:
            return
        self._see_term(term, now)
        if not self.is_voter:
            self._set_leader(leader)
            self._arm(now)

    # ------------------------------------------------------------------ leaving

    def _ask_to_leave(self, now: float) -> None:
        self._leave_at = now + self._config.heartbeat_s
        if self._leader is not None and self._leader != self.me:
            self._send(self._leader, m.Leaving(*self._head()))

    def _check_released(self) -> None:
        """Released: no voter by the committed record, or nobody is left that could be one."""
        gone = self._role != "leader" and self.me not in self.committed.voters
        alone = self.record.voters == (self.me,) and not self._roster.alive()
        if self._leaving and (gone or alone):
            self._leave_at = None
            self._emit(Released())

    # ------------------------------------------------------------------ other epochs, other meshes, detours

    def _dispatch(self, message: m.Message, sender: NodeId, now: float) -> None:
        if message.epoch == self.epoch:
            getattr(self, _HANDLERS[type(message)])(message, sender, now)
        elif message.epoch < self.epoch:
            self._send(sender, self._announce())
        elif isinstance(message, m.Announce):
            self._enter_epoch(message, sender, now)
        else:
            self._send(sender, self._fetch())

    def _enter_epoch(self, message: m.Announce, sender: NodeId, now: float) -> None:
        """A takeover happened elsewhere: its committed record replaces everything here."""
        self._become_follower(self.term, "a newer epoch", now)
        self._set_leader(None)
        record = message.record
        term = max(record.id.term, message.term if message.leader else 0)
        self._save(epoch=record.epoch, term=term, voted_for=None, record=record, committed=record)
        self._heard_leader = NEVER
        self._arm(now)
        self._hear_of_leader(message.leader, message.term, now)
        self._learnt()
        self._send(sender, m.Announced(*self._head(), record_id=record.id))
        self._pass_on(sender)

    def _on_relayed(self, message: m.Relayed, sender: NodeId, now: float) -> None:
        """Carry it one hop, or open it: it speaks for its origin, whose signature it bears."""
        if message.to != self.me:
            if sender == message.origin:
                self._send(message.to, message)
            return
        inner = opened(message, self._verify)
        why = inner if isinstance(inner, str) else objection(inner, message.origin, self.durable, self._revoked)
        if isinstance(inner, str) or why:
            self._emit(Rejected(sender, why))
            return
        if isinstance(inner, m.Append) and self._is_last_words(inner, message.origin):
            return
        self._post.heard(message.origin, sender)
        self._dispatch(inner, message.origin, now)

    def _is_last_words(self, message: m.Append, leader: NodeId) -> bool:
        """Said before the loss of the leader was seen here, and carried since: it would be waited for once more.

        What was heard last took its time to come, so that its sender's clock was past the estimate at the loss: words
        of a leader that lives are never taken for its last.
        """
        lost, term, at = self._lost
        return leader == lost and message.term <= term and message.sent_at <= at

    # ------------------------------------------------------------------ helpers

    def _see_term(self, term: int, now: float) -> None:
        if term > self.term:
            self._become_follower(term, "a newer term", now)

    def _set_leader(self, leader: NodeId | None) -> None:
        if leader == self._leader:
            return
        lost, self._leader = self._leader, leader
        if leader is not None:
            self._emit(LeaderIs(leader, self.term))
        elif lost is not None and lost != self.me:
            self._emit(LeaderLost(lost))

    def _arm_if_idle(self, now: float) -> None:
        """After a change of the record: a voter has a deadline, and a learner not a voter's."""
        if self._role == "follower" and (self._deadline is None or not self.is_voter):
            self._arm(now)

    def _request(self, to: NodeId, message: m.Relayable, now: float) -> None:
        self._post.request(to, message, self._carriers, now)


_HANDLERS: dict[type, str] = {
    m.AskPreVote: "_on_ask_prevote",
    m.PreVoted: "_on_prevoted",
    m.AskVote: "_on_ask_vote",
    m.Voted: "_on_voted",
    m.Append: "_on_append",
    m.Appended: "_on_appended",
    m.Announce: "_on_announce",
    m.Notice: "_on_notice",
    m.Announced: "_on_announced",
    m.Fetch: "_on_fetch",
    m.TimeoutNow: "_on_timeout_now",
    m.Leaving: "_on_leaving",
}
