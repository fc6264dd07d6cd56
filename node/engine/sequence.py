"""What is asked of the engine and what it answers: frozen values, and the state of one sequence.  No torch here."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from mesh.types import ModelId, Priority, SamplingParams

if TYPE_CHECKING:
    from node.engine.masks import Guide

TokenScore = tuple[float, tuple[tuple[int, float], ...]]
"""(log-probability of a token, the most likely tokens at its place with theirs)."""


class SequenceSpec(msgspec.Struct, frozen=True):
    """A session's part at this engine: layers [start, end) of ``model``."""

    key: str
    model: ModelId
    start: int
    end: int
    max_positions: int
    """Keys and values it may come to hold; reserved at ``open``, so that it is never stopped for memory."""
    priority: Priority = "interactive"
    hops: int = 1
    """Hops of its route: with more than one, hop 0 runs that many micro-batches."""
    sampling: SamplingParams | None = None
    """At the sampler only, as is ``tokens``."""
    tokens: tuple[int, ...] = ()
    """The prompt and what has been drawn so far."""
    base: str = ""
    """Another sequence over the same layers, which ends: this one goes on from its positions [0, kept)."""
    kept: int = 0
    rebuilds: int = 0
    """Positions of a stream that has begun: until they are computed again it stands still."""

    @property
    def prompt_length(self) -> int:
        """Of the sampler's tokens: ``max_positions`` is prompt plus ``max_tokens``."""
        return max(0, self.max_positions - self.sampling.max_tokens) if self.sampling else 0


class Work(msgspec.Struct, frozen=True):
    """Compute positions [start, start + n), from token ids (layer 0) or from hidden states."""

    key: str
    tag: int
    """Comes back with the results."""
    start: int
    n: int
    tokens: tuple[int, ...] = ()
    hidden: bytes | bytearray | memoryview | None = None
    """Contiguous [n, hidden_size] in the model's serving dtype, little-endian."""
    sample: bool = False
    """Draw the token that follows the last row."""
    prompt_logprobs: bool = False
    """Score, for every row, the token that follows it in the sequence (where that is known)."""


class Sampled(msgspec.Struct, frozen=True):
    """Token number ``position`` of the sequence was drawn."""

    position: int
    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Result(msgspec.Struct, frozen=True):
    """The answer to a leading part of a ``Work``; the parts come in order."""

    key: str
    tag: int
    start: int
    n: int
    hidden: memoryview | None = None
    """[n, hidden_size] as in ``Work``; a view into the whole step's output: copy what is kept."""
    sampled: Sampled | None = None
    prompt_logprobs: tuple[TokenScore, ...] = ()
    """Of tokens start + 1, start + 2, ...; the last row's is missing where its follower is not known."""
    error: str = ""
    """Not empty: nothing was computed, and the sequence can only be closed."""
    final: bool = False
    """Of an error: any other node would come to the same."""
    rewound: bool = False
    """No answer to a ``Work``: the sequence could not go back to where it was to, or begin where it was to, and stands
    at position 0; what is queued behind is void until it is cut to 0."""


class EngineStats(msgspec.Struct, frozen=True):
    """How busy the engine is."""

    running: int = 0
    """Sequences with room reserved."""
    waiting: int = 0
    """Of them, with rows queued that no step has taken yet."""
    free_tokens: int = 0
    """Positions that could still be reserved, over the layers of the largest loaded span."""
    used_bytes: int = 0
    """Bytes of keys and values reserved."""
    shared_bytes: int = 0
    """Bytes of pages that sequences share; they go when the room is wanted."""
    held_bytes: int = 0
    """Bytes of key and value tensors allocated (pages that were never written are not resident)."""
    weight_bytes: int = 0
    step_ms: float = 0.0
    """Recent mean."""
    tokens_per_s: float = 0.0
    """Rows computed a second over the last seconds."""
    rows: int = 0
    """Rows computed since the start."""


