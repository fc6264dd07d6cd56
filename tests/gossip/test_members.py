"""The rules of merging as a table, the probe order, the digests."""

from __future__ import annotations

import itertools
import random

import pytest

from gossip import roster
from gossip.members import Member, Members, bucket_of, decide, says_nothing_new
from gossip.messages import BUCKETS, State
from mesh.types import NodeId
from tests.gossip.lab import Lab, record, said

A, S, D, L = State.ALIVE, State.SUSPECT, State.DEAD, State.LEFT


@pytest.mark.parametrize(
    ("held", "said", "step", "synced", "then"),
    [
        *[(None, said, 0, synced, said) for said in State for synced in (False, True)],
        *[(held, said, -1, synced, None) for held in State for said in State for synced in (False, True)],
        # at the same incarnation the larger state wins
        *[(held, said, 0, False, max(held, said)) for held in State for said in State],
        (A, D, 0, True, S),
        (S, D, 0, True, S),
        (D, D, 0, True, D),
        (D, A, 0, True, D),
        (L, A, 0, True, L),
        # a larger incarnation is another life
        *[(held, said, +1, False, said) for held in State for said in State],
        (A, D, +1, True, S),
        (S, D, +1, True, S),
        (D, D, +1, True, D),
        (L, D, +1, True, S),
        (D, A, +1, True, A),
        (D, S, +1, True, S),
        (A, L, +1, True, L),
    ],
)
def test_decide(held: State | None, said: State, step: int, synced: bool, then: State | None) -> None:
    assert decide(held, 5, said, 5 + step, synced) is then


@pytest.mark.parametrize("synced", [False, True])
def test_only_a_larger_incarnation_brings_the_dead_back(synced: bool) -> None:
    for told in State:
        for step in (-1, 0):
            assert decide(D, 5, told, 5 + step, synced) in (None, D, L)


def members(*names: str, seed: int = 1) -> Members:
    table = Members(NodeId("me"), random.Random(seed))
    for name in names:
        add(table, name)
    return table


def add(table: Members, name: str, incarnation: int = 1, state: State = A) -> Member:
    member = Member(record(name, incarnation), state, 0.0)
    table.put(member)
    table.track(member, was_present=False)
    return member


def bury(table: Members, name: str) -> None:
    member = table.get(NodeId(name))
    assert member is not None
    member.state = D
    table.put(member)
    table.track(member, was_present=True)


def test_each_member_is_probed_once_before_any_is_repeated() -> None:
    table = members(*"abcdefgh")
    for _ in range(5):
        assert sorted(table.next_to_probe() or "" for _ in range(8)) == list("abcdefgh")


def test_the_order_of_probing_changes_from_round_to_round() -> None:
    table = members(*"abcdefgh")
    rounds = {tuple(table.next_to_probe() or "" for _ in range(8)) for _ in range(6)}
    assert len(rounds) > 3


def test_a_newcomer_is_probed_within_the_round_and_nobody_is_skipped() -> None:
    table = members(*"abcd")
    seen = [table.next_to_probe() for _ in range(2)]
    add(table, "e")
    seen += [table.next_to_probe() for _ in range(3)]
    assert sorted(seen) == list("abcde")


def test_a_death_skips_nobody() -> None:
    table = members(*"abcde")
    seen = [table.next_to_probe() for _ in range(2)]
    bury(table, seen[0])
    seen += [table.next_to_probe() for _ in range(3)]
    assert sorted(seen) == list("abcde")


def test_nobody_to_probe() -> None:
    assert members().next_to_probe() is None
    assert members().n == 1


def test_k_random_nodes() -> None:
    table = members(*"abcdef")
    drawn = [tuple(table.sample(3, exclude=NodeId("a"))) for _ in range(50)]
    assert all(len(set(names)) == 3 and "a" not in names for names in drawn)
    assert len(set(drawn)) > 10
    assert sorted(table.sample(10)) == list("abcdef")


def test_equal_tables_have_equal_digests_whatever_their_history() -> None:
    one, other = members(*"abc"), members(*"cab", seed=2)
    assert one.root() == other.root()
    bury(one, "b")
    assert one.root() != other.root()
    assert [i for i in range(BUCKETS) if one.hashes()[8 * i : 8 * i + 8] != other.hashes()[8 * i : 8 * i + 8]] == [
        bucket_of(NodeId("b"))
    ]
    bury(other, "b")
    assert one.root() == other.root()


def test_forgetting_takes_a_member_out_of_the_digest() -> None:
    one, other = members(*"ab"), members("a")
    bury(one, "b")
    one.forget(NodeId("b"))
    assert one.root() == other.root()
    assert len(one) == 1


def test_digests_see_profiles() -> None:
    one, other = members("a"), members("a")
    member = one.get(NodeId("a"))
    assert member is not None
    member.version = 7
    one.put(member)
    assert one.root() != other.root()


@pytest.mark.parametrize("held_state", list(State))
@pytest.mark.parametrize("said_state", list(State))
@pytest.mark.parametrize("incarnation", [4, 5, 6])
def test_a_claim_that_says_nothing_new_changes_nothing(
    held_state: State, said_state: State, incarnation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short way of ``Roster.apply`` agrees with the long one."""
    monkeypatch.setattr(roster, "says_nothing_new", lambda *args: False)
    gone = (held_state is State.LEFT, said_state is State.LEFT)
    for held_by, said_by in itertools.product(
        [(), ("a",), ("a", "b"), tuple("abcd")], [(), ("a",), ("c",), tuple("ba")]
    ):
        lab = Lab("a", "b", "c")
        held = said(held_state, "x", 5, held_by, left=gone[0])
        lab.told(held, "a")
        member = lab.core.roster.members.get(NodeId("x"))
        assert member is not None
        claim = said(said_state, "x", incarnation, said_by, left=gone[1])
        short = says_nothing_new(member, claim, NodeId("c"))
        before = (member.state, member.record, member.accusers)
        lab.told(claim, "c")
        changed = before != (member.state, member.record, member.accusers)
        assert not (short and changed), (held, claim)
