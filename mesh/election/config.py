"""Timers of the election, in seconds.  Each preset keeps the ratios that the rules rest on."""

from __future__ import annotations

import msgspec


class ElectionConfig(msgspec.Struct, frozen=True):
    """``check_quorum_s <= election_min_s``: an isolated leader steps down before its followers may elect another."""

    heartbeat_s: float = 0.150
    """Between two rounds of Append; also between two sends of an unanswered request."""
    election_min_s: float = 1.0
    """Silence of the leader after which a voter may campaign; PreVotes are refused for as long (R3)."""
    election_max_s: float = 2.0
    """Time-outs are uniform in [min, max): two voters seldom wake together."""
    check_quorum_s: float = 1.0
    """A leader without acknowledgements from a majority for so long steps down (R7)."""
    forget_jitter_s: float = 0.150
    """After the loss of the leader was *seen* (R8), a PreVote starts within so long."""
    yield_s: float = 0.300
    """A voter that would vote for another, or that is ailing, lets others go first for so long, once per time-out."""
    relay_after_s: float = 0.300
    """A voter that left a request unanswered for so long is asked through a neighbour as well."""
    eligible_after_s: float = 10.0
    """Alive without suspicion for so long makes a member eligible as voter: strangers come and go."""
    dead_after_s: float = 15.0
    """A voter dead for so long is removed: longer than a restart takes."""
    step_s: float = 5.0
    """At most one change of voters in so long, except to leave an even size."""
    spread: int = 16
    """Learners that are sent a new record per heartbeat, at most."""
    beat: int = 4
    """Learners that are told per heartbeat who leads, at most: flat in the number of members."""
    gossip: int = 3
    """Members to which a learner passes on the id of a new record."""
    auto_voters: bool = True
    """Change voters by ``voters.next_voters``; False: only by ``propose``."""


def lan() -> ElectionConfig:
    return ElectionConfig()


def wan() -> ElectionConfig:
    """Timers of the protocol x5, for round trips of up to half a second."""
    return ElectionConfig(
        heartbeat_s=0.75,
        election_min_s=5.0,
        election_max_s=10.0,
        check_quorum_s=5.0,
        forget_jitter_s=0.75,
        yield_s=1.5,
        relay_after_s=1.5,
    )


def loopback() -> ElectionConfig:
    """One machine: members are started by hand, so that they are trusted as voters soon."""
    return ElectionConfig(eligible_after_s=3.0, step_s=1.0)
