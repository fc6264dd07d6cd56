"""Whose room a session of a higher class is given, where there is none left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from mesh.pipeline import messages as m
from mesh.types import PRIORITIES, Priority


class Holder(Protocol):
    """A session at a hop."""

    open: m.Open
    room: int
    """Bytes of keys and values that are freed with it."""


def victims(holders: Mapping[m.SessionId, Holder], priority: Priority, lacking: int) -> list[m.SessionId]:
    """Sessions to park so that ``lacking`` bytes are free: the lowest class first, in it the youngest.

    ``holders``: oldest first.  Only classes below ``priority`` give way, and nobody does where all of them together
    would not be enough.
    """
    rank = PRIORITIES.index
    below = [
        session for session, holder in holders.items() if holder.room and rank(holder.open.priority) > rank(priority)
    ]
    below.reverse()
    below.sort(key=lambda session: -rank(holders[session].open.priority))
    chosen: list[m.SessionId] = []
    for session in below:
        if lacking <= 0:
            break
        chosen.append(session)
        lacking -= holders[session].room
    return chosen if lacking <= 0 else []
