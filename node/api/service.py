"""What the HTTP API asks of the node: the one interface between them.

``node/node.py`` implements it over the real mesh, ``tests/fakes.py`` faithfully without one.  Errors are those of
``mesh.errors``; each knows its HTTP status.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol

import msgspec

from mesh.types import ModelId, ModelInfo, Priority, SamplingParams
from node.text.tokenizer import Tokenizer

Form = Literal["chat", "completion", "response"]
Scope = Literal["infer", "rag", "admin"]
EndReason = Literal["stop", "length", "cancelled"]
CancelReason = Literal["stop", "cancelled", "disconnected"]

ANONYMOUS = "anonymous"


class Caller(msgspec.Struct, frozen=True):
    """Who asks.  ``id`` names the key (never the key itself); sessions are bound to it."""

    id: str = ANONYMOUS
    scopes: frozenset[Scope] = frozenset({"infer", "rag"})


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of one prompt, as the mesh runs it and the journal keeps it: a second node can go on from it alone."""

    session: str
    """Unique in the mesh.  Choices past the first of one HTTP request are ``<session>-1``, ``<session>-2`` ..."""
    request_id: str
    """``x-request-id``: for logs and traces only."""
    model: ModelId
    prompt: tuple[int, ...]
    sampling: SamplingParams
    """Its seed is drawn and its stop_token_ids are filled in; ``max_tokens`` fits the model's context."""
    stop: tuple[str, ...] = ()
    """Stop strings.  The API matches them on the text and calls ``cancel("stop")``."""
    priority: Priority = "normal"
    timeout_s: float = 600.0
    """For the session as a whole, from the moment that ``open`` is called."""
    max_retries: int = 8
    """Recoveries without progress before the session is given up."""
    balance: str = ""
    """Name of a balancing policy; empty: the node's own."""
    max_layers: int = 0
    """At most so many layers at one node; 0: as the costs say."""
    allowed_nodes: tuple[str, ...] = ()
    """Names or ids of the only nodes that may be on the route; empty: all."""
    prompt_logprobs: int = -1
    """-1: none; 0: of the prompt's own tokens; n: the n most likely at each position as well."""
    caller: str = ANONYMOUS
    trace: str = ""
    """A W3C ``traceparent``; empty: none."""
    idempotency_key: str = ""
    body_hash: str = ""
    """SHA-256 (hex) of the request's body, to tell a repeat from another request under the same key."""
    form: Form = "chat"
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    response_id: str = ""
    created: int = 0
    """Wall seconds, as in the response."""
    choice: int = 0
    choices: int = 1
    """Of the whole HTTP request ..."""
    prompt_tokens: int = 0
    """... and the tokens of all its prompts."""
    discard: bool = False
    """The one token that is drawn is not shown: only the prompt is scored."""
    return_tokens: bool = False
    """Chunks of the stream name their tokens."""
    resume: tuple[int, ...] = ()
    """Drawn before this session, by one that is lost: begin after them.  Opening only; the journal has them among
    its tokens."""
    rerun: bool = False
    """Its client has some of it from a session that is lost: all is drawn again, and it counts as one that has begun.
    Opening only."""
    tool_mode: str = "none"
    tool_names: tuple[str, ...] = ()
    follows: bool = False
    """Its client goes on elsewhere by itself when the node that it reads from leaves."""


Top = tuple[tuple[int, float], ...]
"""(token, log-probability), most likely first."""


class PromptEvent(msgspec.Struct, frozen=True):
    """Log-probabilities of the prompt's tokens at positions [start, start + len(logprobs)); position 0 has none.

    Only where ``prompt_logprobs`` >= 0; in order, without gaps, all of them before the first token.
    """

    start: int
    logprobs: tuple[float, ...]
    tops: tuple[Top, ...] = ()
    """As long as ``logprobs``, or empty where no alternatives were asked for."""

    def from_on(self, position: int) -> PromptEvent:
        """Those from ``position`` on."""
        known = max(0, position - self.start)
        return PromptEvent(self.start + known, self.logprobs[known:], self.tops[known:])


class TokenEvent(msgspec.Struct, frozen=True):
    """A token as drawn, each position once and in order, held by a second node already."""

    position: int
    """Absolute: the first new token has position ``len(prompt)``."""
    token: int
    logprob: float | None = 0.0
    """``None``: it was lost with a node, the token was not."""
    top: Top = ()


class EndEvent(msgspec.Struct, frozen=True):
    """The last event.  ``stop``: a stop token was drawn (and shown as a TokenEvent); ``length``: max_tokens reached."""

    reason: EndReason


Event = PromptEvent | TokenEvent | EndEvent


