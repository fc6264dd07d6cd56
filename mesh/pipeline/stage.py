"""A hop's end of every session that runs through this node: which are open, whom they follow, what they may keep.

What a session computes and sends once it is open is in mesh/pipeline/hop.py; all that opens, parks and ends it is here.

A parked session holds no keys and values here, only its checkpoints and journal.  Where there is no room for a higher
class, sessions of lower ones are parked (mesh/pipeline/preemption.py); their owners open them again later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from mesh.core import Effect, Emit, Rejected, Send
from mesh.pipeline import messages as m
from mesh.pipeline.arrivals import Arrival, Arrivals, ArrivalsConfig
from mesh.pipeline.early import EarlyFrames
from mesh.pipeline.hop import SessionHop, mine_of, span_of
from mesh.pipeline.journal import Journal, JournalConfig, Journals
from mesh.pipeline.keeping import Keeper
from mesh.pipeline.preemption import victims
from mesh.pipeline.prefix import PAGE, Pages
from mesh.pipeline.work import Computed, Export, FetchPlacement, Free, Reserve, Unspill
from mesh.types import LayerSpan, NodeId, SamplingParams


class StageConfig(msgspec.Struct, frozen=True):
    """Budgets and times of a stage."""

    lease_s: float = 60.0
    """A session that its owner has not renewed for this long is freed, where no journal of it is held."""
    checkpoint_bytes: int = 1 << 30
    """Host memory for checkpointed activations; beyond it shared pages are given up, then rows go to the disk ..."""
    checkpoint_disk: int = 0
    """... where they may take so many bytes; beyond that the oldest session's are dropped."""
    held_frames: int = 4096
    held_bytes: int = 64 << 20
    """Frames that arrived before the Open of their epoch wait in these bounds ..."""
    held_s: float = 10.0
    """... and this long."""
    sweep_s: float = 5.0
    page: int = PAGE
    """Positions of a page that sessions share; their owners' ``SessionConfig.page``."""
    journal: JournalConfig = JournalConfig()
    arrivals: ArrivalsConfig = ArrivalsConfig()


