"""Balancing policies: which of several nodes that could run a hop shall.  Each is a cost of a hop; routes add them up.

| policy | a hop costs |
|---|---|
| latency | its layers' time, longer by what queues there, and the leg of the wire (milliseconds); the default |
| round_robin | its turn among nodes that hold the same span; ``seed`` counts up |
| least_connections | how many sessions run, wait, or were just sent there |
| weighted | a draw by ``seed``, in proportion to measured tokens a second |
| memory | how little room for keys and values it has, against the roomiest |
| prefix_affinity | a draw by the prompt's prefix, so that equal prefixes meet the same cache; less so when loaded |
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from mesh.capacity import step_ms
from mesh.types import LayerSpan, ModelInfo, NodeId
from mesh.view import MemberView

Balance = Literal["round_robin", "least_connections", "weighted", "memory", "latency", "prefix_affinity"]
POLICIES: tuple[Balance, ...] = get_args(Balance)

HOP_MS = 0.3
"""What a hop costs besides its layers and the wire: frames, the event loop, one more engine step."""

LAG_NOISE_MS = 20.0
"""Lags that differ by less are alike: a node does not even tell others of a smaller change."""
P99_OF_MEAN = 4.6
"""A profile's lag is the 99th percentile; a hop waits for the mean, where lags are exponential."""

Holder = tuple[MemberView, LayerSpan]
HopCost = Callable[[MemberView, LayerSpan, int, int], float]
"""(member, span it holds, start, end) of a hop -> its cost, above 0 and below 1e6."""


class Measured:
    """Times of one model's hops on each node, from profiles and what this node has sent out itself."""

    def __init__(self, model: ModelInfo, me: NodeId, outstanding: Mapping[NodeId, int]) -> None:
        self.model = model
        self.me = me
        self.outstanding = outstanding
        self._known: dict[NodeId, tuple[float, float, float]] = {}

    def sessions(self, member: MemberView) -> int:
        """Sessions that run, wait or were just sent there; own ones may be in the profile already: take the larger."""
        load = member.profile.load
        return max(load.running + load.waiting, self.outstanding.get(member.id, 0))

    def layer_ms(self, member: MemberView) -> float:
        """Estimated time of one layer in one step, from the node's measured machine."""
        return step_ms(self.model, self.model.layer_bytes, member.profile.flops, member.profile.bandwidth)

    def layers_ms(self, member: MemberView, n: int) -> float:
        """Time of ``n`` layers in one step: measured steps where there are any, else the machine's estimate."""
        held = sum(len(span) for span in member.profile.spans)
        load = member.profile.load
        estimate = self.layer_ms(member)
        per_layer = max(estimate, load.step_ms / held) if load.running and load.step_ms and held else estimate
        return n * per_layer

    def queue(self, member: MemberView) -> float:
        """How many times longer a hop takes for what is ahead of it: sessions share steps, waiting ones do not."""
        waiting = member.profile.load.waiting
        return 1.0 + 0.1 * self.sessions(member) + 0.5 * waiting

    def leg_ms(self, member: MemberView) -> float:
        return 0.0 if member.id == self.me else member.leg_ms

    def hop_ms(self, member: MemberView, start: int, end: int) -> float:
        """Expected time of a hop, the leg of the wire to it included."""
        figures = self._known.get(member.id)
        if figures is None:
            figures = self._known[member.id] = self._figures(member)
        fixed, per_layer, head = figures
        return fixed + (end - start) * per_layer + (head if end == self.model.n_layers else 0.0)

    def _figures(self, member: MemberView) -> tuple[float, float, float]:
        """(whatever it runs, a layer, the head), in milliseconds."""
        queue, profile = self.queue(member), member.profile
        head = step_ms(self.model, self.model.head_bytes, profile.flops, profile.bandwidth)
        lag_ms = max(0.0, profile.load.lag_ms - LAG_NOISE_MS) / P99_OF_MEAN
        return HOP_MS + self.leg_ms(member) + lag_ms, queue * self.layers_ms(member, 1), queue * head


def draw(*parts: object) -> float:
    """A number in (0, 1) that depends on ``parts`` only, the same in every process."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 1) / (2**64 + 2)


def hop_cost(policy: Balance, measured: Measured, holders: Sequence[Holder], seed: int, prefix: str) -> HopCost:
    """The cost of a hop under ``policy``; ties are broken by a millionth of its expected time, then by ``seed``."""
    cost = _POLICY[policy](measured, holders, seed, prefix)
    chance = {member.id: 1e-9 * draw(seed, member.id) for member, _ in holders}

    def whole(member: MemberView, span: LayerSpan, start: int, end: int) -> float:
        tie = 1e-6 * measured.hop_ms(member, start, end) + chance[member.id]
        return min(cost(member, span, start, end) + tie, 1e6)

    return whole


def _latency(measured: Measured, holders: Sequence[Holder], seed: int, prefix: str) -> HopCost:
    return lambda member, span, start, end: measured.hop_ms(member, start, end)


def _round_robin(measured: Measured, holders: Sequence[Holder], seed: int, prefix: str) -> HopCost:
    groups: dict[LayerSpan, list[NodeId]] = {}
    for member, span in holders:
        groups.setdefault(span, []).append(member.id)
    turn = {
        (node, span): (index - seed) % len(nodes) / len(nodes)
        for span, nodes in groups.items()
        for index, node in enumerate(sorted(nodes))
    }
    return lambda member, span, start, end: 1.0 + turn[member.id, span]


def _least_connections(measured: Measured, holders: Sequence[Holder], seed: int, prefix: str) -> HopCost:
    return lambda member, span, start, end: 1.0 + measured.sessions(member)


def _weighted(measured: Measured, holders: Sequence[Holder], seed: int, prefix: str) -> HopCost:
    """The smallest of exponential draws with rates w is drawn in proportion to w."""

    def rate(member: MemberView) -> float:
        return member.profile.load.tokens_per_s or 1e3 / max(1e-3, measured.layer_ms(member))

    top = max(rate(member) for member, _ in holders)
    drawn = {member.id: 1e-3 - math.log(draw(seed, member.id)) * top / rate(member) for member, _ in holders}
    return lambda member, span, start, end: drawn[member.id]


def _memory(measured: Measured, holders: Sequence[Holder], seed: int, prefix: str) -> HopCost:
    top = max(1, *(member.profile.load.free_tokens for member, _ in holders))
    return lambda member, span, start, end: 2.0 - member.profile.load.free_tokens / top


def _prefix_affinity(measured: Measured, holders: Sequence[Holder], seed: int, prefix: str) -> HopCost:
    """Rendezvous hashing, with bounded loads: a node with far more than its share of sessions costs more."""
    mean = sum(measured.sessions(member) for member, _ in holders) / len(holders)
    drawn = {
        member.id: 0.5 + draw(prefix or seed, member.id) + max(0.0, measured.sessions(member) - 2 * mean - 4)
        for member, _ in holders
    }
    return lambda member, span, start, end: drawn[member.id]


_POLICY: dict[Balance, Callable[[Measured, Sequence[Holder], int, str], HopCost]] = {
    "latency": _latency,
    "round_robin": _round_robin,
    "least_connections": _least_connections,
    "weighted": _weighted,
    "memory": _memory,
    "prefix_affinity": _prefix_affinity,
}
