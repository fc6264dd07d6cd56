"""News waiting to be passed on: each piece is sent a bounded number of times, the least sent first, then the newest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Generic, TypeVar

from mesh.types import NodeId

T = TypeVar("T")


LOOKS_BEYOND = 16
"""News too large for the room that is left, before the search for smaller is given up."""


class BroadcastQueue(Generic[T]):
    """At most one piece of news per subject: what is newer about it replaces what waited."""

    def __init__(self, size: Callable[[Any], int], limit: int = 8_192) -> None:
        """``size``: encoded bytes of an item; ``limit``: subjects held, the most sent are dropped first."""
        self._size, self._limit = size, limit
        self._tiers: list[dict[NodeId, tuple[T, int]]] = [{}]
        """Tier i holds what was sent i times: subject -> (item, bytes), oldest first."""
        self._tier_of: dict[NodeId, int] = {}

    def __len__(self) -> int:
        return len(self._tier_of)

    def __bool__(self) -> bool:
        return bool(self._tier_of)

    def __contains__(self, subject: NodeId) -> bool:
        return subject in self._tier_of

    def add(self, subject: NodeId, item: T) -> None:
        self.drop(subject)
        if len(self._tier_of) >= self._limit:
            last = next(tier for tier in reversed(self._tiers) if tier)
            self.drop(next(iter(last)))
        self._tiers[0][subject] = (item, self._size(item))
        self._tier_of[subject] = 0

    def drop(self, subject: NodeId) -> None:
        tier = self._tier_of.pop(subject, None)
        if tier is not None:
            del self._tiers[tier][subject]

    def take(self, room: int, times: int, most: int = 64, skip: Collection[NodeId] = (), count: bool = True) -> list[T]:
        """Items that fit into ``room`` bytes, but for those of ``skip``; with ``count`` each is now sent once more, and
        gone after ``times``."""
        taken: list[tuple[NodeId, tuple[T, int]]] = []
        looks = LOOKS_BEYOND
        for subject, entry in self._in_order():
            if entry[1] > room:
                looks -= 1
            elif subject not in skip:
                taken.append((subject, entry))
                room -= entry[1]
            if room < 16 or len(taken) >= most or not looks:
                break
        for subject, entry in reversed(taken) if count else ():
            self._advance(subject, entry, times)
        return [entry[0] for _, entry in taken]

    def _in_order(self) -> Iterator[tuple[NodeId, tuple[T, int]]]:
        for tier in self._tiers:
            yield from reversed(tier.items())

    def _advance(self, subject: NodeId, entry: tuple[T, int], times: int) -> None:
        tier = self._tier_of.pop(subject)
        del self._tiers[tier][subject]
        if tier + 1 >= times:
            return
        while len(self._tiers) <= tier + 1:
            self._tiers.append({})
        self._tiers[tier + 1][subject] = entry
        self._tier_of[subject] = tier + 1
