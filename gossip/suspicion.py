"""How long a suspect has to refute: Lifeguard's local-health-aware suspicion, section IV-B of arXiv 1707.00788."""

from __future__ import annotations

import math

from gossip.config import GossipConfig
from gossip.messages import MAX_ACCUSERS
from mesh.types import NodeId


def minimum_s(n: int, config: GossipConfig) -> float:
    """Shortest suspicion in a mesh of ``n`` members."""
    scaled = config.suspicion_mult * math.log10(max(10, n)) * config.probe_period_s
    return max(config.suspicion_floor_s, scaled)


def expected_confirmations(n: int, config: GossipConfig) -> int:
    """K: confirmations that bring the time down to its minimum.  Of ``n`` members the suspect and its first accuser
    cannot confirm, so at n = 2 nobody can."""
    possible = max(0, n - 2)
    if possible < config.confirmations and not config.small_mesh_confirms:
        return 0
    return min(config.confirmations, possible)


def total_s(confirmations: int, k: int, least: float, most: float) -> float:
    """Time from the first suspicion to the verdict, after ``confirmations`` of the ``k`` expected.

    It falls with the logarithm: the first confirmation says most.
    """
    if k <= 0:
        return least
    share = math.log(confirmations + 1) / math.log(k + 1)
    return max(least, most - (most - least) * share)


class Suspicion:
    """A running suspicion of one member at one incarnation."""

    def __init__(self, n: int, now: float, config: GossipConfig) -> None:
        self.start = now
        self.least = minimum_s(n, config)
        self.most = self.least * config.suspicion_max_mult
        self.k = expected_confirmations(n, config)
        self.excused = 0.0
        """Seconds that this node slept through, or gave away."""
        self.called = False
        """The last probe before the verdict was made."""

    def deadline(self, accusers: int) -> float:
        """When the member is declared dead, with ``accusers`` distinct accusers known."""
        confirmations = min(max(0, accusers - 1), self.k)
        return self.start + self.excused + total_s(confirmations, self.k, self.least, self.most)


def unite(held: tuple[NodeId, ...], said: tuple[NodeId, ...]) -> tuple[NodeId, ...]:
    """Accusers held and newly said, in order of arrival, bounded."""
    fresh = tuple(dict.fromkeys(name for name in said if name not in held))
    return (held + fresh)[:MAX_ACCUSERS] if fresh else held
