"""What people are told of the election: what the mesh cannot do now, what just happened, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mesh.election.events import BecameLeader, LeaderIs, LeaderLost, SteppedDown
from mesh.types import NodeId

NO_COORDINATOR = (
    "no coordinator is known: a majority of the voters cannot be reached. What is placed is served; "
    "nobody is admitted and nothing is placed anew. If they are gone for good: python -m node takeover"
)
TAKEN_OVER = (
    "somebody took the mesh over while this node was away or cut off. It goes on as a member under the new epoch; what "
    "was decided on its side meanwhile is dropped: make tokens, keys and models of that time again"
)


def failover_gap(voters: int, living_voters: int, members: int) -> str:
    """Why no other coordinator could be elected if this one were lost now; empty: one could, or nobody is left to.

    ``members``: all that live, whether they vote or not.
    """
    if members < 2 or living_voters - 1 > voters // 2:
        return ""
    if voters == 1 and members == 2:
        return (
            "two nodes cannot elect: one of them votes. If it is lost the other serves what is placed, until a person "
            "starts anew there with: python -m node takeover. A third node (--role witness will do) mends this"
        )
    if voters == 1:
        return "one node votes as yet; two more will, once they have been here for some seconds"
    return (
        f"{living_voters} of {voters} voters are here: if one more is lost nobody can be elected. A lost voter is "
        "replaced while a majority is here and other members live"
    )


def nobody_answers(seeds: tuple[str, ...]) -> str:
    """For a node that came back and finds nobody where they were."""
    return (
        f"no member answers at {', '.join(seeds)}. Start one of them; if all have moved, start this node again with "
        "its data folder and a new token: python -m node join TOKEN"
    )


def log_election(log: Any, event: Any, name_of: Callable[[NodeId], str]) -> None:
    """One line for each change of coordinator, as this node sees it."""
    if isinstance(event, BecameLeader):
        log.info("coordinator here", term=event.term)
    elif isinstance(event, SteppedDown):
        log.warning("no longer coordinator", term=event.term, why=event.why)
    elif isinstance(event, LeaderIs):
        log.info("coordinator", node=name_of(event.node), term=event.term)
    elif isinstance(event, LeaderLost):
        log.warning("coordinator lost", node=name_of(event.node))