class Recovery(msgspec.Struct, frozen=True):
    """One fault that the session outlived."""

    cause: str
    hop: str
    detected_by: str
    pause_ms: float
    positions_replayed: int
    exact: Literal["bitwise", "tokens"]


class Generation(Protocol):
    """A running session, at whichever node owns it; what follows after a change of owner is the same.

    Iterating ends after the EndEvent, or raises MeshError (SessionLost, ...) when it broke."""

    @property
    def request(self) -> GenerationRequest: ...

    @property
    def route(self) -> str:
        """``name:start-end,name:start-end`` as of now."""
        ...

    @property
    def recoveries(self) -> tuple[Recovery, ...]: ...

    @property
    def cached_tokens(self) -> int:
        """Positions of the prompt that were found in a prefix cache."""
        ...

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def acknowledge(self, position: int) -> None:
        """The client has been sent everything up to and including ``position``: moves the run-ahead window."""
        ...

    async def cancel(self, reason: CancelReason) -> None:
        """This reader is done.  ``stop`` ends the session; else it ends with its last reader, unless it may wait for
        another (it was adopted, or has an idempotency key).  Harmless after the end."""
        ...


class Service(Protocol):
    """The node, as the API sees it."""

    name: str
    version: str

    # -- models ------------------------------------------------------------------------------------------------
    def models(self) -> list[ModelInfo]:
        """Those in the placement, whether they can be served at the moment or not."""
        ...

    async def tokenizer(self, model: ModelId) -> Tokenizer:
        """Loaded off the loop on first use.  NoRoute where its files are not here yet."""
        ...

    async def check_grammar(self, model: ModelId, grammar: str, drawn: tuple[int, ...] = ()) -> None:
        """RequestError where ``SamplingParams.grammar`` cannot be this one, or allows no text that begins with
        ``drawn``: says why.  Off the loop."""
        ...

    # -- generations -------------------------------------------------------------------------------------------
    async def open(self, request: GenerationRequest) -> Generation:
        """Open the session at every hop.  CapacityError, NoRoute, RequestError: certainly nothing was started."""
        ...

    async def attach(self, session: str, caller: Caller, patience_s: float) -> Generation | None:
        """One reader more of ``session`` from its first event on, wherever it runs or has ended a while ago.  None:
        this caller has no such session; while its owner is being replaced that takes up to ``patience_s``."""
        ...

    async def claim(self, request: GenerationRequest) -> str:
        """The session that runs under this caller's idempotency key: ``request.session``, or that of an earlier
        request with the same body.  RequestError (409): the body was another."""
        ...

    async def cancel(self, session: str, caller: Caller) -> bool:
        """Cancel ``session`` and its further choices, wherever in the mesh it runs.  False: no such session of this
        caller (whoever has scope ``admin`` may cancel any).  ``PeerUnreachable``: not all have said so yet."""
        ...

    def draw_seed(self, idempotency_key: str) -> int:
        """64 bits: HMAC(mesh key, idempotency_key), so that a double run agrees; random where the key is empty."""
        ...

    # -- state -------------------------------------------------------------------------------------------------
    def status(self) -> dict[str, Any]:
        """The ``/mesh/status`` document."""
        ...

    @property
    def degraded(self) -> str:
        """Why this node can only serve what is placed (no majority is in reach); empty: it can do everything."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether every placed model can be served now, and else why not."""
        ...

    def check_key(self, key: str) -> Caller | None:
        """Whose API key this is (compared in constant time, not expired), the node's own admin key included."""
        ...

    # -- administration: each returns a JSON object --------------------------------------------------------------
    async def token_create(self, ttl_s: float, uses: int | None) -> dict[str, Any]:
        """``{"token", "id", "expires_at", "uses", "command"}``; ``uses`` None: without limit."""
        ...

    async def token_list(self) -> list[dict[str, Any]]: ...

    async def token_revoke(self, token_id: str) -> bool: ...

    async def key_create(self, scopes: frozenset[Scope], ttl_s: float | None, name: str) -> dict[str, Any]:
        """``{"key", "id", "scopes", "expires_at", "name"}``; the key is shown this once."""
        ...

    async def key_list(self) -> list[dict[str, Any]]: ...

    async def key_revoke(self, key_id: str) -> bool: ...

    async def model_list(self) -> list[dict[str, Any]]: ...

    async def model_add(self, path: str, name: str) -> dict[str, Any]: ...

    async def model_remove(self, model: ModelId) -> bool: ...

    async def leave(self) -> dict[str, Any]:
        """Begin to drain and leave; answers at once, the process ends when it is done."""
        ...

    async def revoke(self, node: str) -> dict[str, Any]:
        """Shut ``node`` (name or id) out for good."""
        ...

    async def takeover(self) -> dict[str, Any]:
        """Operator's word that the missing voters are gone for good."""
        ...
