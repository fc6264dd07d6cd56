"""What the two ends of a generation say to each other, and the values that both reason with.

Positions are half-open ranges; position ``p`` of the keys and values belongs to token ``p`` (the prompt included).
The token drawn from the output of position ``p`` is token ``p + 1``.

The ring of one session::

    owner ──Open, Ack, Progress, Park, Release──► every hop   hop ──Opened, Refused, Progressing──► owner
    hop i ──Forward──► hop i + 1            hop i + 1 ──Gap──► hop i       ("send me from this position on")
    sampler ──Token──► owner                sampler ──Feed──► hop 0        (one leg less for each token)

The sampler and hop 0 hold the session's journal: the whole request and every token.  Where the owner is both of them
it names a witness, a node that holds the journal and no layers.  Who holds the journal can own the session::

    holder ──Held──► owner   ("I have so many tokens")       owner ──Disown──► holder   ("I do not own it: adopt it")
    whoever knows better ──Ahead──► owner                    ("a newer epoch is followed here, or more tokens known")

A hop that is to go is moved while it serves (mesh/pipeline/moves.py)::

    hop ──Vacate──► owner ──Prepare──► successor ──Fetch──► hop ──Pages──► successor ──Arrived──► owner: Open
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from mesh.types import ModelId, NodeId, Priority, Route, SamplingParams

SessionId = str
Epoch = tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)], NodeId]
"""(counter, owner), compared as a pair; it names one route of a session.  A counter goes up by one for each route: one
near the end of what can be encoded was made to do harm."""
PlacementId = tuple[int, int]
"""(mesh epoch's counter, placement counter)."""

RUN_AHEAD = 32
"""Tokens that hop 0 may run past the owner's acknowledgement (slow client, stop string, cut link)."""


class SessionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The whole request, as every journal holds it: enough to go on with it anywhere."""

    model: ModelId
    prompt: tuple[int, ...]
    sampling: SamplingParams
    priority: Priority = "interactive"
    timeout_s: float = 600.0
    max_retries: int = 8
    """Recoveries without progress before the session is given up."""
    balance: str = ""
    allowed_nodes: tuple[str, ...] = ()
    """Ids or names; empty: all."""
    prompt_logprobs: bool = False
    form: bytes = b""
    """What the API needs to go on with the answer (its form, stop strings, response id); opaque here."""
    sharer: str = ""
    """Keys and values of common prefixes are shared among requests of the same sharer."""

    @property
    def max_positions(self) -> int:
        """Keys and values that the session may come to hold: the last token's are never computed."""
        return len(self.prompt) + self.sampling.max_tokens


def finish_reason(request: SessionRequest, tokens: Sequence[int], start: int = 0) -> Literal["stop", "length"] | None:
    """Why a generation is complete with the drawn tokens ``tokens[start:]``; ``None``: it goes on.

    Every holder of the journal (to stop computing) and the owner (to end the stream) ask this, so that they agree.
    """
    sampling, drawn = request.sampling, len(tokens) - start
    if drawn and tokens[-1] in sampling.stop_token_ids and drawn >= sampling.min_tokens:
        return "stop"
    return "length" if drawn >= sampling.max_tokens else None


RefusalCode = Literal[
    "busy",
    "paused",
    "stale_placement",
    "unknown_placement",
    "not_held",
    "unknown_session",
    "failed",
    "dead_end",
]
"""``busy``: no room; ``paused``: its room was given to a higher class.  Both come back with time."""


class PipelineMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Every message names its session and the epoch that it belongs to."""

    session: SessionId
    epoch: Epoch


# -- owner to hop ------------------------------------------------------------------------------------------------------


class Open(PipelineMessage, frozen=True):
    """Follow this route from now on.  Opening and resuming are one act: a hop that holds nothing starts at 0.

    A hop that knows an older epoch cuts what it holds to what the owner accepted, and keeps the rest.  From another
    owner than the hop follows it is a claim, which a hop that knows more answers with ``Ahead``.
    """

    route: Route
    hop: int
    """Index on the route; one past the last hop: the witness, which holds the journal and no layers."""
    placement_id: PlacementId
    max_positions: int
    priority: Priority
    accepted: int
    """Tokens that the owner holds, prompt included; what lies beyond is not valid."""
    request: SessionRequest | None = None
    """For the journal's holders (hop 0, the sampler, the witness)."""
    drawn: tuple[int, ...] = ()
    """Tokens drawn so far, for the journal's holders."""
    left_s: float = 600.0
    """Seconds until the session's deadline."""
    chain: tuple[bytes, ...] = ()
    """Names of the accepted tokens' whole pages (mesh/pipeline/prefix.py)."""
    shipped: tuple[Epoch, int] | None = None
    """Pages that came under this epoch hold, up to so many positions: those were accepted in it."""
    begun: bool = False
    """Tokens were drawn before: the stream stands still until what was computed is there again."""


class Ack(PipelineMessage, frozen=True):
    """The owner accepted ``accepted`` tokens, prompt included; to hop 0, which runs at most ``RUN_AHEAD`` past it."""

    accepted: int


class Progress(PipelineMessage, frozen=True):
    """How far are you?  A hop answers and says again what it waits for, so that a lost frame is repaired."""

    accepted: int


class Park(PipelineMessage, frozen=True):
    """The session waits for room: give up its keys and values, keep its journal and checkpoints.  The next Open of a
    newer epoch takes room again and rebuilds them."""


class Release(PipelineMessage, frozen=True):
    """The session ended: free everything.  The pages that ``chain`` names may be of use to the next one."""

    chain: tuple[bytes, ...] = ()


class Lease(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The owner lives and still wants these sessions of a hop (one message for all of them)."""

    sessions: tuple[tuple[SessionId, Epoch], ...]


class Disown(PipelineMessage, frozen=True):
    """The sender is named as the session's owner and is not (it restarted): whoever holds the journal goes on."""

    heir: NodeId | None = None
    """It gives the session away, to this holder of its journal; the others wait for the heir."""
    drawn: tuple[int, ...] = ()
    """For the heir: the tokens that the sender knows."""


class Prepare(PipelineMessage, frozen=True):
    """Fetch, from a hop that is to go, what lies ahead of an ``Open`` of this hop; it serves on meanwhile."""

    route: Route
    hop: int
    placement_id: PlacementId
    max_positions: int
    priority: Priority
    source: NodeId


# -- hop to owner ------------------------------------------------------------------------------------------------------


class Opened(PipelineMessage, frozen=True):
    """The hop follows this epoch; ``kept`` positions survived from before (0: it starts anew)."""

    hop: int
    kept: int
    shared: int = 0
    """Positions that it never computed: it began behind the pages of others."""


class Refused(PipelineMessage, frozen=True):
    """The hop does not serve the session (any more)."""

    hop: int
    code: RefusalCode
    why: str
    retry_after_s: float = 1.0


class Progressing(PipelineMessage, frozen=True):
    """Where a hop stands: positions handed to its engine, positions computed, tokens in its journal."""

    hop: int
    submitted: int
    done: int
    tokens: int


class Vacate(PipelineMessage, frozen=True):
    """The hop is to go (its node leaves, or its layers are placed elsewhere): move it."""

    hop: int


class Arrived(PipelineMessage, frozen=True):
    """A successor has the pages of [0, have); ``ready``: all that there are, or all that can be had."""

    hop: int
    have: int
    ready: bool


class Token(PipelineMessage, frozen=True):
    """The sampler drew the token of ``position``."""

    position: int
    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Held(PipelineMessage, frozen=True):
    """A holder's journal has ``tokens`` tokens, prompt included; without a renewed lease also: do you still own it?"""

    tokens: int


class Ahead(PipelineMessage, frozen=True):
    """To an owner whose ``epoch`` is not followed: what is ``known`` here, and the journal where one is held here.

    Newer than ``epoch``: the session has moved on, to the owner in ``known``.  Older: the claim lacks tokens.
    """

    known: Epoch
    drawn: tuple[int, ...] = ()


class PromptLogprobs(PipelineMessage, frozen=True):
    """Log-probabilities of the prompt's own tokens at [start, start + len(rows)): (logprob, most likely others)."""

    start: int
    rows: tuple[tuple[float, tuple[tuple[int, float], ...]], ...]


# -- hop to hop --------------------------------------------------------------------------------------------------------


class Forward(PipelineMessage, frozen=True):
    """Hidden states of positions [start, start + n): ``payload`` is n rows of raw bytes in the wire dtype."""

    start: int
    n: int
    payload: memoryview


class Gap(PipelineMessage, frozen=True):
    """To the hop before (to the sampler, from hop 0): send me positions (tokens) from ``expected`` on.

    One mechanism for the first frame, a lost one and a replay: nothing crosses a boundary before the hop behind it
    has said from where.
    """

    expected: int


class Fetch(PipelineMessage, frozen=True):
    """Successor to the hop that is to go: send me the keys and values of ``layers`` from position ``start`` on."""

    layers: tuple[int, int]
    start: int


class Pages(PipelineMessage, frozen=True):
    """Keys and values of positions [start, start + n), as an engine wrote them for another.

    ``done``: positions computed at the sender; with ``n`` 0 and more of them the rest cannot be shipped.
    ``rows``: its checkpoints of the same positions, where the boundary is the same and they are still held.
    """

    start: int
    n: int
    done: int
    payload: memoryview
    rows: memoryview


class Feed(PipelineMessage, frozen=True):
    """Sampler to hop 0: tokens from ``start`` on; the next position can be computed.  Owner to witness: for its
    journal."""

    start: int
    tokens: tuple[int, ...]


ToStage = Open | Ack | Progress | Park | Release | Disown | Lease | Prepare | Forward | Gap | Feed | Fetch | Pages
ToSession = Opened | Refused | Progressing | Vacate | Arrived | Token | PromptLogprobs | Held | Ahead
Pipeline = ToStage | ToSession
TO_SESSION = (Opened, Refused, Progressing, Vacate, Arrived, Token, PromptLogprobs, Held, Ahead)
BULK = (Forward, Pages)
"""What goes by the lane of tensors."""
