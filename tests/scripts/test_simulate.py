"""What the simulation scripts count, and what they say of a schedule that breaks a property."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from scripts.figures import nearest_rank, spread
from scripts.simulation import election, gossip
from scripts.simulation.soak import Soak, disjoint, summed
from scripts.simulation.soak import figures as soak
from scripts.simulation.tally import Tally
from tests.sim.election_bag import Bag, story
from tests.sim.election_mutants import CountsOutsiders


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2.0), (0.99, 4.0), (0.25, 1.0), (0.0, 1.0), (1.0, 4.0)])
def test_nearest_rank(share: float, expected: float) -> None:
    assert nearest_rank([4.0, 2.0, 1.0, 3.0], share) == expected


def test_a_spread_holds_when_both_goals_do() -> None:
    assert spread([1.0, 2.0, 3.0], 2.0, 3.0)["holds"]
    assert not spread([1.0, 2.0, 3.0], 1.9, 3.0)["holds"]
    assert not spread([1.0, 2.0, math.inf], 2.0, 3.0)["holds"]
    assert not spread([], 2.0, 3.0)["holds"]
    assert spread([1.0], None, 3.0)["goal"] == "p99 <= 3 s"


def test_a_violation_is_told_and_can_be_replayed() -> None:
    def play(seed: int) -> dict[str, int]:
        try:
            return Bag(seed, make=CountsOutsiders).run().counts
        except AssertionError as violation:
            violation.add_note(story(seed, make=CountsOutsiders))
            raise

    said: list[str] = []
    runs = Tally("election --schedules 0", play, "--bag").run(range(60), said.append)
    assert runs.schedules == 60
    assert runs.violations == len(runs.failed) > 0
    assert f"again: scripts/simulate election --schedules 0 --bag 1 --seed {runs.failed[0]}" in "\n".join(said)
    assert "AskPreVote" in said[0]  # the last events
    assert not election.q15(runs, runs)["holds"]


def test_a_soak_ends_in_time_and_says_what_it_covered() -> None:
    figures = soak(0.01, 5, lambda line: None)
    assert figures["Q15"]["value"]["message_bag"] > 0
    assert figures["Q15"]["value"]["violations"] == 0
    assert figures["Q15"]["coverage"]["message_bag"]["elections"] > 0


def test_a_soak_goes_on_where_it_ended_and_its_tallies_add_up(tmp_path: Path) -> None:
    for process in (0, 0, 1):
        one = Soak(process, 5, ["bag"], tmp_path)
        for _ in range(3):
            one.tallies["bag"].one(one.kept["bag"].next, lambda line: None)
            one.kept["bag"].next += 1
        one.keep()
    figures = summed(tmp_path)
    assert figures["Q15"]["value"] == {"violations": 0, "timed": 0, "message_bag": 9}
    assert figures["seeds"]["value"] == {"bag": [(5, 11), (5 + 10**9, 8 + 10**9)]}
    want = Counter[str]()
    for seed in (*range(5, 11), *range(5 + 10**9, 8 + 10**9)):
        want.update(Bag(seed).run().counts)
    assert {name: figures["Q15"]["coverage"]["message_bag"][name] for name in want} == dict(want)


def test_no_seed_is_counted_twice() -> None:
    with pytest.raises(AssertionError, match="counted twice"):
        disjoint([(1, 5), (4, 9)])


def test_failovers_are_told_with_their_tail() -> None:
    found = election.failovers(1, 2, lambda line: None)
    assert set(found) == {f"{name}_{size}" for name in election.FAILOVERS for size in (3, 5)}
    assert all(figure["holds"] and figure["value"]["n"] == 2 for figure in found.values())


def test_crashes_are_timed_from_the_outside() -> None:
    runs = gossip.Runs(20, "lan", compare=True, seed=3, count=2, minutes=1.0)
    figure = runs.q1()
    assert figure["holds"]
    assert figure["value"]["n"] == 2
    assert figure["first_suspect"]["median"] < figure["value"]["median"]
    assert figure["anchor"]["memberlist preset, same run"]["median"] > figure["value"]["median"]
