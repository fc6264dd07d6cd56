"""Majorities, overlaps, ballots: tables."""

from __future__ import annotations

import itertools

import pytest

from mesh.election.quorum import Ballot, is_quorum, majority, one_step, overlaps


@pytest.mark.parametrize(("size", "needed"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (6, 4), (7, 4)])
def test_majority(size: int, needed: int) -> None:
    assert majority(size) == needed


@pytest.mark.parametrize(
    ("voters", "agreeing", "enough"),
    [
        ("", "", False),
        ("", "a", False),
        ("a", "a", True),
        ("ab", "a", False),
        ("ab", "ab", True),
        ("abc", "ab", True),
        ("abc", "aa", False),
        ("abc", "axy", False),
        ("abcd", "ab", False),
        ("abcd", "abd", True),
        ("abcde", "abxyz", False),
        ("abcde", "ace", True),
    ],
)
def test_is_quorum_counts_voters_not_responses(voters: str, agreeing: str, enough: bool) -> None:
    assert is_quorum(tuple(voters), list(agreeing)) is enough


def _overlap_by_trying(old: str, new: str) -> bool:
    sides = [[set(c) for c in itertools.combinations(s, majority(len(s)))] for s in (old, new)]
    return all(a & b for a in sides[0] for b in sides[1])


def test_overlaps_agrees_with_trying_all_majorities() -> None:
    subsets = ["".join(c) for size in range(1, 6) for c in itertools.combinations("abcdef", size)]
    for old, new in itertools.product(subsets, subsets):
        assert overlaps(old, new) == _overlap_by_trying(old, new), (old, new)


def test_one_step_always_overlaps() -> None:
    subsets = ["".join(c) for size in range(1, 7) for c in itertools.combinations("abcdefg", size)]
    steps = [(old, new) for old, new in itertools.product(subsets, subsets) if one_step(old, new)]
    assert len(steps) > 500
    assert all(overlaps(old, new) for old, new in steps)


@pytest.mark.parametrize(
    ("old", "new", "one"),
    [("abc", "abcd", True), ("abc", "ab", True), ("abc", "abc", True), ("abc", "abd", False), ("a", "abc", False)],
)
def test_one_step(old: str, new: str, one: bool) -> None:
    assert one_step(old, new) is one


@pytest.mark.parametrize(
    ("grants", "won"), [("", False), ("b", False), ("bb", False), ("xyz", False), ("bc", True), ("bxc", True)]
)
def test_a_ballot_counts_a_set_of_its_voters(grants: str, won: bool) -> None:
    ballot = Ballot(tuple("abcde"), "a")
    for voter in grants:
        ballot.grant(voter)
    assert ballot.won is won
