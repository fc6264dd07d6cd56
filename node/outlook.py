"""Builds this node's ``MeshView`` from what gossip and the election know; replaced whole when anything changed."""

from __future__ import annotations

from collections.abc import Callable

from mesh.election.voters import MemberInfo
from mesh.errors import ConfigError
from mesh.placement import Placement
from mesh.types import NodeId, NodeProfile
from mesh.view import MemberView, MeshView
from node.advice import NO_COORDINATOR
from node.net.address import parse_address
from node.peers import Peers


class Outlook:
    """The view, made when it is asked for after a change."""

    def __init__(self, me: NodeId, peers: Peers, own_profile: Callable[[], NodeProfile]) -> None:
        self._me, self._peers, self._own_profile = me, peers, own_profile
        self._placement, self._placement_id = Placement(), (0, 0)
        self._view: MeshView | None = None
        self._since: dict[NodeId, tuple[bool, bool, float]] = {}

    @property
    def view(self) -> MeshView:
        if self._view is None:
            self._view = self._build()
        return self._view

    def touch(self) -> None:
        """Something changed."""
        self._view = None

    def placement(self, placement: Placement, placement_id: tuple[int, int]) -> None:
        """The active placement."""
        self._placement, self._placement_id = placement, placement_id
        self.touch()

    def electorate(self, now: float) -> tuple[MemberInfo, ...]:
        """What the election's policy of voters needs to know of the members; times on this node's clock."""
        infos = []
        for member in self._peers.swim.members():
            alive, gone = member.state == "alive", member.state in ("dead", "left")
            was = self._since.get(member.node)
            since = was[2] if was and was[:2] == (alive, gone) else now
            self._since[member.node] = (alive, gone, since)
            profile = self._peers.swim.profile(member.node)
            infos.append(
                MemberInfo(
                    id=member.node,
                    alive_since=since if alive else None,
                    dead_since=since if gone else None,
                    domain=_host(member.address),
                    can_vote=not (profile and profile.draining),
                )
            )
        return tuple(infos)

    def _build(self) -> MeshView:
        swim, core = self._peers.swim, self._peers.core
        members = []
        for member in sorted(swim.members(), key=lambda member: member.node):
            own = member.node == self._me
            profile = self._own_profile() if own else swim.profile(member.node)
            members.append(
                MemberView(
                    id=member.node,
                    state=member.state,
                    profile=profile or NodeProfile(),
                    rtt_ms=member.rtt_ms or 0.0,
                    degraded=member.degraded,
                )
            )
        return MeshView(
            me=self._me,
            members=tuple(members),
            placement=self._placement,
            placement_id=self._placement_id,
            coordinator=core.leader,
            term=core.term,
            degraded="" if core.leader else NO_COORDINATOR,
        )


def _host(address: str) -> str:
    """A member says its own address: one that is none must not stop the node."""
    try:
        return parse_address(address)[0]
    except ConfigError:
        return ""
