"""One session at this hop: what to compute, keep, send and ask for.

::

    tokens or hidden states in ──► [0, submitted) handed to the engine ──► [0, done) computed
                                                                             │ checkpoints [c, done)
                                                                             ▼
                                                     [0, sent) on its way to the hop behind, or tokens drawn

There is no prefill, no decode and no replay here, only positions computed catching up with positions wanted.
The hop behind says from where it wants them (``Gap``); a hop that no longer has what is asked for rolls itself back
and asks the hop before.  So opening, losing a frame and rebuilding a dead neighbour are the same few lines.
"""

from __future__ import annotations

import msgspec

from mesh.core import Effect, Emit, Rejected, Send
from mesh.pipeline import messages as m
from mesh.pipeline.arrivals import Arrival
from mesh.pipeline.checkpoints import Checkpoints, Ledger, Segment
from mesh.pipeline.journal import Journal
from mesh.pipeline.prefix import Pages, Prefix
from mesh.pipeline.work import Compute, Computed, Export, Truncate, Unspill
from mesh.types import Hop, LayerSpan, NodeId


class SessionHop:
    """One session at this hop."""

    def __init__(self, message: m.Open, journal: Journal | None, now: float, pages: Pages, ledger: Ledger) -> None:
        self.session = message.session
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
        self.prefix = Prefix(pages, span_of(message), "", 0, None)
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
        self.prefix = Prefix(pages, span_of(self.open), key, page_bytes, checkpoints)
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

    # -- the flow of positions -----------------------------------------------------------------------------------------

    def want(self) -> list[Effect]:
        """Hop 0 computes the tokens it has; every other hop says what it lacks."""
        if self.first:
            return self._pump()
        return [Send(self.before, m.Gap(self.session, self.epoch, self.submitted))]

    def _ask_once(self) -> list[Effect]:
        """Frames behind a lost one come in a row: the first asks for it, the rest are dropped."""
        if self.asked == self.submitted:
            return []
        self.asked = self.submitted
        return self.want()

    def _pump(self) -> list[Effect]:
        assert self.journal is not None
        wanted = len(self.tokens) - self.journal.complete  # after the last token nothing is drawn
        limit = min(wanted, max(self.acked + m.RUN_AHEAD, self.open.accepted))
        if self.submitted >= limit:
            return []
        tokens = tuple(self.tokens[self.submitted : limit])
        return self._compute(self.submitted, len(tokens), tokens, None)

    def _compute(self, start: int, n: int, tokens: tuple[int, ...], hidden: memoryview | None) -> list[Effect]:
        self.submitted = start + n
        # A row is drawn from only at the frontier: before it the next token is known already (a replay).
        sample = scored = False
        if self.last:
            assert self.journal is not None
            sample = self.submitted == len(self.tokens) and not self.journal.complete
            scored = self.journal.request.prompt_logprobs
        return [Emit(Compute(self.key, self.tag, start, n, tokens, hidden, sample, scored))]

    def on_forward(self, message: m.Forward, sender: NodeId) -> list[Effect]:
        end = message.start + message.n
        if self.first or sender != self.before:
            return [Emit(Rejected(sender, "forwards to a hop that it is not before"))]
        if message.n < 1 or message.start < 0 or len(message.payload) % message.n:
            return [Emit(Rejected(sender, "forwards rows of unequal size"))]
        if end > self.open.max_positions or (self.last and end > len(self.tokens)):
            return [Emit(Rejected(sender, "forwards positions past the end of the session"))]
        if message.start > self.submitted:
            return self._ask_once()
        if end <= self.submitted:
            return []
        fresh = Segment(message.start, message.n, message.payload).slice(self.submitted, end)
        return self._compute(fresh.start, fresh.n, (), fresh.payload)

    def on_computed(self, result: Computed) -> list[Effect]:
        assert result.start == self.done, (result.start, self.done)
        self.done = result.start + result.n
        if self.last:
            return [*self.prefix.keep(self.done), *self._on_drawn(result)]
        assert result.hidden is not None
        # A copy: a view would keep the whole packed step alive, with the rows of every other session in it.
        own = Segment(result.start, result.n, memoryview(bytes(result.hidden)))
        if own.end > self.checkpoints.end:  # what is computed again after parking may be kept already
            own = own.slice(max(own.start, self.checkpoints.end), own.end)
            self.checkpoints.append(own)
        return [*self.prefix.keep(self.done), *self._flush()]

    def rewind(self) -> list[Effect]:
        """The engine does not have what it was to keep: all is computed again, and sent from where it was not yet."""
        return [*self.prefix.refused(self.done), *self.cut(0), *self.want()]

    def _flush(self) -> list[Effect]:
        """Send what is known and the hop behind does not have yet."""
        held, first = self.checkpoints, self.sent
        if first is None or first >= held.end:
            return []
        if first < held.start:
            # The budgets took them: compute them again from what the hop before kept, at worst from the tokens.
            self.trim(first)
            return [*self.cut(min(first, self.done)), *self.want()]
        if first < held.warm:
            return self._read_back(first)
        self.sent = held.end
        return [self._forward(rows) for rows in held.read(first)]

    def _forward(self, rows: Segment) -> Send:
        return Send(self.behind, m.Forward(self.session, self.epoch, rows.start, rows.n, rows.payload))

    def _read_back(self, first: int) -> list[Effect]:
        """A piece at a time; what is asked for twice is read once."""
        piece = self.checkpoints.piece_of(first)
        assert piece is not None
        if self.reading == piece.number:
            return []
        self.reading = piece.number
        return [Emit(Unspill(piece.number, self.session))]

    def go_on_sending(self, number: int, payload: memoryview | None) -> list[Effect]:
        """With what was read, where it is what comes next (still), and with whatever follows."""
        piece = self.checkpoints.piece_of(self.sent) if self.sent is not None else None
        if payload is None or piece is None or piece.number != number:
            return self._flush()
        assert self.sent is not None
        rows = piece.rows(payload, self.sent)
        self.sent = rows.end
        return [self._forward(rows), *self._flush()]

    def _on_drawn(self, result: Computed) -> list[Effect]:
        effects: list[Effect] = []
        if result.prompt_logprobs:
            rows = result.prompt_logprobs
            effects.append(Send(self.owner, m.PromptLogprobs(self.session, self.epoch, result.start + 1, rows)))
        if result.token is None:
            return effects
        assert self.journal is not None
        assert self.done == len(self.tokens)
        position = len(self.tokens)
        self.tokens.append(result.token)
        self.scores[position] = (result.logprob, result.top)
        self.scores.pop(position - 2 * m.RUN_AHEAD, None)  # the owner has that one: hop 0 does not run so far ahead
        effects.append(
            Send(self.owner, m.Token(self.session, self.epoch, position, result.token, result.logprob, result.top))
        )
        if self.first:
            return [*effects, *self._pump()]
        return [*effects, Send(self.behind, m.Feed(self.session, self.epoch, position, (result.token,)))]

    def on_gap(self, message: m.Gap, sender: NodeId) -> list[Effect]:
        if sender != self.behind or message.expected < 0:
            return [Emit(Rejected(sender, "asks a hop that it is not behind"))]
        if self.last:
            missing = tuple(self.tokens[message.expected :])
            return [Send(sender, m.Feed(self.session, self.epoch, message.expected, missing))] if missing else []
        self.sent = message.expected
        return self._flush()

    def on_feed(self, message: m.Feed, sender: NodeId) -> list[Effect]:
        if not self.first or sender != self.before:
            return [Emit(Rejected(sender, "feeds tokens to a hop that it is not the sampler of"))]
        if message.start < 0 or message.start + len(message.tokens) > self.open.max_positions:
            return [Emit(Rejected(sender, "feeds tokens past the end of the session"))]
        assert self.journal is not None
        if not self.journal.learn(message.start, message.tokens):
            return [Send(sender, m.Gap(self.session, self.epoch, len(self.tokens)))]
        return [*([self.journal.held()] if self.confirms else []), *self._pump()]

    def on_ack(self, message: m.Ack, sender: NodeId) -> list[Effect]:
        if sender != self.owner:
            return [Emit(Rejected(sender, "acknowledges another owner's session"))]
        self.acked = max(self.acked, message.accepted)
        return self._pump() if self.first else []

    def on_progress(self, message: m.Progress, sender: NodeId) -> list[Effect]:
        """Say where this hop stands, and ask (and give) again what a lost frame may have carried."""
        if sender != self.owner:
            return [Emit(Rejected(sender, "asks after another owner's session"))]
        effects = self.on_ack(m.Ack(self.session, message.epoch, message.accepted), sender)
        tokens = len(self.tokens) if self.journal is not None else 0
        standing = m.Progressing(self.session, self.epoch, self.index, self.submitted, self.done, tokens)
        effects.append(Send(self.owner, standing))
        if self.confirms and self.journal is not None:
            effects.append(self.journal.held())
        if self.last:
            effects += [
                Send(self.owner, m.Token(self.session, self.epoch, position, self.tokens[position], *score))
                for position, score in self.scores.items()
                if position >= message.accepted
            ]
        if self.first and not self.last:
            effects.append(Send(self.before, m.Gap(self.session, self.epoch, len(self.tokens))))
        elif not self.first and self.submitted == self.done:
            effects += self.want()
        return effects

    # -- moving to another node ----------------------------------------------------------------------------------------

    def on_fetch(self, message: m.Fetch, sender: NodeId) -> list[Effect]:
        """A successor takes what is here; nothing of this hop changes by it."""
        mine, (start, end) = mine_of(self.open), message.layers
        if not mine.start <= start < end <= mine.end or message.start < 0:
            return [Emit(Rejected(sender, "fetches pages of layers that are not computed here"))]
        return self._export(sender, message.layers, message.start)

    def _export(self, to: NodeId, layers: tuple[int, int], start: int) -> list[Effect]:
        """Where the boundary's rows are on the disk they are read first, and go along."""
        ask = Export(self.key, self.tag, to, layers, start, self.done)
        if ask.start >= ask.end:
            return self.exported(ask, 0, memoryview(b""))
        piece = self.checkpoints.piece_of(start) if self._ships_rows(ask) else None
        if piece is None:
            return [Emit(ask)]
        ask = msgspec.structs.replace(ask, end=min(ask.end, piece.end))
        return [Emit(Unspill(piece.number, self.session, ask))]

    def exported(self, ask: Export, n: int, payload: memoryview) -> list[Effect]:
        """``n`` positions from ``ask.start`` on were read; 0: they cannot be."""
        if self.tag != ask.tag:  # cut meanwhile: if it is still wanted, it is asked for
            return []
        rows = ask.rows[: n * (len(ask.rows) // (ask.end - ask.start))] if ask.rows else memoryview(b"")
        if n and not rows and self._ships_rows(ask) and ask.start >= self.checkpoints.start:
            rows = self.checkpoints.rows(ask.start, ask.start + n)
            if not rows:  # they went to the disk meanwhile
                return self._export(ask.to, ask.layers, ask.start)
        return [Send(ask.to, m.Pages(self.session, self.epoch, ask.start, n, self.done, payload, rows))]

    def go_on_exporting(self, number: int, ask: Export, payload: memoryview | None) -> list[Effect]:
        piece = self.checkpoints.piece_of(ask.start)
        if (self.key, self.tag) != (ask.key, ask.tag):
            return []
        if payload is None or piece is None or piece.number != number:
            return [Emit(ask)]
        rows = piece.rows(payload, ask.start).slice(ask.start, ask.end)
        return [Emit(msgspec.structs.replace(ask, rows=rows.payload))]

    def _ships_rows(self, ask: Export) -> bool:
        """What is fetched ends at the same boundary."""
        return ask.layers[1] == mine_of(self.open).end and not self.last

    # -- rolling back --------------------------------------------------------------------------------------------------

    def trim(self, length: int) -> None:
        """Keep the checkpoints of positions [0, length)."""
        self.checkpoints.cut(length)
        self.prefix.cut(length)

    def cut(self, length: int) -> list[Effect]:
        """Keep the keys and values of positions [0, length) and void everything under way."""
        self.tag += 1
        self.submitted = self.done = length
        return [Emit(Truncate(self.key, length))]


def span_of(message: m.Open | m.Prepare) -> LayerSpan:
    """The layers that an Open names."""
    mine = mine_of(message)
    return LayerSpan(message.route.model, mine.start, mine.end)


def mine_of(message: m.Open | m.Prepare) -> Hop:
    """The hop (node, start, end) that an Open names."""
    return message.route.hops[message.hop]
