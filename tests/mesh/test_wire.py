"""The one gate for bytes that others wrote."""

from __future__ import annotations

import random
import tracemalloc
from typing import Annotated

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip.messages import DATAGRAM_CODEC, STREAM_CODEC, Gossip, Ping
from mesh.errors import PeerError
from mesh.wire import Codec


class Number(msgspec.Struct, frozen=True, array_like=True, tag=1):
    value: Annotated[int, msgspec.Meta(ge=0, lt=100)]
    names: Annotated[tuple[str, ...], msgspec.Meta(max_length=3)] = ()


class Blob(msgspec.Struct, frozen=True, array_like=True, tag=2):
    data: Annotated[bytes, msgspec.Meta(max_length=16)] = b""


CODEC: Codec[Number | Blob] = Codec(Number | Blob, 64)


@pytest.mark.parametrize("message", [Number(0), Number(99, ("a", "b")), Blob(), Blob(b"x" * 16)])
def test_round_trip(message: Number | Blob) -> None:
    assert CODEC.decode(CODEC.encode(message)) == message
    assert CODEC.decode(memoryview(CODEC.encode(message))) == message


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("nothing", b""),
        ("reserved byte", b"\xc1"),
        ("no array", b"\x05"),
        ("unknown tag", b"\x92\x03\x01"),
        ("no tag", b"\x90"),
        ("tag of another type", b"\x92\xa1a\x01"),
        ("missing field", b"\x91\x01"),
        ("wrong type", b"\x92\x01\xa1a"),
        ("below its bound", b"\x92\x01\xff"),
        ("above its bound", b"\x92\x01\x64"),
        ("too many names", b"\x93\x01\x01\x94\xa1a\xa1b\xa1c\xa1d"),
        ("bytes too long", b"\x92\x02\xc4\x11" + bytes(17)),
        ("no UTF-8", b"\x93\x01\x01\x91\xa1\xff"),
        ("cut short", b"\x93\x01\x01"),
        ("trailing bytes", b"\x92\x01\x01\x00"),
        ("a string of 4 GB", b"\x93\x01\x01\x91\xdb\xff\xff\xff\xff"),
        ("an array of 4 G", b"\x93\x01\x01\xdd\xff\xff\xff\xff"),
        ("an unknown field of 4 G", b"\x94\x01\x01\x90\xdd\xff\xff\xff\xff"),
        ("a map of 4 G", b"\x94\x01\x01\x90\xdf\xff\xff\xff\xff"),
        ("an extension", b"\x92\x01\xc7\x03\x01abc"),
        ("not a number", b"\x92\x01\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00"),
        ("too long", b"\x92\x02\xc4\x10" + bytes(100)),
    ],
)
def test_garbage_is_a_peer_error(what: str, data: bytes) -> None:
    with pytest.raises(PeerError):
        CODEC.decode(data)


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1a", b"\x81\x91"])
def test_deep_nesting_is_a_peer_error(opener: bytes) -> None:
    for prefix in (b"", b"\x94\x01\x01\x90"):
        with pytest.raises(PeerError):
            STREAM_CODEC.decode(prefix + opener * 1_000_000)


def test_lengths_allocate_nothing() -> None:
    tracemalloc.start()
    for data in (b"\xdd\xff\xff\xff\xff", b"\x96\x01\x05\x00\x00\xdd\xff\xff\xff\xff", b"\x92\x10\xdd\x00\xff\xff\xff"):
        with pytest.raises(PeerError):
            STREAM_CODEC.decode(data)
        with pytest.raises(PeerError):
            DATAGRAM_CODEC.decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_message_of_the_other_class_is_refused() -> None:
    with pytest.raises(PeerError):
        STREAM_CODEC.decode(DATAGRAM_CODEC.encode(Ping(1)))


def test_an_own_message_that_is_too_long_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        CODEC.encode(Number(1, ("x" * 100,)))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_a_peer_error(data: bytes) -> None:
    for codec in (CODEC, DATAGRAM_CODEC, STREAM_CODEC):
        try:
            codec.decode(data)  # type: ignore[attr-defined]
        except PeerError:
            continue


def test_any_damage_to_a_real_message_decodes_or_is_a_peer_error() -> None:
    rng = random.Random(1)
    whole = bytearray(DATAGRAM_CODEC.encode(Gossip()) + b"")
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            DATAGRAM_CODEC.decode(data)
        except PeerError:
            continue
