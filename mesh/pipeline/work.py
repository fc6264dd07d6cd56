"""What a stage asks of the node around it, and the engine's answer."""

from __future__ import annotations

import msgspec

from mesh.pipeline import messages as m
from mesh.types import NodeId, Priority, SamplingParams


class Reserve(msgspec.Struct, frozen=True):
    """Reserve room in the engine, then call ``StageCore.reserved`` or ``StageCore.refused``, which may ask again once
    it has freed some."""

    key: str
    model: str
    start: int
    end: int
    max_positions: int
    priority: Priority
    hops: int
    sampling: SamplingParams | None
    tokens: tuple[int, ...]
    base: str = ""
    """Take over the room of this key, with positions [0, kept) in it; it is no more, whatever the answer is."""
    kept: int = 0
    rebuilds: int = 0
    """Positions of a stream that has begun: until they are computed again it stands still."""


class Compute(msgspec.Struct, frozen=True):
    """Compute positions [start, start + n) from ``tokens`` (hop 0) or from ``hidden``."""

    key: str
    tag: int
    """Comes back with the result; what was begun before a roll-back carries an older one."""
    start: int
    n: int
    tokens: tuple[int, ...] = ()
    hidden: memoryview | None = None
    sample: bool = False
    prompt_logprobs: bool = False


class Computed(msgspec.Struct, frozen=True):
    """The engine's answer to (a leading part of) a ``Compute``."""

    key: str
    tag: int
    start: int
    n: int
    hidden: memoryview | None = None
    token: int | None = None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()
    error: str = ""
    final: bool = False
    """Of an error: any other node would come to the same."""
    rewound: bool = False
    """No answer to a ``Compute``: what was to be kept is not there, and the sequence stands at 0 again."""


class Truncate(msgspec.Struct, frozen=True):
    """Keep only the first ``length`` positions; work that was begun past them is void."""

    key: str
    length: int


class KeepPages(msgspec.Struct, frozen=True):
    """Keep the keys and values of ``size`` positions under each number, from each position of ``key`` on."""

    key: str
    size: int
    pages: tuple[tuple[int, int], ...]
    """(first position, number)."""


class TakePages(msgspec.Struct, frozen=True):
    """``key``, which has computed nothing, begins with these pages of ``size`` positions."""

    key: str
    size: int
    pages: tuple[int, ...]


class DropPages(msgspec.Struct, frozen=True):
    """Nobody wants these pages any more."""

    pages: tuple[int, ...]


class Free(msgspec.Struct, frozen=True):
    """Free what ``Reserve`` took."""

    key: str


class FetchPlacement(msgspec.Struct, frozen=True):
    """A session names a newer placement than is active here: fetch the committed record from ``peer``."""

    peer: NodeId
    placement_id: m.PlacementId


class Export(msgspec.Struct, frozen=True):
    """Read keys and values of ``layers``, as many of positions [start, end) as make one piece, then call
    ``StageCore.exported``."""

    key: str
    tag: int
    to: NodeId
    layers: tuple[int, int]
    start: int
    end: int
    rows: memoryview = memoryview(b"")
    """Of the boundary behind, from ``start`` on, where they had to be read from the disk."""


class Import(msgspec.Struct, frozen=True):
    """Write what ``Export`` read: positions [start, start + n); what cannot be written calls ``StageCore.spoiled``."""

    key: str
    start: int
    n: int
    payload: memoryview


class Spill(msgspec.Struct, frozen=True):
    """Write these rows to the disk under ``number``, which names nothing else ever, then call ``StageCore.spilled``.
    The disk answers ``Spill``, ``Unspill`` and ``Forget`` in the order in which it was asked."""

    number: int
    rows: tuple[memoryview, ...]


class Unspill(msgspec.Struct, frozen=True):
    """Read what was written under ``number``, then call ``StageCore.unspilled``."""

    number: int
    session: m.SessionId
    then: Export | None = None
    """What it is read for; ``None``: to be sent to the hop behind."""


class Forget(msgspec.Struct, frozen=True):
    """Nobody wants what was written under these numbers any more."""

    numbers: tuple[int, ...]
