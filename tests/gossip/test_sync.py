"""Comparing tables: what is asked, what is told, how often."""

from __future__ import annotations

import random

import pytest

from gossip.config import GossipConfig
from gossip.members import bucket_of
from gossip.messages import BUCKETS, STREAM_CODEC, Buckets, Root, SyncRow, SyncRows, Version
from gossip.sync import ROWS_PER_MESSAGE, Pace, from_mask, tell, to_mask
from mesh.types import NodeId
from tests.gossip.lab import Lab, alive, dead, emitted, sends, suspect


def two(*names: str) -> tuple[Lab, Lab]:
    """Two cores that know ``names`` and each other by the names b and me."""
    return Lab("b", *names), Lab("b", *names, seed=2)


@pytest.mark.parametrize("buckets", [[], [0], [63], [0, 7, 8, 63], list(range(64))])
def test_masks(buckets: list[int]) -> None:
    assert from_mask(to_mask(buckets)) == buckets
    assert len(to_mask(buckets)) == 8


def test_equal_tables_say_nothing() -> None:
    one, other = two("c", "d")
    assert sends(one.hears(Root(other.core.roster.members.root()), "b")) == []


def test_only_differing_buckets_are_sent() -> None:
    one, other = two("c", "d", "e")
    other.told(alive("c", 5), "c")
    ((_, buckets),) = sends(one.hears(Root(other.core.roster.members.root()), "b"))
    ((_, rows),) = sends(other.hears(buckets, "b"))
    assert from_mask(rows.mask) == [bucket_of(NodeId("c"))]
    assert rows.answer
    one.hears(rows, "b")
    assert one.incarnation("c") == 5
    assert one.core.roster.members.root() == other.core.roster.members.root()


def test_the_answer_holds_only_what_still_differs() -> None:
    one, other = two("c", "d")
    one.told(alive("c", 5), "c")
    ((_, rows),) = sends(other.hears(Buckets(one.core.roster.members.hashes()), "b"))
    answers = [message for _, message in sends(one.hears(rows, "b"), "SyncRows")]
    assert [[row.update.record.node for row in answer.rows] for answer in answers] == [["c"]]
    assert not answers[0].answer
    other.hears(answers[0], "b")
    assert other.incarnation("c") == 5


def test_both_sides_learn_in_one_exchange() -> None:
    one, other = two(*"cdefgh")
    one.told(alive("c", 5), "c")
    other.told(alive("d", 6), "d")
    one.told(suspect("e"), "d")
    other.told(dead("f"), "d")
    ((_, rows),) = sends(other.hears(Buckets(one.core.roster.members.hashes()), "b"))
    for answer in sends(one.hears(rows, "b"), "SyncRows"):
        other.hears(answer[1], "b")
    for lab in (one, other):
        assert (lab.incarnation("c"), lab.incarnation("d"), lab.state("e")) == (5, 6, "suspect")
    assert (one.state("f"), other.state("f")) == ("suspect", "dead")


def test_versions_are_compared_and_pulled_from_who_has_them() -> None:
    lab = Lab("b", "c")
    mask = to_mask([bucket_of(NodeId("c"))])
    lab.hears(SyncRows(mask, (SyncRow(alive("c"), version=7),), False), "b")
    ((to, want),) = sends(lab.run(0.0), "Want")
    assert (to, want.nodes) == ("b", ("c",))


def test_large_tables_are_told_in_messages_of_whole_buckets_that_fit() -> None:
    lab = Lab(*[f"p{index}" for index in range(2500)])
    messages = tell(lab.core.roster.members, list(range(BUCKETS)), lab.now, answer=True)
    assert len(messages) >= 4
    assert sum(len(message.rows) for message in messages) == 2501
    assert sorted(index for message in messages for index in from_mask(message.mask)) == list(range(BUCKETS))
    for message in messages:
        assert len(message.rows) < ROWS_PER_MESSAGE + 200
        assert len(STREAM_CODEC.encode(message)) < 400_000


def test_a_row_with_age_of_the_living_is_rejected() -> None:
    lab = Lab("b")
    mask = to_mask([bucket_of(NodeId("c"))])
    assert emitted(lab.hears(SyncRows(mask, (SyncRow(alive("c"), 0, 5),), False), "b"), "Rejected")


def test_the_pace_slows_down_and_quickens_with_news() -> None:
    pace = Pace(GossipConfig(), random.Random(1))
    waits = [pace.next(0.0) for _ in range(6)]
    assert 0.8 <= waits[0] <= 1.2
    assert waits[:4] == sorted(waits[:4])
    assert 8.0 <= waits[-1] <= 12.0
    assert not pace.found(1)
    assert 8.0 <= pace.next(0.0) <= 12.0
    assert pace.found(50)
    assert pace.next(0.0) <= 1.2


def test_one_comparison_in_ten_seconds_when_idle() -> None:
    lab = Lab("b", "c")
    lab.core.prober.stop()  # the puppets would be dead soon
    lab.run(30.0)
    roots = sends(lab.run(100.0), "Root")
    assert 8 <= len(roots) <= 12
    assert {to for to, _ in roots} == {"b", "c"}


def test_an_own_profile_of_an_earlier_life_is_outranked() -> None:
    from mesh.types import NodeProfile

    lab = Lab("b")
    lab.did(lab.core.set_profile(NodeProfile(name="me"), lab.now))
    mask = to_mask([bucket_of(NodeId("me"))])
    own = lab.core.roster.own.update()
    lab.hears(SyncRows(mask, (SyncRow(own, version=900),), False), "b")
    assert lab.core.exchange.profiles.version(NodeId("me")) == 901
    assert Version(NodeId("me"), 901) in lab.core.exchange.news.take(1000, 1)
