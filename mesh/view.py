"""What one node believes of the mesh right now: an immutable value, replaced whole when anything changes.

Built by the node from gossip (members, profiles, measured round trips) and from the election (coordinator, term,
active placement).  Routing reads it, the coordinator plans from it, status shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from mesh.capacity import NodeCapacity
from mesh.placement import Placement
from mesh.types import LayerSpan, ModelId, ModelInfo, NodeId, NodeProfile

NEAR_MS = 10.0
"""Round trips below this are one machine or one site; what differs there is how busy the nodes are."""

ALIKE = 3.0
"""Speeds within this factor of the median are taken as equal."""

MemberState = Literal["alive", "suspect", "dead", "left"]


class MemberView(msgspec.Struct, frozen=True):
    """One member as this node sees it."""

    id: NodeId
    state: MemberState = "alive"
    profile: NodeProfile = NodeProfile()
    rtt_ms: float = 0.0
    """Round trip measured from this node; 0: not measured (then ``profile.rtt_ms`` is used)."""
    degraded: bool = False
    """Answers pings but computes nothing, or lags badly."""

    @property
    def present(self) -> bool:
        """May be routed to: alive, or only suspected."""
        return self.state in ("alive", "suspect")

    @property
    def leg_ms(self) -> float:
        """One way to this node."""
        return (self.rtt_ms or self.profile.rtt_ms) / 2

    def ready(self, model: ModelId) -> tuple[LayerSpan, ...]:
        """Spans of ``model`` that this member says it can serve."""
        return tuple(span for span in self.profile.spans if span.model == model and len(span) > 0)


class MeshView(msgspec.Struct, frozen=True):
    """Members in order of id; the active placement with its id (mesh epoch counter, placement counter)."""

    me: NodeId
    members: tuple[MemberView, ...] = ()
    placement: Placement = Placement()
    placement_id: tuple[int, int] = (0, 0)
    coordinator: NodeId | None = None
    term: int = 0
    degraded: str = ""
    """Why this node is on the minority side or without a leader; empty: it is not."""

    def member(self, node: NodeId) -> MemberView | None:
        return next((member for member in self.members if member.id == node), None)

    def live(self) -> tuple[MemberView, ...]:
        """Members that are alive (suspects are not)."""
        return tuple(member for member in self.members if member.state == "alive")

    def name_of(self, node: NodeId) -> str:
        """What people call ``node``: its name, or the first 8 digits of its id."""
        member = self.member(node)
        return member.profile.name if member and member.profile.name else node[:8]

    def model(self, model: ModelId) -> ModelInfo | None:
        """The model as placed, or as a present member offers it."""
        entry = self.placement.of(model)
        if entry is not None:
            return entry.model
        return next((info for info in self.offers() if info.id == model), None)

    def offers(self) -> Iterator[ModelInfo]:
        """Models that present members offer, with duplicates, in order of member."""
        for member in self.members:
            if member.present:
                yield from member.profile.models

    def ready_spans(self, model: ModelId) -> tuple[tuple[MemberView, LayerSpan], ...]:
        """Spans of ``model`` that present members can serve now."""
        return tuple((member, span) for member in self.members if member.present for span in member.ready(model))

    def holders(self, model: ModelId, layer: int) -> tuple[MemberView, ...]:
        """Present members that can serve ``layer`` now."""
        return tuple(member for member, span in self.ready_spans(model) if span.covers(layer, layer + 1))

    def uncovered(self, model: ModelInfo, without: NodeId | None = None) -> tuple[tuple[int, int], ...]:
        """Ranges of layers that no present member (but ``without``) can serve now."""
        spans = [span for member, span in self.ready_spans(model.id) if member.id != without]
        return gaps(spans, model.n_layers)

    def may_drop(self, span: LayerSpan) -> bool:
        """Whether others can serve all of ``span``, and go on holding it, so that this node may give it up.

        What a member holds but is not to hold, or holds while it drains, does not count: it would be given up as well,
        each relying on the other.
        """
        others = [
            LayerSpan(span.model, max(held.start, part.start), min(held.end, part.end))
            for member, held in self.ready_spans(span.model)
            for node, part in self._assigned(span.model)
            if node == member.id != self.me and not member.profile.draining
        ]
        others = [part for part in others if part.start < part.end]
        return not any(start < span.end and span.start < end for start, end in gaps(others, span.end))

    def _assigned(self, model: ModelId) -> tuple[tuple[NodeId, LayerSpan], ...]:
        """Who is to hold what of ``model``, by the active placement."""
        entry = self.placement.of(model)
        return tuple((assigned.node, assigned.span) for assigned in entry.spans) if entry else ()

    def survivability(self) -> dict[ModelId, int]:
        """How many members, whichever they are, may fail so that all layers are served without loading anything.

        By what live members that are not draining have loaded; -1: some layer is not served even now.
        """
        return {entry.model.id: min(self._counts(entry.model), default=0) - 1 for entry in self.placement.models}

    def _counts(self, model: ModelInfo) -> list[int]:
        """How many members hold each layer."""
        steady = [m for m in self.live() if not m.profile.draining]
        return [
            sum(any(span.covers(layer, layer + 1) for span in member.ready(model.id)) for member in steady)
            for layer in range(model.n_layers)
        ]

    def sources(self, manifest: str) -> tuple[NodeId, ...]:
        """Where weights may be fetched: members that offer the model whole, then those that hold a span of it.

        Suspects come after the live; this node is left out.
        """
        others = sorted((m for m in self.members if m.present and m.id != self.me), key=lambda m: m.state != "alive")
        whole = [m.id for m in others if any(info.manifest == manifest for info in m.profile.models)]
        names = {entry.model.id for entry in self.placement.models if entry.model.manifest == manifest}
        part = [m.id for m in others if m.id not in whole and any(span.model in names for span in m.profile.spans)]
        return tuple(whole + part)

    def capacities(self) -> tuple[NodeCapacity, ...]:
        """What placement needs of the members that are alive or only suspected.

        A busy machine measures itself at half its speed, and another time not.  So that layers do not move on noise,
        speeds near the median count as the median, and the others in powers of two (docs/decisions/0005).
        """
        present = [member for member in self.members if member.present]
        flops = _leveller([member.profile.flops for member in present])
        bandwidth = _leveller([member.profile.bandwidth for member in present])
        return tuple(_capacity(member, flops, bandwidth) for member in present)


def _capacity(member: MemberView, flops: Callable[[float], float], bandwidth: Callable[[float], float]) -> NodeCapacity:
    p = member.profile
    rtt_ms = power_of_two(p.rtt_ms) if p.rtt_ms >= NEAR_MS else 0.0
    return NodeCapacity(member.id, p.weight_bytes, flops(p.flops), bandwidth(p.bandwidth), rtt_ms, p.role, p.draining)


def _leveller(measured: list[float]) -> Callable[[float], float]:
    """A speed as placement compares it with the others in ``measured``."""
    known = sorted(speed for speed in measured if speed > 0)
    median = known[len(known) // 2] if known else 0.0

    def level(speed: float) -> float:
        near = median / ALIKE <= speed <= median * ALIKE
        return power_of_two(median if near else speed)

    return level


def power_of_two(measured: float) -> float:
    """The nearest power of two; 0 stays 0."""
    return 2.0 ** round(math.log2(measured)) if measured > 0 else 0.0


def gaps(spans: list[LayerSpan], n_layers: int) -> tuple[tuple[int, int], ...]:
    """Ranges of [0, n_layers) that no span covers."""
    found, reached = [], 0
    for span in sorted(spans, key=lambda s: s.start):
        if span.start > reached:
            found.append((reached, min(span.start, n_layers)))
        reached = max(reached, span.end)
    if reached < n_layers:
        found.append((reached, n_layers))
    return tuple((start, end) for start, end in found if start < end)
