"""Nodes with one known mistake each: the checkers must see what it leads to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from mesh.core import Effect
from mesh.pipeline import messages as m
from mesh.pipeline.checkpoints import Checkpoints, Segment
from mesh.pipeline.journal import JournalConfig
from mesh.pipeline.keeping import Keeper
from mesh.pipeline.preemption import Holder
from mesh.pipeline.prefix import Prefix
from mesh.pipeline.session import Session
from mesh.pipeline.stage import StageConfig, StageCore
from mesh.pipeline.work import Forget, Unspill
from mesh.types import Priority
from tests.sim.generation import Peer


def _as_if(message: Any, epoch: m.Epoch) -> Any:
    return msgspec.structs.replace(message, epoch=epoch)


class OlderEpochsObeyed(StageCore):
    """The epoch is ignored: late frames of an older route are applied."""

    def receive(self, message: m.ToStage, sender: str, now: float) -> list[Effect]:
        known = None if isinstance(message, m.Lease) else self._known(message.session)
        if isinstance(message, m.Forward | m.Feed | m.Gap) and known is not None and message.epoch < known:
            message = _as_if(message, known)
        return super().receive(message, sender, now)


class NewerEpochsObeyed(StageCore):
    """Frames that overtook their Open are applied to what the older epoch left."""

    def receive(self, message: m.ToStage, sender: str, now: float) -> list[Effect]:
        known = None if isinstance(message, m.Lease) else self._known(message.session)
        if isinstance(message, m.Forward | m.Feed | m.Gap) and known is not None and message.epoch > known:
            message = _as_if(message, known)
        return super().receive(message, sender, now)


class OwnerNotInEpoch(StageCore):
    """Two claims with the same counter are taken for one route."""

    def receive(self, message: m.ToStage, sender: str, now: float) -> list[Effect]:
        known = None if isinstance(message, m.Lease) else self._known(message.session)
        if known is not None and not isinstance(message, m.Lease) and message.epoch[0] == known[0]:
            message = _as_if(message, known)
        return super().receive(message, sender, now)

    def _fault_of(self, message: m.Open, sender: str) -> str:
        fault = super()._fault_of(message, sender)
        return "" if "another owner" in fault else fault


class Untrimmed(Checkpoints):
    """Keeps what was rolled back: positions that were never accepted are replayed."""

    def cut(self, length: int) -> None:
        return None

    def append(self, segment: Segment) -> None:
        if segment.end > self.end:
            super().append(segment.slice(max(segment.start, self.end), segment.end))


class Shifted(Checkpoints):
    """Replays the rows of the positions before those that were asked for."""

    def read(self, first: int) -> list[Segment]:
        pieces = super().read(max(self.start, first - 1))
        if first == self.start or self.end - first < 2:
            return super().read(first)
        return [Segment(piece.start + 1, piece.n, piece.payload) for piece in pieces]


class UntrimmedOnDisk(Untrimmed):
    """Trims what is in memory, and keeps what was rolled back on the disk."""

    def cut(self, length: int) -> None:
        Checkpoints.cut(self, max(length, self.warm))


class AnyPiece(StageCore):
    """What the disk answers is taken for what is wanted by now."""

    def unspilled(self, ask: Unspill, payload: memoryview | None) -> list[Effect]:
        hop = self._sessions.get(ask.session)
        if hop is not None and hop.reading and ask.then is None:
            ask = msgspec.structs.replace(ask, number=hop.reading)
        return super().unspilled(ask, payload)


class Hoarding(Keeper):
    """The disk is never told of what nobody holds any more."""

    def fit(self, boundaries: Iterable[Checkpoints]) -> list[Effect]:
        effects = super().fit(boundaries)
        return [effect for effect in effects if not isinstance(effect.event, Forget)]  # type: ignore[union-attr]


class Deaf(StageCore):
    """Every Release is lost, and leases never run out."""

    def __init__(self, me: str, config: StageConfig) -> None:
        super().__init__(me, msgspec.structs.replace(config, lease_s=1e9, journal=JournalConfig(lease_s=1e9)))

    def receive(self, message: m.ToStage, sender: str, now: float) -> list[Effect]:
        return [] if isinstance(message, m.Release) else super().receive(message, sender, now)


class Hasty(Session):
    """Shows a token as soon as it has it."""

    @property
    def _keeper(self) -> int | None:
        return None


class HeedlessClaim(StageCore):
    """Follows a claim that lacks tokens."""

    def _on_open(self, message: m.Open, sender: str, now: float) -> list[Effect]:
        journal = self.journals.get(message.session)
        if journal is not None and journal.has_more(message) and message.epoch > journal.epoch:
            journal.tokens = journal.tokens[: message.accepted]
        return super()._on_open(message, sender, now)


class Hollow(Prefix):
    """A hit without its checkpoints."""

    def take(self, most: int) -> list[Effect]:
        effects = super().take(most)
        if self._checkpoints is not None:
            self._checkpoints.drop()
        return effects


def unchained(tokens: Sequence[int], size: int, *sharers: str) -> tuple[bytes, ...]:
    """Pages are named by their own tokens alone."""
    return tuple(repr(tokens[end - size : end]).encode() for end in range(size, len(tokens) + 1, size))


def anybody_gives_way(holders: Mapping[str, Holder], priority: Priority, lacking: int) -> list[str]:
    """Classes are ignored where room is short: the youngest session is parked for any other."""
    found = [session for session, holder in holders.items() if holder.room]
    return found[-lacking:]


class PagesOfAnyEpoch(StageCore):
    """What was shipped counts whatever became of the epoch since."""

    def _on_open(self, message: m.Open, sender: str, now: float) -> list[Effect]:
        arrival = self.arrivals._arrivals.get(message.session)
        if arrival is not None:
            message = msgspec.structs.replace(message, shipped=(arrival.prepare.epoch, message.accepted))
        return super()._on_open(message, sender, now)


class MoreThanArrived(StageCore):
    """A successor counts what the owner accepted, not what came."""

    def _on_open(self, message: m.Open, sender: str, now: float) -> list[Effect]:
        arrival = self.arrivals._arrivals.get(message.session)
        if arrival is not None and arrival.have:
            arrival.have = message.accepted
            arrival.checkpoints.skip(arrival.have)
        return super()._on_open(message, sender, now)


class PiecesUnchecked(StageCore):
    """The next piece is taken for the next one, wherever it begins."""

    def receive(self, message: m.ToStage, sender: str, now: float) -> list[Effect]:
        arrival = self.arrivals._arrivals.get(message.session) if isinstance(message, m.Pages) else None
        if arrival is not None:
            message = msgspec.structs.replace(message, start=arrival.have, rows=memoryview(b""))
        return super().receive(message, sender, now)


def peer_with(stage: type[StageCore] = StageCore, session: type[Session] = Session) -> type[Peer]:
    return type("Mutant", (Peer,), {"stage_type": stage, "session_type": session})
