"""The leader's bookkeeping: who answered, which learners are told, who carries; and the presets' ratios."""

from __future__ import annotations

import pytest

from mesh.election import config as configs
from mesh.election.config import ElectionConfig
from mesh.election.progress import Progress
from mesh.election.record import Content, RecordId
from mesh.election.spread import Spread
from mesh.election.voters import MemberInfo
from tests.mesh.election import lab
from tests.mesh.election.lab import Lab, m

R1, R2 = RecordId(1, 1), RecordId(1, 2)


# ---------------------------------------------------------------- progress


def test_only_exactly_the_record_counts() -> None:
    progress = Progress(0.0)
    progress.answered("b", R1, 1.0, 1.1)
    progress.answered("c", R2, 1.0, 1.1)
    assert progress.holders(R2) == ["c"]
    progress.answered("c", R1, 1.2, 1.3)  # a late answer does not take back
    assert progress.holders(R2) == ["c"]


@pytest.mark.parametrize(
    ("voters", "heard", "at"),
    [
        ("a", {}, float("inf")),
        ("ab", {"b": 3.0}, 3.0),
        ("abc", {"b": 3.0, "c": 5.0}, 5.0),
        ("abc", {"b": 3.0}, 3.0),
        ("abcd", {"b": 3.0, "c": 5.0, "d": 4.0}, 4.0),
        ("abcde", {"b": 3.0, "c": 5.0}, 3.0),
        ("abcde", {"b": 3.0}, 1.0),  # the rest counts from the start of the term
    ],
)
def test_majority_at(voters: str, heard: dict[str, float], at: float) -> None:
    progress = Progress(1.0)
    for voter, when in heard.items():
        progress.answered(voter, R1, when, 9.0)
    assert progress.majority_at(tuple(voters), "a") == at


@pytest.mark.parametrize("lie", [float("inf"), float("nan"), 1e300])
def test_a_voter_cannot_answer_from_the_future(lie: float) -> None:
    progress = Progress(1.0)
    progress.answered("b", R1, lie, 2.0)
    progress.answered("c", R1, 2.0, 2.0)
    assert not progress.majority_at(tuple("abc"), "a") > 2.0


def test_whole_records_are_sent_once_per_heartbeat() -> None:
    progress = Progress(0.0)
    assert [progress.send_whole("b", R1, t, 0.15) for t in (0.0, 0.1, 0.2)] == [True, False, True]
    assert progress.send_whole("b", R2, 0.2, 0.15)


# ---------------------------------------------------------------- learners


def test_messages_per_heartbeat_are_bounded_whatever_the_mesh() -> None:
    spread, learners = Spread(ElectionConfig(spread=16, beat=4)), [f"n{k:04}" for k in range(1000)]
    told: set[str] = set()
    for beat in range(63):
        chosen = spread.due(learners, R1, 0.15 * beat)
        assert len(chosen) <= 16
        for node in chosen:
            spread.acknowledged(node, R1, 0.15 * beat)
        told.update(chosen)
        assert len(spread.reminded(learners, R1)) <= 4
    assert len(told) == 1000
    assert spread.due(learners, R1, 20.0) == []


def test_reminders_go_round() -> None:
    spread, learners = Spread(ElectionConfig(beat=4)), list("bcdefghijk")
    for node in learners:
        spread.acknowledged(node, R1, 0.0)
    told = [node for _ in range(5) for node in spread.reminded(learners, R1)]
    assert sorted(told) == sorted(learners * 2)


def test_retries_back_off_and_begin_anew_after_an_answer() -> None:
    spread = Spread(ElectionConfig(heartbeat_s=1.0))
    sent = [t for t in range(20) if spread.due(["b"], R1, float(t))]
    assert sent == [0, 2, 6, 10, 14, 18]
    spread.acknowledged("b", R1, 20.0)
    assert spread.due(["b"], R2, 20.0) == ["b"]


def test_caught_up_is_a_matter_of_the_last_heartbeats() -> None:
    spread = Spread(ElectionConfig())
    spread.acknowledged("b", R1, 10.0)
    assert spread.caught_up("b", R1, 10.5)
    assert not spread.caught_up("b", R1, 10.7)
    assert not spread.caught_up("b", R2, 10.5)
    assert not spread.caught_up("c", R1, 10.5)


def test_a_large_mesh_learns_from_each_other() -> None:
    """The coordinator tells a few; everyone knows within two seconds."""
    names = [f"n{k:03}" for k in range(150)]
    mesh = Lab("abc", "abc", config=ElectionConfig(auto_voters=False, spread=4))
    for name in names:
        mesh.disks[name] = lab.disk(name)
    mesh.names += names
    for name in mesh.names:
        mesh.boot(name)
    leader = mesh.elect("a")
    mesh.run(5.0)
    mesh.carried.clear()
    mesh.do("a", lambda it, now: it.propose(now, Content(placement=b"x")))
    mesh.run(2.0)
    assert all(it.committed == leader.committed for it in mesh.cores.values())
    by_leader = sum(sender == "a" and isinstance(message, m.Announce) for sender, _, message in mesh.carried)
    assert by_leader < 2 * len(names)


def test_a_newcomer_is_added_as_voter_only_when_it_holds_the_record() -> None:
    """Two voters need both: one that does not answer would stop the mesh."""
    mesh = Lab("abc", "a", config=configs.lan())
    mesh.elect("a")
    mesh.drop = lambda sender, to, message: sender in "bc" and isinstance(message, m.Announced)
    mesh.run(20.0)
    assert mesh.cores["a"].record.voters == ("a",)
    mesh.drop = lambda sender, to, message: False
    mesh.run(2.0)
    assert mesh.cores["c"].committed.voters == ("a", "b", "c")


def test_an_unknown_voter_counts_as_dead() -> None:
    """A voter that gossip never names (its tombstone expired) is removed after a while."""
    mesh = Lab("abcd", "abc", config=configs.lan())
    mesh.elect("a")
    del mesh.cores["c"]
    for _ in range(20):
        mesh.run(1.0)
        for name in "abd":
            mesh.do(name, lambda it, now: it.note_members([MemberInfo(n, 0.0) for n in "abd"], now))
    assert mesh.cores["a"].committed.voters == ("a", "b", "d")


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", ["lan", "wan", "loopback"])
def test_presets_keep_the_ratios(name: str) -> None:
    config: ElectionConfig = getattr(configs, name)()
    assert config.check_quorum_s <= config.election_min_s < config.election_max_s
    assert config.heartbeat_s * 5 <= config.election_min_s
    assert config.relay_after_s + 2 * config.heartbeat_s < config.election_min_s


def test_the_wan_preset_is_five_times_the_lan() -> None:
    lan, wan = configs.lan(), configs.wan()
    for field in ("heartbeat_s", "election_min_s", "election_max_s", "check_quorum_s", "forget_jitter_s"):
        assert getattr(wan, field) == pytest.approx(5 * getattr(lan, field))