class StageCore:
    """The hop's end of the generation protocol, for all sessions of one node (a ``mesh.core.Core``)."""

    def __init__(self, me: NodeId, config: StageConfig | None = None) -> None:
        self.me = me
        self.config = config or StageConfig()
        self.placement_id: m.PlacementId = (0, 0)
        self.keeper = Keeper(self.config.checkpoint_bytes, self.config.checkpoint_disk)
        self.pages = Pages(self.config.page)
        self.preemptions = 0
        """Sessions that were parked for others of a higher class."""
        self._spans: tuple[LayerSpan, ...] = ()
        self._sessions: dict[m.SessionId, SessionHop] = {}
        self._keys: dict[str, m.SessionId] = {}
        self._reserving: dict[str, m.Open] = {}
        self._taken: dict[str, tuple[Arrival, int]] = {}
        """Reserving key -> what was shipped here of the session, and how much of it holds."""
        self._early = EarlyFrames(self.config.held_frames, self.config.held_bytes)
        self.journals = Journals(me, self.config.journal, self._free)
        self.arrivals = Arrivals(me, self.config.arrivals)
        self._serial = 0
        self._next_sweep: float | None = None
        self._handlers: dict[type, Callable[..., list[Effect]]] = {
            m.Forward: SessionHop.on_forward,
            m.Gap: SessionHop.on_gap,
            m.Feed: SessionHop.on_feed,
            m.Ack: SessionHop.on_ack,
            m.Progress: SessionHop.on_progress,
            m.Park: self._on_park,
            m.Fetch: SessionHop.on_fetch,
        }

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        timers = (self._next_sweep, self.journals.next_due, self.arrivals.next_due)
        return min((t for t in timers if t is not None), default=None)

    def sessions(self) -> list[tuple[m.SessionId, m.Open, int]]:
        """(session, its Open, positions computed) of every session, for status."""
        return [(session, hop.open, hop.done) for session, hop in self._sessions.items()]

    @property
    def checkpoint_bytes(self) -> int:
        """Checkpointed rows of sessions, in memory ..."""
        return self.keeper.ledger.memory

    @property
    def held_bytes(self) -> int:
        """... and with those of shared pages."""
        return self.checkpoint_bytes + self.pages.row_bytes

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def activate(self, placement_id: m.PlacementId) -> None:
        """Sessions under a lower placement id are refused from now on; running ones go on."""
        self.placement_id = max(self.placement_id, placement_id)

    def set_spans(self, spans: Sequence[LayerSpan]) -> list[Effect]:
        """What may be opened here from now on; running sessions keep what they have."""
        self._spans = tuple(spans)
        return self.pages.keep_only(self._holds)

    def _holds(self, span: LayerSpan) -> bool:
        return any(held.model == span.model and held.covers(span.start, span.end) for held in self._spans)

    def in_use(self, span: LayerSpan) -> bool:
        """Some session still runs over layers of ``span``."""
        return any(_overlaps(hop.open, span) for hop in self._sessions.values() if not hop.parked)

    def vacate(self, span: LayerSpan | None = None) -> list[Effect]:
        """Ask the owners of the sessions over layers of ``span`` (``None``: of all) to move them to other nodes."""
        going = [(name, hop) for name, hop in self._sessions.items() if span is None or _overlaps(hop.open, span)]
        return [Send(hop.owner, m.Vacate(session, hop.epoch, hop.index)) for session, hop in going]

    def receive(self, message: m.ToStage, sender: NodeId, now: float) -> list[Effect]:
        return [*self._receive(message, sender, now), *self._fit()]

    def _receive(self, message: m.ToStage, sender: NodeId, now: float) -> list[Effect]:
        self._next_sweep = self._next_sweep or now + self.config.sweep_s
        if isinstance(message, m.Lease):
            return self._on_lease(message, sender, now)
        if isinstance(message, m.Open):
            return self._on_open(message, sender, now)
        if isinstance(message, m.Prepare):
            return self._on_prepare(message, sender, now)
        if isinstance(message, m.Pages):
            return self.arrivals.receive(message, sender, now)
        if isinstance(message, m.Release):
            return self._on_release(message, sender)
        if isinstance(message, m.Disown):
            return self.journals.disowned(message, sender, now)
        known = self._known(message.session)
        if known is None or message.epoch > known:
            self._early.hold(message, sender, now)
            return []
        if message.epoch < known:
            return self._outdated(message, sender, known)
        hop = self._sessions.get(message.session)
        if hop is None:
            return self._as_witness(message, sender, now)
        if hop.parked:
            return self._while_parked(hop, message, sender)
        return self._handlers[type(message)](hop, message, sender)

    def tick(self, now: float) -> list[Effect]:
        """Free what nobody renewed, adopt what lost its owner, and forget frames whose Open never came."""
        effects = [*self.journals.tick(now), *self.arrivals.tick(now)]
        if self._next_sweep is None or now < self._next_sweep:
            return [*effects, *self._fit()]
        for session, hop in list(self._sessions.items()):
            if hop.journal is None and now - hop.lease_from > self.config.lease_s:
                effects += self._free(session)
        self._early.forget(now - self.config.held_s)
        self._next_sweep = now + self.config.sweep_s if self._sessions or self._early else None
        return [*effects, *self._fit()]

    def lost(self, node: NodeId, cause: str, now: float) -> list[Effect]:
        """A connection to ``node`` was reset and could not be made again, or gossip holds it dead."""
        return [*self.journals.lost(node, cause, now), *self._fit()]

    def reserved(self, key: str, now: float, page_bytes: int = 0, room: int = 0) -> list[Effect]:
        """The driver's answer to ``Reserve``: there is room, of which ``room`` bytes are taken.  ``page_bytes``: of a
        page of it; 0: none can be kept."""
        message, taken = self._reserving.pop(key, None), self._taken.pop(key, None)
        if message is None:  # it is on its way here, or was released meanwhile
            arriving = self.arrivals.reserved(key, now)
            return arriving if arriving is not None else [Emit(Free(key))]
        hop = self._sessions.get(message.session)
        if hop is None:
            journal = self._journal_of(message, now)
            hop = self._sessions[message.session] = SessionHop(message, journal, now, self.pages, self.keeper.ledger)
        else:  # it was parked: its checkpoints are good as far as its tokens are
            hop.follow(message, self._journal_of(message, now), now)
            hop.trim(message.accepted)
        hop.take_room(key, room, self.pages, page_bytes)
        self._keys[key] = message.session
        return [*self._begin(hop, taken), *self._opened(message.session, hop, now), *self._fit()]

    def evict(self, bytes_: int) -> list[Effect]:
        """The engine needs so many bytes of what shared pages take."""
        return self.pages.evict(bytes_)

    def refused(
        self, key: str, code: Literal["busy", "not_held"], why: str, retry_after_s: float, lacking: int = 0
    ) -> list[Effect]:
        """The driver's other answer to ``Reserve``: there is none.  ``lacking``: bytes that would have to be freed; 0:
        that is not known, or would be of no use."""
        message, _ = self._reserving.get(key), self._taken.pop(key, None)
        if message is None:
            return self.arrivals.refused(key, code, why, retry_after_s) or []
        if code == "busy" and lacking > 0:
            found = victims(self._sessions, message.priority, lacking)
            if found:
                parked = [effect for session in found for effect in self._preempt(session)]
                return [*parked, self._ask_room(key, message)]
        del self._reserving[key]
        answer = m.Refused(message.session, message.epoch, message.hop, code, why, retry_after_s)
        return [Send(message.epoch[1], answer)]

    def computed(self, results: Iterable[Computed], now: float) -> list[Effect]:
        """Take the engine's results, in its order."""
        effects: list[Effect] = []
        for result in results:
            session = self._keys.get(result.key)
            hop = self._sessions.get(session) if session is not None else None
            if hop is None or session is None:
                continue
            if result.rewound:
                effects += hop.rewind()
            elif result.tag == hop.tag and result.error:
                effects += self._failed(session, hop, result)
            elif result.tag == hop.tag:
                effects += hop.on_computed(result)
        return [*effects, *self._fit()]

    def _failed(self, session: m.SessionId, hop: SessionHop, result: Computed) -> list[Effect]:
        code: Literal["dead_end", "failed"] = "dead_end" if result.final else "failed"
        failed = m.Refused(session, hop.epoch, hop.index, code, result.error)
        return [Send(hop.owner, failed), *self._free(session)]

    def exported(self, ask: Export, n: int, payload: memoryview) -> list[Effect]:
        """The driver's answer to ``Export``: ``n`` positions from ``ask.start`` on; 0: they cannot be read."""
        session = self._keys.get(ask.key)
        hop = self._sessions.get(session) if session is not None else None
        return hop.exported(ask, n, payload) if hop is not None else []

    def spoiled(self, key: str) -> list[Effect]:
        """The driver's answer to an ``Import`` that cannot be done."""
        return self.arrivals.spoiled(key)

    # -- opening, resuming, freeing ------------------------------------------------------------------------------------

    def _on_open(self, message: m.Open, sender: NodeId, now: float) -> list[Effect]:
        fault = self._fault_of(message, sender)
        if fault:
            return [Emit(Rejected(sender, fault))]
        hop, known = self._sessions.get(message.session), self._known(message.session)
        if any(o.session == message.session and o.epoch >= message.epoch for o in self._reserving.values()):
            return []  # sent again, while the engine is still being asked
        if hop is not None and message.epoch == hop.epoch:
            return [self._paused(message.session, hop)] if hop.parked else self._opened(message.session, hop, now)
        journal = self.journals.get(message.session)
        if known is not None and (message.epoch < known or (journal is not None and journal.has_more(message))):
            return self._ahead(message.session, message.epoch, known)
        if message.hop == len(message.route.hops):
            freed = [*self.arrivals.drop(message.session), *(self._free(message.session) if hop is not None else [])]
            return [*freed, *self.journals.witness(message, now), *self._replay_early(message.session, now)]
        refusal = self._refusal(message)
        if refusal is not None:
            return self._refuse(refusal, message, sender)
        if hop is not None and self._same_place(hop, message):
            if hop.parked:
                return self._reserve(message)
            return [*self._resume(hop, message, now), *self._opened(message.session, hop, now)]
        freed = self._free(message.session) if hop is not None else []
        return [*freed, *self._reserve(message)]

    def _on_prepare(self, message: m.Prepare, sender: NodeId, now: float) -> list[Effect]:
        hops = message.route.hops
        if sender != message.epoch[1] or not 0 <= message.hop < len(hops) or hops[message.hop].node != self.me:
            return [Emit(Rejected(sender, "prepares a hop that is not this node, or for another owner"))]
        known = self._known(message.session)
        if message.session in self._sessions or (known is not None and message.epoch < known):
            return []
        refusal = self._refusal(message)
        return self.arrivals.prepare(message, now) if refusal is None else self._refuse(refusal, message, sender)

    @staticmethod
    def _refuse(refusal: m.Refused, message: m.Open | m.Prepare, sender: NodeId) -> list[Effect]:
        fetch = [Emit(FetchPlacement(sender, message.placement_id))] if refusal.code == "unknown_placement" else []
        return [*fetch, Send(sender, refusal)]

    def _known(self, session: m.SessionId) -> m.Epoch | None:
        """The newest epoch of ``session`` that is followed here, as hop or as witness."""
        hop, journal = self._sessions.get(session), self.journals.get(session)
        epochs = [held.epoch for held in (hop, journal) if held is not None]
        return max(epochs, default=None)

    def _ahead(self, session: m.SessionId, epoch: m.Epoch, known: m.Epoch) -> list[Effect]:
        """Tell the owner in ``epoch`` that more is known here."""
        journal = self.journals.get(session)
        return [Send(epoch[1], m.Ahead(session, epoch, known, journal.drawn if journal is not None else ()))]

    def _outdated(self, message: m.PipelineMessage, sender: NodeId, known: m.Epoch) -> list[Effect]:
        """Of an older epoch: void.  An owner that does not know yet that another took over is told."""
        if isinstance(message, m.Ack | m.Progress) and sender == message.epoch[1] != known[1]:
            return self._ahead(message.session, message.epoch, known)
        return []

    def _as_witness(self, message: m.PipelineMessage, sender: NodeId, now: float) -> list[Effect]:
        journal = self.journals.get(message.session)
        assert journal is not None
        if sender != journal.owner:
            return [Emit(Rejected(sender, "speaks for the owner of a session that it does not own"))]
        journal.renew(now)
        if isinstance(message, m.Feed):
            return self.journals.on_feed(journal, message)
        return self.journals.standing(journal) if isinstance(message, m.Progress) else []

    def _journal_of(self, message: m.Open, now: float) -> Journal | None:
        """The journal to hold from now on, at an end of the route."""
        if message.request is not None:
            return self.journals.follow(message, now)
        self.journals.drop(message.session)
        return None

    def _fault_of(self, message: m.Open, sender: NodeId) -> str:
        hops = message.route.hops
        if sender != message.epoch[1]:
            return "opens a session for another owner"
        if not 0 <= message.hop <= len(hops) or (message.hop < len(hops) and hops[message.hop].node != self.me):
            return "opens a hop that is not this node"
        if message.hop in (0, len(hops) - 1, len(hops)) and message.request is None:
            return "opens an end of a route without the request"
        if message.request is not None and message.accepted != len(message.request.prompt) + len(message.drawn):
            return "opens with a wrong count of accepted tokens"
        if len(message.chain) * self.pages.size > message.accepted:
            return "opens with names of pages past the accepted tokens"
        return ""

    def _refusal(self, message: m.Open | m.Prepare) -> m.Refused | None:
        mine = mine_of(message)
        code: Literal["stale_placement", "unknown_placement", "not_held"]
        if message.placement_id < self.placement_id:
            code, why = "stale_placement", f"active here is placement {self.placement_id}"
        elif message.placement_id > self.placement_id:
            code, why = "unknown_placement", f"active here is placement {self.placement_id}"
        elif not self._holds(span_of(message)):
            code, why = "not_held", f"layers [{mine.start}, {mine.end}) of {message.route.model} are not loaded here"
        else:
            return None
        return m.Refused(message.session, message.epoch, message.hop, code, why, retry_after_s=0.2)

    @staticmethod
    def _same_place(hop: SessionHop, message: m.Open) -> bool:
        """Keys and values stay of use when the hop computes the same layers, at the same end of the route."""
        mine, was = mine_of(message), mine_of(hop.open)
        ends = (message.hop == 0, message.hop == len(message.route.hops) - 1)
        return (mine.start, mine.end) == (was.start, was.end) and ends == (hop.first, hop.last)

    def _reserve(self, message: m.Open) -> list[Effect]:
        self._stop_reserving(message.session, message.epoch)
        self._serial += 1
        key = f"{message.session}#{self._serial}"
        self._reserving[key] = message
        arrival = self.arrivals.take(message)
        if arrival is None:
            return [*self.arrivals.drop(message.session), self._ask_room(key, message)]
        kept = arrival.usable(message)
        self._taken[key] = (arrival, kept)
        return [self._ask_room(key, message, arrival.key, kept)]

    @staticmethod
    def _ask_room(key: str, message: m.Open, base: str = "", kept: int = 0) -> Emit:
        mine, last = mine_of(message), message.hop == len(message.route.hops) - 1
        sampling: SamplingParams | None = None
        tokens: tuple[int, ...] = ()
        if last:
            assert message.request is not None
            sampling, tokens = message.request.sampling, (*message.request.prompt, *message.drawn)
        hops = len(message.route.hops)
        room = (message.max_positions, message.priority, hops)
        rebuilds = message.accepted if message.begun else 0
        return Emit(
            Reserve(key, message.route.model, mine.start, mine.end, *room, sampling, tokens, base, kept, rebuilds)
        )

    def _begin(self, hop: SessionHop, taken: tuple[Arrival, int] | None) -> list[Effect]:
        """Behind what was shipped here, else behind the pages that are held here; the sampler before the last token, or
        before all that it is to score."""
        if taken is not None:
            hop.start_from(*taken)
            return []
        most = hop.open.accepted
        if hop.last:
            assert hop.journal is not None
            most = 0 if hop.journal.request.prompt_logprobs else most - 1
        effects = hop.prefix.take(most)
        hop.submitted = hop.done = hop.prefix.length
        return effects

    def _stop_reserving(self, session: m.SessionId, epoch: m.Epoch) -> None:
        """What is asked for under ``epoch`` or an older one is freed as soon as it is reserved."""
        for key, opening in list(self._reserving.items()):
            if opening.session == session and opening.epoch <= epoch:
                del self._reserving[key]
                self._taken.pop(key, None)

    def _resume(self, hop: SessionHop, message: m.Open, now: float) -> list[Effect]:
        """Keep what follows from the accepted tokens.  The sampler's last position is computed again, to draw."""
        hop.follow(message, self._journal_of(message, now), now)
        keep = message.accepted - 1 if hop.last else message.accepted
        hop.trim(keep)
        # Always void what is under way: its results may rest on tokens that were never accepted.
        return hop.cut(min(keep, hop.done))

    def _opened(self, session: m.SessionId, hop: SessionHop, now: float) -> list[Effect]:
        hop.lease_from = now
        opened = m.Opened(session, hop.epoch, hop.index, hop.submitted, hop.prefix.length)
        effects: list[Effect] = [Send(hop.owner, opened)]
        effects += hop.want()
        return [*effects, *self._replay_early(session, now)]

    def _replay_early(self, session: m.SessionId, now: float) -> list[Effect]:
        """What came before its Open is taken up now."""
        effects: list[Effect] = []
        for _, sender, message in self._early.take(session):
            effects += self.receive(message, sender, now)  # type: ignore[arg-type]
        return effects

    def _on_release(self, message: m.Release, sender: NodeId) -> list[Effect]:
        if sender != message.epoch[1]:
            return [Emit(Rejected(sender, "releases another owner's session"))]
        self._stop_reserving(message.session, message.epoch)
        known, freed = self._known(message.session), self.arrivals.drop(message.session)
        if known is None or message.epoch < known:
            self._early.take(message.session)
            return freed
        effects = freed
        hop = self._sessions.get(message.session)
        if hop is not None and hop.epoch == message.epoch:
            hop.prefix.chain = message.chain
            effects += hop.prefix.keep(hop.done)
        return [*effects, *self._free(message.session)]

    def _on_lease(self, message: m.Lease, sender: NodeId, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for session, epoch in message.sessions:
            known = self._known(session)
            if known is None:
                unknown = m.Refused(session, epoch, -1, "unknown_session", "the session is not held here (any more)")
                effects.append(Send(sender, unknown))
            elif known[1] == sender:
                self._renew(session, now)
            elif epoch < known:
                effects += self._ahead(session, epoch, known)
        return effects

    def _renew(self, session: m.SessionId, now: float) -> None:
        hop, journal = self._sessions.get(session), self.journals.get(session)
        if hop is not None:
            hop.lease_from = now
        if journal is not None:
            journal.renew(now)

    def _free(self, session: m.SessionId) -> list[Effect]:
        self.journals.drop(session)
        self._early.take(session)
        hop = self._sessions.pop(session, None)
        if hop is None:
            return []
        hop.checkpoints.drop()
        return self._give_up_room(hop)

    # -- parking -------------------------------------------------------------------------------------------------------

    def _give_up_room(self, hop: SessionHop) -> list[Effect]:
        if hop.parked:
            return []
        key = hop.key
        del self._keys[key]
        hop.give_up_room()
        return [Emit(Free(key))]

    def _preempt(self, session: m.SessionId) -> list[Effect]:
        """Its room is needed for a higher class."""
        hop = self._sessions[session]
        self.preemptions += 1
        return [*self._give_up_room(hop), self._paused(session, hop)]

    @staticmethod
    def _paused(session: m.SessionId, hop: SessionHop) -> Send:
        why = "its room was given to sessions of a higher class"
        return Send(hop.owner, m.Refused(session, hop.epoch, hop.index, "paused", why))

    def _on_park(self, hop: SessionHop, message: m.Park, sender: NodeId) -> list[Effect]:
        if sender != hop.owner:
            return [Emit(Rejected(sender, "parks another owner's session"))]
        return self._give_up_room(hop)

    def _while_parked(self, hop: SessionHop, message: m.PipelineMessage, sender: NodeId) -> list[Effect]:
        """Frames are of no use; an owner that asks has not heard, or not of all hops."""
        if isinstance(message, m.Progress) and sender == hop.owner:
            return [self._paused(message.session, hop)]
        return []

    # -- the budgets ---------------------------------------------------------------------------------------------------

    def _fit(self) -> list[Effect]:
        """After every verb the budgets hold: shared pages go first, then sessions' rows (mesh/pipeline/keeping.py)."""
        effects = self.pages.evict(row_bytes=self.held_bytes - self.config.checkpoint_bytes)
        return [*effects, *self.keeper.fit(hop.checkpoints for hop in self._sessions.values())]

    def spilled(self, number: int, kept: bool) -> list[Effect]:
        """The driver's answer to ``Spill``; not ``kept``: the disk is full, or refuses."""
        self.keeper.written(number)
        if not kept:
            self._lose(number)
        return self._fit()

    def unspilled(self, ask: Unspill, payload: memoryview | None) -> list[Effect]:
        """The driver's answer to ``Unspill``; ``None``: it cannot be read."""
        if payload is None:
            self._lose(ask.number)
        hop = self._sessions.get(ask.session)
        effects: list[Effect] = []
        if hop is not None and ask.then is not None:
            effects = hop.go_on_exporting(ask.number, ask.then, payload)
        elif hop is not None and hop.reading == ask.number:
            hop.reading = 0
            effects = hop.go_on_sending(ask.number, payload)
        return [*effects, *self._fit()]

    def _lose(self, number: int) -> None:
        """Whoever has rows under ``number`` has none any more; a recovery starts further upstream."""
        for hop in self._sessions.values():
            if hop.checkpoints.holds(number):
                self.keeper.drop(hop.checkpoints)


def _overlaps(message: m.Open, span: LayerSpan) -> bool:
    mine = mine_of(message)
    return message.route.model == span.model and mine.start < span.end and span.start < mine.end
