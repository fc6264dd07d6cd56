"""A hop's end of every session that runs through this node: what to compute, keep, send and free.

All transitions of a hop's session are in this file.  A session at a hop is one picture::

    tokens or hidden states in ──► [0, submitted) handed to the engine ──► [0, done) computed
                                                                             │ checkpoints [c, done)
                                                                             ▼
                                                     [0, sent) on its way to the hop behind, or tokens drawn

There is no prefill, no decode and no replay here, only positions computed catching up with positions wanted.
The hop behind says from where it wants them (``Gap``); a hop that no longer has what is asked for rolls itself back
and asks the hop before.  So opening, losing a frame and rebuilding a dead neighbour are the same few lines.

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
from mesh.pipeline.checkpoints import Checkpoints, Ledger, Segment
from mesh.pipeline.early import EarlyFrames
from mesh.pipeline.journal import Journal, JournalConfig, Journals
from mesh.pipeline.keeping import Keeper
from mesh.pipeline.preemption import victims
from mesh.pipeline.prefix import PAGE, Pages, Prefix
from mesh.pipeline.work import Compute, Computed, Export, FetchPlacement, Free, Reserve, Truncate, Unspill
from mesh.types import Hop, LayerSpan, NodeId, SamplingParams


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


class _Hop:
    """One session at this hop."""

    def __init__(self, message: m.Open, journal: Journal | None, now: float, pages: Pages, ledger: Ledger) -> None:
        self.key = ""
        """Of its sequence in the engine; empty: it is parked ..."""
        self.room = 0
        """... and the bytes that its keys and values take otherwise."""
        self.tag = 0
        self.submitted = 0
        self.done = 0
        self.sent: int | None = None
        self.acked = 0
        self.asked = -1
        self.reading = 0
        """The piece on the disk that is read to be sent; 0: none."""
        self.checkpoints = Checkpoints(ledger)
        self.prefix = Prefix(pages, _span(message), "", 0, None)
        self.scores: dict[int, tuple[float, tuple[tuple[int, float], ...]]] = {}
        """Position -> (logprob, top) of the tokens drawn here that the owner may not have yet, in order."""
        self.follow(message, journal, now)

    def start_from(self, arrival: Arrival, kept: int) -> None:
        """Positions [0, kept) were shipped here."""
        self.submitted = self.done = kept
        if not self.last:
            self.checkpoints.take_over(arrival.checkpoints)
            self.checkpoints.cut(kept)

    def follow(self, message: m.Open, journal: Journal | None, now: float) -> None:
        """Take over the route of ``message``; nothing crosses the boundary until the hop behind says from where."""
        self.open, self.journal = message, journal
        self.prefix.chain = message.chain
        self.epoch = message.epoch
        self.hops = message.route.hops
        self.index = message.hop
        self.first = message.hop == 0
        self.last = message.hop == len(self.hops) - 1
        self.lease_from = now
        self.sent = None
        self.asked = -1
        self.scores = {}
        self.acked = max(self.acked, message.accepted)

    def take_room(self, key: str, room: int, pages: Pages, page_bytes: int) -> None:
        """There is a sequence for it in the engine, which holds nothing yet."""
        self.key, self.room = key, room
        checkpoints = None if self.last else self.checkpoints
        self.prefix = Prefix(pages, _span(self.open), key, page_bytes, checkpoints)
        self.prefix.chain = self.open.chain

    def give_up_room(self) -> None:
        """Nothing is computed here any more; what was, has to be again."""
        self.key, self.room = "", 0
        self.submitted = self.done = 0
        self.sent = None
        self.tag += 1

    @property
    def parked(self) -> bool:
        return not self.key

    @property
    def owner(self) -> NodeId:
        return self.epoch[1]

    @property
    def before(self) -> NodeId:
        """The node whose output this hop works on: the ring closes from the sampler to hop 0."""
        return self.hops[self.index - 1].node

    @property
    def behind(self) -> NodeId:
        return self.hops[(self.index + 1) % len(self.hops)].node

    @property
    def tokens(self) -> list[int]:
        """Of the journal, at the two ends of the route."""
        assert self.journal is not None
        return self.journal.tokens

    @property
    def confirms(self) -> bool:
        """The owner is the sampler: it shows a token when this hop, the first, has it."""
        return self.first and self.owner == self.hops[-1].node != self.hops[0].node


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
        self._sessions: dict[m.SessionId, _Hop] = {}
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
            m.Forward: self._on_forward,
            m.Gap: self._on_gap,
            m.Feed: self._on_feed,
            m.Ack: self._on_ack,
            m.Progress: self._on_progress,
            m.Park: self._on_park,
            m.Fetch: self._on_fetch,
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
            hop = self._sessions[message.session] = _Hop(message, journal, now, self.pages, self.keeper.ledger)
        else:  # it was parked: its checkpoints are good as far as its tokens are
            hop.follow(message, self._journal_of(message, now), now)
            self._trim(hop, message.accepted)
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
                effects += self._rewind(session, hop)
            elif result.tag == hop.tag:
                effects += self._on_computed(session, hop, result)
        return [*effects, *self._fit()]

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
        mine = _mine(message)
        code: Literal["stale_placement", "unknown_placement", "not_held"]
        if message.placement_id < self.placement_id:
            code, why = "stale_placement", f"active here is placement {self.placement_id}"
        elif message.placement_id > self.placement_id:
            code, why = "unknown_placement", f"active here is placement {self.placement_id}"
        elif not self._holds(_span(message)):
            code, why = "not_held", f"layers [{mine.start}, {mine.end}) of {message.route.model} are not loaded here"
        else:
            return None
        return m.Refused(message.session, message.epoch, message.hop, code, why, retry_after_s=0.2)

    @staticmethod
    def _same_place(hop: _Hop, message: m.Open) -> bool:
        """Keys and values stay of use when the hop computes the same layers, at the same end of the route."""
        mine, was = _mine(message), _mine(hop.open)
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
        mine, last = _mine(message), message.hop == len(message.route.hops) - 1
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

    def _begin(self, hop: _Hop, taken: tuple[Arrival, int] | None) -> list[Effect]:
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

    def _resume(self, hop: _Hop, message: m.Open, now: float) -> list[Effect]:
        """Keep what follows from the accepted tokens.  The sampler's last position is computed again, to draw."""
        hop.follow(message, self._journal_of(message, now), now)
        keep = message.accepted - 1 if hop.last else message.accepted
        self._trim(hop, keep)
        # Always void what is under way: its results may rest on tokens that were never accepted.
        return self._cut(hop, min(keep, hop.done))

    def _opened(self, session: m.SessionId, hop: _Hop, now: float) -> list[Effect]:
        hop.lease_from = now
        opened = m.Opened(session, hop.epoch, hop.index, hop.submitted, hop.prefix.length)
        effects: list[Effect] = [Send(hop.owner, opened)]
        effects += self._want(session, hop)
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

    def _give_up_room(self, hop: _Hop) -> list[Effect]:
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
    def _paused(session: m.SessionId, hop: _Hop) -> Send:
        why = "its room was given to sessions of a higher class"
        return Send(hop.owner, m.Refused(session, hop.epoch, hop.index, "paused", why))

    def _on_park(self, hop: _Hop, message: m.Park, sender: NodeId) -> list[Effect]:
        if sender != hop.owner:
            return [Emit(Rejected(sender, "parks another owner's session"))]
        return self._give_up_room(hop)

    def _while_parked(self, hop: _Hop, message: m.PipelineMessage, sender: NodeId) -> list[Effect]:
        """Frames are of no use; an owner that asks has not heard, or not of all hops."""
        if isinstance(message, m.Progress) and sender == hop.owner:
            return [self._paused(message.session, hop)]
        return []

    # -- the flow of positions -----------------------------------------------------------------------------------------

    def _want(self, session: m.SessionId, hop: _Hop) -> list[Effect]:
        """Hop 0 computes the tokens it has; every other hop says what it lacks."""
        if hop.first:
            return self._pump(hop)
        return [Send(hop.before, m.Gap(session, hop.epoch, hop.submitted))]

    def _ask_once(self, session: m.SessionId, hop: _Hop) -> list[Effect]:
        """Frames behind a lost one come in a row: the first asks for it, the rest are dropped."""
        if hop.asked == hop.submitted:
            return []
        hop.asked = hop.submitted
        return self._want(session, hop)

    def _pump(self, hop: _Hop) -> list[Effect]:
        assert hop.journal is not None
        wanted = len(hop.tokens) - hop.journal.complete  # after the last token nothing is drawn
        limit = min(wanted, max(hop.acked + m.RUN_AHEAD, hop.open.accepted))
        if hop.submitted >= limit:
            return []
        tokens = tuple(hop.tokens[hop.submitted : limit])
        return self._compute(hop, hop.submitted, len(tokens), tokens, None)

    def _compute(
        self, hop: _Hop, start: int, n: int, tokens: tuple[int, ...], hidden: memoryview | None
    ) -> list[Effect]:
        hop.submitted = start + n
        # A row is drawn from only at the frontier: before it the next token is known already (a replay).
        sample = scored = False
        if hop.last:
            assert hop.journal is not None
            sample = hop.submitted == len(hop.tokens) and not hop.journal.complete
            scored = hop.journal.request.prompt_logprobs
        return [Emit(Compute(hop.key, hop.tag, start, n, tokens, hidden, sample, scored))]

    def _on_forward(self, hop: _Hop, message: m.Forward, sender: NodeId) -> list[Effect]:
        end = message.start + message.n
        if hop.first or sender != hop.before:
            return [Emit(Rejected(sender, "forwards to a hop that it is not before"))]
        if message.n < 1 or message.start < 0 or len(message.payload) % message.n:
            return [Emit(Rejected(sender, "forwards rows of unequal size"))]
        if end > hop.open.max_positions or (hop.last and end > len(hop.tokens)):
            return [Emit(Rejected(sender, "forwards positions past the end of the session"))]
        if message.start > hop.submitted:
            return self._ask_once(message.session, hop)
        if end <= hop.submitted:
            return []
        fresh = Segment(message.start, message.n, message.payload).slice(hop.submitted, end)
        return self._compute(hop, fresh.start, fresh.n, (), fresh.payload)

    def _on_computed(self, session: m.SessionId, hop: _Hop, result: Computed) -> list[Effect]:
        if result.error:
            code: Literal["dead_end", "failed"] = "dead_end" if result.final else "failed"
            failed = m.Refused(session, hop.epoch, hop.index, code, result.error)
            return [Send(hop.owner, failed), *self._free(session)]
        assert result.start == hop.done, (result.start, hop.done)
        hop.done = result.start + result.n
        if hop.last:
            return [*hop.prefix.keep(hop.done), *self._on_drawn(session, hop, result)]
        assert result.hidden is not None
        # A copy: a view would keep the whole packed step alive, with the rows of every other session in it.
        own = Segment(result.start, result.n, memoryview(bytes(result.hidden)))
        if own.end > hop.checkpoints.end:  # what is computed again after parking may be kept already
            own = own.slice(max(own.start, hop.checkpoints.end), own.end)
            hop.checkpoints.append(own)
        return [*hop.prefix.keep(hop.done), *self._flush(session, hop)]

    def _rewind(self, session: m.SessionId, hop: _Hop) -> list[Effect]:
        """The engine does not have what it was to keep: all is computed again, and sent from where it was not yet."""
        return [*self._cut(hop, 0), *self._want(session, hop)]

    def _flush(self, session: m.SessionId, hop: _Hop) -> list[Effect]:
        """Send what is known and the hop behind does not have yet."""
        held, first = hop.checkpoints, hop.sent
        if first is None or first >= held.end:
            return []
        if first < held.start:
            # The budgets took them: compute them again from what the hop before kept, at worst from the tokens.
            self._trim(hop, first)
            return [*self._cut(hop, min(first, hop.done)), *self._want(session, hop)]
        if first < held.warm:
            return self._read_back(session, hop, first)
        hop.sent = held.end
        return [self._forward(session, hop, rows) for rows in held.read(first)]

    @staticmethod
    def _forward(session: m.SessionId, hop: _Hop, rows: Segment) -> Send:
        return Send(hop.behind, m.Forward(session, hop.epoch, rows.start, rows.n, rows.payload))

    @staticmethod
    def _read_back(session: m.SessionId, hop: _Hop, first: int) -> list[Effect]:
        """A piece at a time; what is asked for twice is read once."""
        piece = hop.checkpoints.piece_of(first)
        assert piece is not None
        if hop.reading == piece.number:
            return []
        hop.reading = piece.number
        return [Emit(Unspill(piece.number, session))]

    def _on_drawn(self, session: m.SessionId, hop: _Hop, result: Computed) -> list[Effect]:
        effects: list[Effect] = []
        if result.prompt_logprobs:
            rows = result.prompt_logprobs
            effects.append(Send(hop.owner, m.PromptLogprobs(session, hop.epoch, result.start + 1, rows)))
        if result.token is None:
            return effects
        assert hop.journal is not None
        assert hop.done == len(hop.tokens)
        position = len(hop.tokens)
        hop.tokens.append(result.token)
        hop.scores[position] = (result.logprob, result.top)
        hop.scores.pop(position - 2 * m.RUN_AHEAD, None)  # the owner has that one: hop 0 does not run so far ahead
        effects.append(Send(hop.owner, m.Token(session, hop.epoch, position, result.token, result.logprob, result.top)))
        if hop.first:
            return [*effects, *self._pump(hop)]
        return [*effects, Send(hop.behind, m.Feed(session, hop.epoch, position, (result.token,)))]

    def _on_gap(self, hop: _Hop, message: m.Gap, sender: NodeId) -> list[Effect]:
        if sender != hop.behind or message.expected < 0:
            return [Emit(Rejected(sender, "asks a hop that it is not behind"))]
        if hop.last:
            missing = tuple(hop.tokens[message.expected :])
            return [Send(sender, m.Feed(message.session, hop.epoch, message.expected, missing))] if missing else []
        hop.sent = message.expected
        return self._flush(message.session, hop)

    def _on_feed(self, hop: _Hop, message: m.Feed, sender: NodeId) -> list[Effect]:
        if not hop.first or sender != hop.before:
            return [Emit(Rejected(sender, "feeds tokens to a hop that it is not the sampler of"))]
        if message.start < 0 or message.start + len(message.tokens) > hop.open.max_positions:
            return [Emit(Rejected(sender, "feeds tokens past the end of the session"))]
        assert hop.journal is not None
        if not hop.journal.learn(message.start, message.tokens):
            return [Send(sender, m.Gap(message.session, hop.epoch, len(hop.tokens)))]
        return [*([hop.journal.held()] if hop.confirms else []), *self._pump(hop)]

    def _on_ack(self, hop: _Hop, message: m.Ack, sender: NodeId) -> list[Effect]:
        if sender != hop.owner:
            return [Emit(Rejected(sender, "acknowledges another owner's session"))]
        hop.acked = max(hop.acked, message.accepted)
        return self._pump(hop) if hop.first else []

    def _on_progress(self, hop: _Hop, message: m.Progress, sender: NodeId) -> list[Effect]:
        """Say where this hop stands, and ask (and give) again what a lost frame may have carried."""
        if sender != hop.owner:
            return [Emit(Rejected(sender, "asks after another owner's session"))]
        session = message.session
        effects = self._on_ack(hop, m.Ack(session, message.epoch, message.accepted), sender)
        tokens = len(hop.tokens) if hop.journal is not None else 0
        standing = m.Progressing(session, hop.epoch, hop.index, hop.submitted, hop.done, tokens)
        effects.append(Send(hop.owner, standing))
        if hop.confirms and hop.journal is not None:
            effects.append(hop.journal.held())
        if hop.last:
            effects += [
                Send(hop.owner, m.Token(session, hop.epoch, position, hop.tokens[position], *score))
                for position, score in hop.scores.items()
                if position >= message.accepted
            ]
        if hop.first and not hop.last:
            effects.append(Send(hop.before, m.Gap(session, hop.epoch, len(hop.tokens))))
        elif not hop.first and hop.submitted == hop.done:
            effects += self._want(session, hop)
        return effects

    # -- moving to another node ----------------------------------------------------------------------------------------

    def _on_fetch(self, hop: _Hop, message: m.Fetch, sender: NodeId) -> list[Effect]:
        """A successor takes what is here; nothing of this hop changes by it."""
        mine, (start, end) = _mine(hop.open), message.layers
        if not mine.start <= start < end <= mine.end or message.start < 0:
            return [Emit(Rejected(sender, "fetches pages of layers that are not computed here"))]
        return self._export(message.session, hop, sender, message.layers, message.start)

    def _export(self, session: m.SessionId, hop: _Hop, to: NodeId, layers: tuple[int, int], start: int) -> list[Effect]:
        """Where the boundary's rows are on the disk they are read first, and go along."""
        ask = Export(hop.key, hop.tag, to, layers, start, hop.done)
        if ask.start >= ask.end:
            return self.exported(ask, 0, memoryview(b""))
        piece = hop.checkpoints.piece_of(start) if _ships_rows(hop, ask) else None
        if piece is None:
            return [Emit(ask)]
        ask = msgspec.structs.replace(ask, end=min(ask.end, piece.end))
        return [Emit(Unspill(piece.number, session, ask))]

    def exported(self, ask: Export, n: int, payload: memoryview) -> list[Effect]:
        """The driver's answer to ``Export``: ``n`` positions from ``ask.start`` on; 0: they cannot be read."""
        session = self._keys.get(ask.key)
        hop = self._sessions.get(session) if session is not None else None
        if (
            hop is None or session is None or hop.tag != ask.tag
        ):  # cut meanwhile: if it is still wanted, it is asked for
            return []
        rows = ask.rows[: n * (len(ask.rows) // (ask.end - ask.start))] if ask.rows else memoryview(b"")
        if n and not rows and _ships_rows(hop, ask) and ask.start >= hop.checkpoints.start:
            rows = hop.checkpoints.rows(ask.start, ask.start + n)
            if not rows:  # they went to the disk meanwhile
                return self._export(session, hop, ask.to, ask.layers, ask.start)
        return [Send(ask.to, m.Pages(session, hop.epoch, ask.start, n, hop.done, payload, rows))]

    def spoiled(self, key: str) -> list[Effect]:
        """The driver's answer to an ``Import`` that cannot be done."""
        return self.arrivals.spoiled(key)

    # -- rolling back, and the budgets ---------------------------------------------------------------------------------

    @staticmethod
    def _trim(hop: _Hop, length: int) -> None:
        """Keep the checkpoints of positions [0, length)."""
        hop.checkpoints.cut(length)
        hop.prefix.cut(length)

    def _cut(self, hop: _Hop, length: int) -> list[Effect]:
        """Keep the keys and values of positions [0, length) and void everything under way."""
        hop.tag += 1
        hop.submitted = hop.done = length
        return [Emit(Truncate(hop.key, length))]

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
            effects = self._go_on_exporting(hop, ask.number, ask.then, payload)
        elif hop is not None and hop.reading == ask.number:
            hop.reading = 0
            effects = self._go_on_sending(ask.session, hop, ask.number, payload)
        return [*effects, *self._fit()]

    def _go_on_sending(self, session: m.SessionId, hop: _Hop, number: int, payload: memoryview | None) -> list[Effect]:
        """With what was read, where it is what comes next (still), and with whatever follows."""
        piece = hop.checkpoints.piece_of(hop.sent) if hop.sent is not None else None
        if payload is None or piece is None or piece.number != number:
            return self._flush(session, hop)
        assert hop.sent is not None
        rows = piece.rows(payload, hop.sent)
        hop.sent = rows.end
        return [self._forward(session, hop, rows), *self._flush(session, hop)]

    @staticmethod
    def _go_on_exporting(hop: _Hop, number: int, ask: Export, payload: memoryview | None) -> list[Effect]:
        piece = hop.checkpoints.piece_of(ask.start)
        if (hop.key, hop.tag) != (ask.key, ask.tag):
            return []
        if payload is None or piece is None or piece.number != number:
            return [Emit(ask)]
        rows = piece.rows(payload, ask.start).slice(ask.start, ask.end)
        return [Emit(msgspec.structs.replace(ask, rows=rows.payload))]

    def _lose(self, number: int) -> None:
        """Whoever has rows under ``number`` has none any more; a recovery starts further upstream."""
        for hop in self._sessions.values():
            if hop.checkpoints.holds(number):
                self.keeper.drop(hop.checkpoints)


def _ships_rows(hop: _Hop, ask: Export) -> bool:
    """What is fetched ends at the same boundary."""
    return ask.layers[1] == _mine(hop.open).end and not hop.last


def _span(message: m.Open | m.Prepare) -> LayerSpan:
    """The layers that an Open names."""
    mine = _mine(message)
    return LayerSpan(message.route.model, mine.start, mine.end)


def _mine(message: m.Open | m.Prepare) -> Hop:
    """The hop (node, start, end) that an Open names."""
    return message.route.hops[message.hop]


def _overlaps(message: m.Open, span: LayerSpan) -> bool:
    mine = _mine(message)
    return message.route.model == span.model and mine.start < span.end and span.start < mine.end
