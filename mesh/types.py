"""Frozen values that every part of the mesh speaks in."""

from __future__ import annotations

from typing import Literal, NewType

import msgspec

NodeId = NewType("NodeId", str)
"""32 hex digits: the first half of SHA-256 over the node's Ed25519 public key.  Never reused (R10)."""

ModelId = NewType("ModelId", str)
"""The name that a model is served under, as in ``/v1/models``."""

MeshId = NewType("MeshId", str)
"""32 hex digits, drawn when the mesh was founded.  Meshes never merge."""

Role = Literal["any", "stage", "entry", "witness"]
"""``any``: everything; ``stage``: no public API; ``entry``: holds no layers; ``witness``: votes only."""

Priority = Literal["interactive", "normal", "batch"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "normal", "batch")


class LayerSpan(msgspec.Struct, frozen=True, order=True):
    """Layers [start, end) of one model."""

    model: ModelId
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def covers(self, start: int, end: int) -> bool:
        return self.start <= start and end <= self.end


class ModelInfo(msgspec.Struct, frozen=True):
    """What placement and routing need to know of a model; all sizes in bytes as held in memory."""

    id: ModelId
    manifest: str
    """SHA-256 (hex) of the model's manifest: what is served is fixed by it."""
    n_layers: int
    layer_bytes: int
    """Weights of one layer (the largest, where they differ)."""
    embed_bytes: int
    """Weights that the first span needs besides its layers."""
    head_bytes: int
    """Weights that the last span needs besides its layers (a tied embedding included)."""
    hidden_size: int
    kv_bytes: int
    """Keys and values of one token in one layer."""
    vocab_size: int
    max_context: int
    """Positions, prompt and completion together."""
    dtype: str
    """``float32``, ``bfloat16`` or ``float16``."""
    offered_by: tuple[NodeId, ...] = ()
    tied_bytes: int = 0
    """Counted in ``embed_bytes`` and in ``head_bytes``, but held once by a span that is both first and last."""
    quantize: str = ""
    """``int8``: weights are held in 8 bits; the sizes above say so.  Empty: in ``dtype``."""


class Load(msgspec.Struct, frozen=True):
    """How busy a node is; changes often, so it never rides on membership updates."""

    running: int = 0
    waiting: int = 0
    free_tokens: int = 0
    """KV positions that could still be taken in by the spans it holds."""
    tokens_per_s: float = 0.0
    step_ms: float = 0.0
    """Recent mean of one engine step."""
    lag_ms: float = 0.0
    """Event-loop lag, p99 of the last seconds."""


class NodeProfile(msgspec.Struct, frozen=True):
    """What a node says of itself: an owner-versioned row, newest version wins."""

    name: str = ""
    peer: str = ""
    """host:port of the peer door (TCP and UDP)."""
    api: str = ""
    """URL of the public API; empty: none."""
    role: Role = "any"
    memory_bytes: int = 0
    """For weights, keys and values of all spans together."""
    weight_bytes: int = 0
    """How much of it placement may fill with weights."""
    flops: float = 0.0
    """Measured multiply-adds x 2 per second in the serving dtype (a small matrix product at join)."""
    bandwidth: float = 0.0
    """Measured bytes per second of reading weights (a matrix-vector product at join)."""
    rtt_ms: float = 0.0
    """Median round trip to peers, its own access link in both directions."""
    hardware: str = ""
    """Hardware class for exact replay: device kind, instruction set, torch build, kernel options."""
    exact: bool = False
    """The start-up self-test of batch-invariant kernels passed."""
    models: tuple[ModelInfo, ...] = ()
    """Models whose files this node holds whole and offers."""
    spans: tuple[LayerSpan, ...] = ()
    """Spans loaded and ready to serve."""
    loading: tuple[LayerSpan, ...] = ()
    fetched: int = 0
    """Of the span being loaded: per cent of its weights that are on the disk."""
    refused: tuple[str, ...] = ()
    """Spans that could not be loaded, as ``model[start:end]: why``."""
    seal_key: bytes = b""
    """What the CA's key can be sealed to: the node's X25519 key, signed by its identity (msgpack)."""
    draining: bool = False
    load: Load = Load()


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to draw tokens.  Stateless: randomness is a function of (seed, position) only."""

    max_tokens: int = 256
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """64 bit; the entry draws one where the request has none."""
    stop_token_ids: tuple[int, ...] = ()
    """End-of-sequence ids; empty with ``ignore_eos``."""
    min_tokens: int = 0
    logprobs: int = -1
    """-1: none; 0: of the drawn token; n: of the n most likely as well (at most 20)."""
    grammar: str = ""
    """A grammar for constrained decoding (llguidance's serialised form); empty: none."""


def to_builtins(value: object) -> object:
    """``value`` as dicts, lists and scalars, for JSON."""
    return msgspec.to_builtins(value)


class Hop(msgspec.Struct, frozen=True):
    """One stage of a route: ``node`` computes layers [start, end), which may be a part of what it holds."""

    node: NodeId
    start: int
    end: int


class Route(msgspec.Struct, frozen=True):
    """Hops that cover all layers of ``model``, with no gap and no overlap; the last is the sampler."""

    model: ModelId
    hops: tuple[Hop, ...]

    def hop_of(self, node: NodeId) -> Hop | None:
        return next((hop for hop in self.hops if hop.node == node), None)

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(hop.node for hop in self.hops)

    def __str__(self) -> str:
        return ",".join(f"{hop.node[:8]}:{hop.start}-{hop.end}" for hop in self.hops)
