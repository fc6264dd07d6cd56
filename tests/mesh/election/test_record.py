"""Records, ids, durable state: order, hashes, bytes on disk."""

from __future__ import annotations

import random

import msgspec
import pytest

from mesh.election import durable as d
from mesh.election.record import (
    EMPTY,
    MAX_TERM,
    ApiKey,
    Content,
    JoinToken,
    Record,
    RecordId,
    epoch_counter,
    flaw,
    make_epoch,
    make_record,
    restamp,
)
from mesh.errors import ConfigError

EPOCH = make_epoch(1, 7)
FULL = Content(
    placement_counter=3,
    placement=b"\x80",
    tombstones=("x",),
    tokens=(JoinToken("t1", b"\x01" * 32, 1e9, uses_left=1, created_by="a"),),
    api_keys=(ApiKey("k1", b"\x02" * 32, "infer", "laptop"),),
    ca_certificate=b"pem",
    sealed_ca=(("a", b"sealed"),),
    gossip_keys=(b"\x03" * 32,),
    models=(b"model",),
)


def test_ids_are_ordered_by_term_then_version() -> None:
    ids = [RecordId(0, 0), RecordId(1, 1), RecordId(1, 2), RecordId(1, 10), RecordId(2, 1), RecordId(10, 1)]
    assert sorted(ids, reverse=True) == ids[::-1]
    assert max(RecordId(1, 10), RecordId(2, 1)) == RecordId(2, 1)


def test_epochs_are_ordered_by_counter_and_differ() -> None:
    assert make_epoch(2, 0) > make_epoch(1, 2**32 - 1)
    assert make_epoch(2, 1) != make_epoch(2, 2)
    assert epoch_counter(make_epoch(5, 2**40 + 3)) == 5


def test_restamp_keeps_the_hash_and_the_placement_id() -> None:
    first = make_record(EPOCH, RecordId(1, 1), ("b", "a"), FULL)
    again = restamp(first, RecordId(2, 1))
    assert (again.hash, again.placement_id, again.voters) == (first.hash, first.placement_id, ("a", "b"))
    assert flaw(again) == ""


def test_the_hash_covers_voters_and_content() -> None:
    hashes = {
        make_record(EPOCH, RecordId(1, 1), tuple(voters), content).hash
        for voters in ("ab", "abc")
        for content in (FULL, Content(), Content(placement=b"x"), Content(models=(b"x",)))
    }
    assert len(hashes) == 8


GOOD = make_record(EPOCH, RecordId(1, 1), ("a", "b"), FULL)


@pytest.mark.parametrize(
    "bad",
    [
        EMPTY,
        msgspec.structs.replace(GOOD, voters=("b", "a")),
        msgspec.structs.replace(GOOD, voters=("a", "a", "b")),
        msgspec.structs.replace(GOOD, voters=("a", "c")),
        msgspec.structs.replace(GOOD, hash=b""),
        msgspec.structs.replace(GOOD, content=Content()),
        msgspec.structs.replace(GOOD, id=RecordId(0, 1)),
        msgspec.structs.replace(GOOD, id=RecordId(MAX_TERM + 1, 1)),
        msgspec.structs.replace(GOOD, id=RecordId(1, -1)),
        msgspec.structs.replace(GOOD, epoch=0),
    ],
)
def test_flaws(bad: Record) -> None:
    assert flaw(bad)


def test_founding() -> None:
    first = d.found("m" * 32, "a", FULL, random.Random(1))
    assert (first.term, first.voted_for, first.record.voters, first.committed_id) == (1, "a", ("a",), RecordId(1, 1))
    assert epoch_counter(first.epoch) == 1
    assert first.epoch != d.found("m" * 32, "a", FULL, random.Random(2)).epoch
    assert first.active_placement == (first.epoch, 3)


def test_newcomer() -> None:
    assert d.newcomer("m" * 32, "b").record == EMPTY
    told = d.newcomer("m" * 32, "b", GOOD)
    assert (told.epoch, told.term, told.voted_for, told.committed) == (EPOCH, 1, None, GOOD)


def test_durable_round_trip() -> None:
    state = d.Durable("m" * 32, EPOCH, "a", 4, "b", restamp(GOOD, RecordId(3, 2)), GOOD)
    assert d.decode(d.encode(state)) == state


@pytest.mark.parametrize("how", ["empty", "magic", "version", "cut", "flip", "tail"])
def test_a_damaged_file_is_never_guessed_at(how: str) -> None:
    data = bytearray(d.encode(d.newcomer("m" * 32, "a", GOOD)))
    if how == "empty":
        data.clear()
    elif how == "magic":
        data[0] ^= 1
    elif how == "version":
        data[7] += 1
    elif how == "cut":
        del data[-1]
    elif how == "flip":
        data[-1] ^= 1
    else:
        data += b"x"
    with pytest.raises(ConfigError):
        d.decode(bytes(data))
