"""A hostile member: whatever it says, nothing is raised, all is bounded, and nobody speaks for another."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from gossip import messages
from gossip.messages import DATAGRAM_CODEC, STREAM, STREAM_CODEC, Gossip, State, Update
from gossip.swim import Swim
from mesh.errors import PeerError
from mesh.types import Load, NodeId
from tests.gossip.lab import Lab, alive, emitted, record, sends

KINDS = [*messages.DatagramMessage.__args__, *messages.StreamMessage.__args__]  # type: ignore[attr-defined]


def anything(kind: Any, rng: random.Random, depth: int = 0) -> Any:
    """A value that ``kind``'s bounds allow."""
    kind, low, high, longest = unwrap(kind)
    name = getattr(kind, "__origin__", kind)
    if isinstance(kind, type) and issubclass(kind, State):
        return rng.choice(list(State))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = msgspec.structs.fields(kind)
        return kind(**{field.name: anything(field.type, rng, depth + 1) for field in fields})
    if name is tuple:
        return tuple(anything(kind.__args__[0], rng, depth + 1) for _ in range(rng.randint(0, min(longest, 4))))
    if kind is bool:
        return rng.random() < 0.5
    if kind is int:
        return rng.choice([low, high, rng.randint(low, high), rng.randint(low, min(high, 20))])
    if kind is float:
        return rng.choice([0.0, -1.0, 1e300, float("nan"), float("inf"), 0.5])
    if kind is bytes:
        return rng.randbytes(rng.choice([8, 64, 512] if longest > 512 else [longest]))
    if kind is str or kind is NodeId:
        return rng.choice(["", "b", "c", "me", "stranger", "x" * min(longest, 60)])
    return rng.choice([None, anything(kind.__args__[0], rng, depth + 1)])  # an optional one


def unwrap(kind: Any) -> tuple[Any, int, int, int]:
    low, high, longest = 0, 2**40, 64
    if hasattr(kind, "__metadata__"):
        for meta in kind.__metadata__:
            low = meta.ge if meta.ge is not None else low
            high = meta.le if meta.le is not None else (meta.lt - 1 if meta.lt is not None else high)
            longest = meta.max_length or longest
        kind = kind.__origin__
    return kind, low, high, longest


def fill(kind: Any, rng: random.Random) -> Any:
    """A message that the codec lets through, with real records where there are some."""
    message = anything(kind, rng)
    if hasattr(message, "updates") and rng.random() < 0.5:
        claim = Update(rng.choice(list(State)), record(rng.choice(["b", "c", "me", "z"]), rng.randint(0, 30)), ())
        message = msgspec.structs.replace(message, updates=(claim,))
    codec: Any = STREAM_CODEC if isinstance(message, STREAM) else DATAGRAM_CODEC
    try:
        return codec.decode(codec.encode(message))
    except (AssertionError, PeerError):
        return None


@pytest.mark.parametrize("seed", range(5))
def test_no_message_raises_or_breaks_the_core(seed: int) -> None:
    rng = random.Random(seed)
    lab = Lab("b", "c")
    incarnation = lab.core.incarnation
    for _ in range(600):
        message = fill(rng.choice(KINDS), rng)
        if message is not None:
            lab.hears(message, rng.choice(["b", "c", "stranger"]))
        lab.effects.clear()
        lab.run(rng.choice([0.0, 0.0, 0.01, 1.0]))
        lab.core.members()
    assert lab.core.incarnation >= incarnation
    assert lab.core.deadline is not None
    forged = [info.node for info in lab.core.members() if info.node not in ("b", "c", "me", "z")]
    assert forged == []


def test_messages_in_ones_own_name_are_rejected() -> None:
    lab = Lab("b")
    assert emitted(lab.hears(Gossip(), "me"), "Rejected")


def test_what_is_no_message_is_rejected() -> None:
    lab = Lab("b")
    assert emitted(lab.hears(Load(), "b"), "Rejected")


def test_nobody_else_can_raise_an_incarnation() -> None:
    """A member cannot be forced up to an incarnation that it could not go above."""
    lab = Lab("b")
    forged = msgspec.structs.replace(record("me", 10), incarnation=2**62)
    effects = lab.told(Update(State.SUSPECT, forged, (NodeId("b"),)))
    assert emitted(effects, "Rejected")
    assert lab.core.incarnation == 10


def test_datagrams_stay_within_their_bound() -> None:
    lab = Lab(*[f"p{index}" for index in range(40)])
    for index in range(40):
        lab.told(alive(f"p{index}", 2, address="h" * 100), "p1")
    effects = lab.run(3.0)
    assert len(effects) > 50
    for _, message in sends(effects):
        if not isinstance(message, STREAM):
            assert len(DATAGRAM_CODEC.encode(message)) <= lab.config.datagram_bytes


def test_the_core_keeps_the_contract() -> None:
    """mesh.core.Core by structure: mypy proves the types, this the attributes."""
    lab = Lab("b")
    assert isinstance(lab.core, Swim)
    assert lab.core.deadline is not None
    early = lab.core.tick(lab.now)  # early and twice does no harm
    assert sends(early + lab.core.tick(lab.now), "PingReq") == []
