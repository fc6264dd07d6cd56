"""The policy of voters: a table of meshes and the step that each should take."""

from __future__ import annotations

import pytest

from mesh.election.config import lan
from mesh.election.voters import MemberInfo, next_voters, target

NOW = 1000.0


def members(text: str) -> list[MemberInfo]:
    """``a b! c? d+20 e@rack1``: alive long; ``!S`` dead for S s (20), ``?`` suspected, ``+S`` alive for S s only."""
    found = []
    for word in text.split():
        word, _, domain = word.partition("@")
        name = word[0]
        since, dead = NOW - 500.0, None
        if "?" in word:
            since = None
        elif "!" in word:
            since, dead = None, NOW - float(word[2:] or 20.0)
        elif "+" in word:
            since = NOW - float(word[2:])
        found.append(MemberInfo(name, since, dead, domain, can_vote="-" not in word))
    return found


@pytest.mark.parametrize(("live", "voters"), [(1, 1), (2, 1), (3, 3), (4, 3), (6, 3), (7, 5), (8, 5), (1000, 5)])
def test_target(live: int, voters: int) -> None:
    assert target(live) == voters


@pytest.mark.parametrize(
    ("voters", "mesh", "step"),
    [
        # growth
        ("a", "a", None),
        ("a", "a b", None),
        ("a", "a b c", "ab"),
        ("ab", "a b c", "abc"),
        ("a", "a b c+5", None),  # not enough are eligible to reach three
        ("a", "a b c+10", "ab"),
        ("a", "a b c?", None),
        ("a", "a b- c d", "ac"),  # b cannot vote
        ("abc", "a b c d e f", None),
        ("abc", "a b c d e f g", "abcd"),
        ("abcd", "a b c d e f g", "abcde"),
        ("abc", "a b c d e+3 f+3 g+3", None),
        # even sizes are left at once: forward if possible, else back
        ("ab", "a b", "a"),
        ("ab", "a b c+5", "a"),
        ("abcd", "a b c d", "abc"),
        ("abcd", "a b c d?", "abc"),
        ("abcd", "a b? c d", "acd"),
        # the dead
        ("abc", "a b c!10", None),
        ("abc", "a b c!15", "ab"),
        ("abc", "a b c!20 d", "ab"),  # remove first ...
        ("ab", "a b c!20 d", "abd"),  # ... then add
        ("abc", "a b!20 c!20", None),  # no majority of the rest lives
        ("abcde", "a b c d!20 e!30", "abcd"),  # the longest dead first
        ("abcd", "a b c d!20", "abc"),
        ("abc", "a b c?", None),  # a suspect is not dead
        # sticky
        ("abcde", "a b c d e", None),
        ("abcde", "a b c d e f", None),
        ("cde", "a b c d e", None),
    ],
)
def test_next_voters(voters: str, mesh: str, step: str | None) -> None:
    leader = voters[0]
    found = next_voters(tuple(voters), members(mesh), leader, NOW, lan())
    assert found == (None if step is None else tuple(step))


@pytest.mark.parametrize(
    ("voters", "mesh", "step"), [("a", "a b c", None), ("abc", "a b c!20", None), ("ab", "a b c", "abc")]
)
def test_one_step_per_five_seconds_unless_the_size_is_even(voters: str, mesh: str, step: str | None) -> None:
    found = next_voters(tuple(voters), members(mesh), "a", NOW, lan(), last_step=NOW - 4.9)
    assert found == (None if step is None else tuple(step))


@pytest.mark.parametrize(
    ("voters", "mesh", "step"),
    [
        ("a", "a@x b@x c@x d@y", "ad"),  # another domain than the voters'
        ("ad", "a@x b@x c@x d@y e@z", "ade"),
        ("ad", "a@x b+50@y c+90@x d@y", "acd"),  # none is new: equally crowded, the longest alive
        ("a", "a b+90 c+50 d+70", "ab"),  # domains unknown
        ("abcd", "a@x b@y c@z d@z", "abc"),  # of a crowded domain the last goes
    ],
)
def test_failure_domains(voters: str, mesh: str, step: str) -> None:
    assert next_voters(tuple(voters), members(mesh), "a", NOW, lan()) == tuple(step)


@pytest.mark.parametrize("leader", list("abcd"))
def test_the_leader_is_never_demoted(leader: str) -> None:
    voters = next_voters(tuple("abcd"), members("a b c d"), leader, NOW, lan())
    assert voters is not None
    assert leader in voters


@pytest.mark.parametrize(
    ("voters", "leaving", "mesh", "step"),
    [
        ("abc", "c", "a b c d", "abcd"),  # a substitute first ...
        ("abcd", "c", "a b c d", "abd"),  # ... then it goes
        ("abc", "c", "a b c", "ab"),  # nobody can stand in: the mesh of two needs one voter
        ("ab", "b", "a b", "a"),
        ("abc", "a", "a b c d", "abcd"),  # the leader leaves: a substitute ...
        ("abcd", "a", "a b c d", None),  # ... then it hands over (not this function's part)
        ("a", "a", "a b+1", "ab"),  # the only voter of two: the other must do, however young
        ("ab", "a", "a b+1", None),
        ("a", "a", "a", None),
    ],
)
def test_leavers_are_replaced(voters: str, leaving: str, mesh: str, step: str | None) -> None:
    found = next_voters(tuple(voters), members(mesh), "a", NOW, lan(), leaving=tuple(leaving))
    assert found == (None if step is None else tuple(step))


@pytest.mark.parametrize("size", range(1, 12))
def test_the_policy_comes_to_rest_at_the_target(size: int) -> None:
    """From one voter, step by step, to the target and no further; each step changes one."""
    names = "abcdefghijkl"[:size]
    voters: tuple[str, ...] = ("a",)
    for _ in range(10):
        after = next_voters(voters, members(" ".join(names)), "a", NOW, lan())
        if after is None:
            break
        assert len(set(after) ^ set(voters)) == 1
        voters = after
    assert len(voters) == target(size)
