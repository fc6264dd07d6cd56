"""How a session is set up, and what it tells the node that owns it."""

from __future__ import annotations

from enum import Enum
from typing import Literal

import msgspec

from mesh.pipeline.messages import SessionId
from mesh.pipeline.prefix import PAGE
from mesh.types import Hop, NodeId


class SessionConfig(msgspec.Struct, frozen=True):
    """Times in seconds of a session's owner."""

    resend_s: float = 0.5
    """An Open without an answer is sent again (it is idempotent) ..."""
    open_timeout_s: float = 2.0
    """... and the hop given up after this long."""
    stall_min_s: float = 0.5
    """The next token's deadline is max(this, ``stall_factor`` x the longest recent gap) ..."""
    stall_factor: float = 6.0
    stall_max_s: float = 10.0
    first_token_s: float = 2.0
    """... and this for the first one, of which no gap is known yet."""
    silent_s: float = 1.0
    """A hop that does not answer Progress for this long is lost."""
    stuck_rounds: int = 3
    """So many rounds of Progress without any progress at any hop, and the first stuck hop is replaced."""
    ask_again_s: float = 0.05
    """The sampler is asked for a lost token at most this often."""
    ack_every: int = 8
    page: int = PAGE
    """Positions of a page that sessions share; the stages' ``StageConfig.page``."""
    backoff_s: float = 0.05
    backoff_max_s: float = 2.0
    suspect_s: float = 10.0
    """A hop that was lost is not chosen again for this long ..."""
    forgive_s: float = 2.0
    """... or, where nobody else holds its layers, for this long."""
    pause_s: float = 0.25
    """A session without room tries again after this long, and each time that there is none after twice as long ..."""
    pause_max_s: float = 4.0
    """... up to this."""
    move_s: float = 5.0
    """A move that comes no further for so long is given up: its hop serves on."""
    leaving_s: float = 1.5
    """A hop that is to go says so more often than this; one that does not any more may be chosen again."""


class State(Enum):
    ROUTING = "routing"
    OPENING = "opening"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


class Recovery(msgspec.Struct, frozen=True):
    """The trace of one recovery, as the stream's final usage shows it."""

    cause: str
    hop: int
    """Index on the route; -1: it was the owner that was lost."""
    detected_by: str
    pause_ms: float
    """From the detection to the next token."""
    positions_replayed: int
    exact: Literal["bitwise", "tokens"]


# -- events ------------------------------------------------------------------------------------------------------------


class NeedRoute(msgspec.Struct, frozen=True):
    """Find a route and call ``follow``, or ``unroutable``.  ``keep``: surviving hops, to stay as they are."""

    keep: tuple[Hop, ...]
    exclude: tuple[NodeId, ...]


class NeedMove(msgspec.Struct, frozen=True):
    """Hops are to go.  Find a route without them and call ``prepare``; where there is none, do nothing."""

    keep: tuple[Hop, ...]
    exclude: tuple[NodeId, ...]


class Accepted(msgspec.Struct, frozen=True):
    """The next token of the stream, each position once and in order; another node than this one holds it already."""

    position: int
    token: int
    logprob: float | None
    """``None``: lost with the owner that had accepted the token."""
    top: tuple[tuple[int, float], ...]


class PromptScored(msgspec.Struct, frozen=True):
    """Log-probabilities of the prompt's tokens from ``start`` on."""

    start: int
    rows: tuple[tuple[float, tuple[tuple[int, float], ...]], ...]


class Paused(msgspec.Struct, frozen=True):
    """There is no room for the session now: its tokens and checkpoints are kept, and it goes on when there is.  Told
    once until the next token."""

    session: SessionId
    why: str


class Recovered(msgspec.Struct, frozen=True):
    """Tokens flow again after a recovery."""

    recovery: Recovery


class Ended(msgspec.Struct, frozen=True):
    """The session is complete: ``stop``, ``length`` or ``cancelled``."""

    reason: str


FailureCode = Literal["busy", "no_route", "session_lost", "timeout", "dead_end"]


class Failed(msgspec.Struct, frozen=True):
    """The session cannot go on.  ``code``: busy (nothing was started), no_route, session_lost, timeout, or dead_end
    (its grammar allows no further token, whoever draws it)."""

    code: FailureCode
    why: str
    retry_after_s: float = 1.0


class Moved(msgspec.Struct, frozen=True):
    """Another node owns the session now: this one only passes on what it has from there."""

    owner: NodeId