class Sequence:
    """The engine thread's state of one open sequence."""

    def __init__(self, spec: SequenceSpec, arrival: int, row_bytes: int = 0, vocabulary: int = 0) -> None:
        self.spec = spec
        self.arrival = arrival
        self._row_bytes, self._vocabulary = row_bytes, vocabulary
        self.length = 0
        """Positions computed: [0, length) have keys and values."""
        self.queue: deque[Work] = deque()
        self.taken = 0
        """Rows of the first queued work that earlier steps computed."""
        self.served = -1
        """The step that computed for it last."""
        self.decoding = False
        """Its rows come one at a time: each waits for the token before."""
        self.tokens = list(spec.tokens)
        self.failed = ""
        self.rewound = False
        """It stands at 0, and whoever asks for work on it does not know yet."""
        self.state: object = None
        """What the shard keeps for it (an extent of its cache, or a cache of its own)."""
        self.guide: Guide | None = None
        """At the sampler, where the answer has a grammar."""

    @property
    def end(self) -> int:
        """Where the next work must start."""
        last = self.queue[-1] if self.queue else None
        return last.start + last.n if last else self.length

    @property
    def behind(self) -> int:
        """Positions that it has still to rebuild."""
        return max(0, self.spec.rebuilds - self.length)

    @property
    def wanted(self) -> int:
        """Rows of the first queued work that are still to be computed."""
        return self.queue[0].n - self.taken if self.queue else 0

    @property
    def ready(self) -> int:
        """Of ``wanted``, the rows that a step may take now: one to draw from waits for its grammar's mask."""
        waits = self.guide is not None and self.guide.mask is None and self.queue and self.queue[0].sample
        return self.wanted - 1 if waits else self.wanted

    def refusal(self, work: Work) -> str:
        """Why ``work`` cannot be queued; empty: it can."""
        if self.failed:
            return self.failed
        if work.sample and self.guide and self.guide.error and self.guide.position == work.start + work.n:
            return self.guide.error.why
        if work.n < 1 or work.start != self.end:
            return f"positions [{work.start}, {work.start + work.n}) do not follow {self.end}"
        if work.start + work.n > self.spec.max_positions:
            return f"position {work.start + work.n - 1} is past the {self.spec.max_positions} reserved"
        if (work.hidden is None) != (self.spec.start == 0):
            return "token ids belong to layer 0, hidden states to later ones"
        if work.hidden is None:
            return self._refused_tokens(work)
        size = memoryview(work.hidden).nbytes
        return "" if size == work.n * self._row_bytes else f"{size} bytes of hidden states for {work.n} positions"

    def _refused_tokens(self, work: Work) -> str:
        if len(work.tokens) != work.n:
            return f"{len(work.tokens)} token ids for {work.n} positions"
        if min(work.tokens) < 0 or max(work.tokens) >= self._vocabulary:
            return f"token ids from {min(work.tokens)} to {max(work.tokens)} in a vocabulary of {self._vocabulary}"
        return ""

    def push(self, work: Work) -> None:
        """Queue ``work``, which follows what is queued already."""
        self.decoding = work.n == 1 and work.start > 0
        self.queue.append(work)
        if work.sample:
            self.expect(work.start + work.n)

    def advance(self, n: int, step: int) -> None:
        """``n`` rows of the first work were computed in ``step``."""
        self.length += n
        self.taken += n
        self.served = step
        assert self.taken <= self.queue[0].n, (self.spec.key, self.taken)
        if self.taken == self.queue[0].n:
            self.queue.popleft()
            self.taken = 0

    def drew(self, position: int, token: int) -> None:
        """Token number ``position`` is ``token`` from now on; what was known past it is void."""
        del self.tokens[position:]
        self.tokens.append(token)
        self.expect(position + 1)

    def expect(self, position: int) -> None:
        """Token number ``position`` is drawn next: its grammar's mask can be made meanwhile."""
        if self.guide is not None and self.guide.position != position:
            self.guide.ask(position, self.tokens[self.spec.prompt_length : position])

    def rewind(self) -> Result:
        """Begin anew; work is void until a cut to 0 shows that this is known."""
        self.cut(0)
        self.rewound = True
        return Result(self.spec.key, 0, 0, 0, rewound=True)

    def cut(self, length: int) -> None:
        """Keep positions [0, length), and the queued work before ``length``.

        All tokens stay: those of a prompt that was not computed to its end are not told again, and what was drawn past
        ``length`` is replaced when it is drawn again.
        """
        keep = [work for work in self.queue if work.start + work.n <= length]
        if self.queue and (not keep or keep[0] is not self.queue[0]):
            self.taken = 0
        self.queue = deque(keep)
        self.length = min(self.length, length)
