"""The Master role: watches the view and re-plans which node holds which layers, when that is worth a commit.

Runs on every node and acts on the one that leads.  From the view and the record it computes the next act; it does not
remember what it was doing, so that a new coordinator goes on where the old one was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from mesh.errors import MeshError, PeerError
from mesh.placement import Placement, place, survivability
from mesh.types import NodeId
from mesh.view import MeshView
from node.identity import SealKey
from node.record import RecordKeeper, models_of
from node.telemetry import get_logger

MAX_SEALED = 7
"""Up to this many members all hold the CA's key, sealed; in a larger mesh the voters do."""


class Pace(msgspec.Struct, frozen=True):
    """When to re-plan (gossip.md, "Deciding on failures"); seconds."""

    stable_s: float = 1.0
    """No member came or went for so long: a stable cut."""
    between_s: float = 5.0
    new_term_s: float = 3.0
    mass_s: float = 15.0
    """The stable time asked for when more than 30 % vanished at once: probably this node is the one cut off."""
    gain_s: float = 300.0
    """What measurements alone speak for must be better for so long, at every look."""


LOCAL = Pace(stable_s=0.6, between_s=2.0, new_term_s=1.0, mass_s=5.0, gain_s=60.0)


class Coordinator:
    """Plans while this node leads."""

    def __init__(
        self,
        keeper: RecordKeeper,
        view: Callable[[], MeshView],
        seal_key_of: Callable[[NodeId], SealKey | None],
        pace: Pace,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keeper, self._view, self._seal_key_of, self._pace = keeper, view, seal_key_of, pace
        self._clock = clock
        self._log = get_logger("coordinator")
        self._changed_at = self._planned_at = self._led_since = clock()
        self._shape: tuple[object, ...] = ()
        self._present = self._settled = 0
        """Members present now, and when the cut was last stable."""
        self._planned_for: object = None
        """Cut and models that the placement in the record was made for ..."""
        self._better_since: float | None = None
        """... and since when another would be better, by what was measured meanwhile."""

    def note_leading(self) -> None:
        """This node has just won a term."""
        self._led_since = self._clock()
        self._planned_for = self._better_since = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(0.1)
            self._watch()
            if self._keeper.leads and self._due():
                await self._act()

    def _watch(self) -> None:
        """Notice when the cut changed: who is here, what they can hold, which models there are."""
        view = self._view()
        shape = tuple(
            (m.id, m.state in ("alive", "suspect"), m.profile.weight_bytes, m.profile.role, m.profile.draining)
            for m in view.members
        )
        if shape != self._shape:
            present = sum(member.present for member in view.members)
            self._shape, self._present, self._changed_at = shape, present, self._clock()
        elif self._stable():
            self._settled = self._present

    def _stable(self) -> bool:
        """The cut has been still for long enough.  Who is cut off finds the others dead one by one: what vanished is
        counted from the last stable cut."""
        mass = 1 < self._present < 0.7 * self._settled
        return self._clock() - self._changed_at >= (self._pace.mass_s if mass else self._pace.stable_s)

    def _due(self) -> bool:
        now, pace = self._clock(), self._pace
        return self._stable() and now - self._planned_at >= pace.between_s and now - self._led_since >= pace.new_term_s

    async def _act(self) -> None:
        """One commit at most: the CA's key for new members, else a better placement."""
        self._planned_at = self._clock()
        try:
            await self._share_authority()
            await self._place()
        except MeshError as error:
            self._log.info("not committed", why=str(error))

    async def _place(self) -> None:
        view, content = self._view(), self._keeper.content
        models = models_of(content)
        previous, asked_for = decode_placement(content.placement), (self._shape, models)
        # A second of computing with several models on a hundred nodes: not on the loop.
        wanted = await asyncio.to_thread(place, models, view.capacities(), previous)
        if _held(wanted) == _held(previous):
            self._planned_for, self._better_since = asked_for, None
            return
        if any(member.state == "suspect" for member in view.members):
            return
        if asked_for == self._planned_for and not self._lasting_gain(previous, wanted, view):
            return
        raw = msgspec.msgpack.encode(wanted)
        await self._keeper.change(lambda now: msgspec.structs.replace(now, placement=raw))
        self._planned_for, self._better_since = asked_for, None
        for entry in wanted.models:
            spans = {a.node[:8]: f"{a.span.start}-{a.span.end}" for a in entry.spans}
            self._log.info("placed", model=entry.model.id, spans=spans, missing=entry.missing)

    def _lasting_gain(self, previous: Placement, wanted: Placement, view: MeshView) -> bool:
        """Whether ``wanted``, for which nothing but measurements speaks, is worth moving layers under live streams: it
        survives no fewer failures, and the placement in the record was not the best for ``gain_s``."""
        steady = [member.id for member in view.live() if not member.profile.draining]
        before, after = survivability(previous, steady), survivability(wanted, steady)
        now = self._clock()
        if any(after[model] < before.get(model, -1) for model in after):
            self._better_since = None
            return False
        self._better_since = now if self._better_since is None else self._better_since
        return now - self._better_since >= self._pace.gain_s

    async def _share_authority(self) -> None:
        """Seal the CA's key to every voter (and, in a small mesh, every member), so that any of them can admit."""
        authority, content, view = self._keeper.authority(), self._keeper.content, self._view()
        if authority is None:
            return
        present = [member.id for member in view.members if member.present and member.id not in content.tombstones]
        holders = set(self._keeper.voters) | set(present if len(present) <= MAX_SEALED else ())
        sealed = {node: raw for node, raw in content.sealed_ca if node in holders or node in present}
        for node in sorted(holders - set(sealed)):
            key = self._seal_key_of(node)
            if key is not None:
                try:
                    sealed[node] = authority.sealed_to(node, key)
                except PeerError as error:  # it gets none, and holds up nobody
                    self._log.warning("no CA key for a member", node=node[:8], why=str(error))
        entries = tuple(sorted(sealed.items()))
        if entries != tuple(sorted(content.sealed_ca)):
            await self._keeper.change(
                lambda now: msgspec.structs.replace(
                    now, sealed_ca=tuple(entry for entry in entries if entry[0] not in now.tombstones)
                )
            )


def _held(placement: Placement) -> list[tuple[object, ...]]:
    """What of a placement nodes act upon: another split of the same spans is not worth a commit."""
    return [(entry.model, entry.spans, entry.missing) for entry in placement.models]


def decode_placement(raw: bytes) -> Placement:
    """The placement in a record; an empty one where there is none yet."""
    return msgspec.msgpack.decode(raw, type=Placement) if raw else Placement()
