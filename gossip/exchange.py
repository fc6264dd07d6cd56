"""How profiles and loads travel: versions as gossip, rows on request, load straight to those who care."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gossip.broadcast import BroadcastQueue
from gossip.config import GossipConfig
from gossip.events import ProfileChanged
from gossip.members import Members
from gossip.messages import (
    DATAGRAM_CODEC,
    BigRows,
    LoadPush,
    LoadRow,
    Message,
    ProfileRow,
    Rows,
    Version,
    Want,
    Watch,
)
from gossip.profiles import Profiles
from gossip.roster import Identity
from mesh.core import Effect, Emit, Rejected
from mesh.errors import PeerError
from mesh.types import NodeId, NodeProfile

MAX_WATCHERS = 512
MAX_WATCHED = 64
WANTED_PER_MESSAGE = 24
STREAM_ROWS_BYTES = 1_000_000


class Exchange:
    """Keeps the rows of all members fresh.  ``send(to, message)`` and ``out`` are the core's."""

    def __init__(
        self,
        identity: Identity,
        config: GossipConfig,
        members: Members,
        send: Callable[[NodeId, Message], None],
        out: list[Effect],
    ) -> None:
        self.identity, self.config, self.members = identity, config, members
        self._send, self._out = send, out
        self.profiles = Profiles(identity.node, identity.mesh_id, identity.sign, config)
        self.news: BroadcastQueue[Version] = BroadcastQueue(DATAGRAM_CODEC.size)
        self._watchers: dict[NodeId, float] = {}
        """Who routes to this node -> until when."""
        self._watched: tuple[NodeId, ...] = ()
        self._watch_at = math.inf

    @property
    def deadline(self) -> float:
        return min(self.profiles.next_pull(), self.profiles.load_due, self._watch_at)

    def tick(self, now: float) -> None:
        if self.profiles.next_pull() <= now:
            self._pull(now)
        if self.profiles.load_due <= now:
            self._push_load(now)
        if self._watch_at <= now:
            self._watch(now)

    # -- the own profile

    def set_own(self, profile: NodeProfile, incarnation: int, now: float) -> None:
        """A version never falls below the incarnation, so rows of a new life win over those of an earlier one."""
        if self.profiles.set_own(profile, incarnation, now):
            self._announce(self.identity.node)

    def _announce(self, node: NodeId) -> None:
        self._note_version(node)
        self.news.add(node, Version(node, self.profiles.version(node)))

    def _note_version(self, node: NodeId) -> None:
        member = self.members.get(node)
        if member is not None:
            member.version = self.profiles.version(node)
            self.members.put(member)

    # -- rows

    def hear(self, version: Version, sender: NodeId, now: float, spread: bool) -> bool:
        """``sender`` has that version; True: it is news, and will be pulled."""
        if version.node == self.identity.node:
            if version.version > self.profiles.version(version.node):
                self.profiles.outrank(version.version, now)
                self._announce(version.node)
            return False
        known = self.members.get(version.node) is not None
        return known and self.profiles.want(version.node, version.version, sender, now, spread)

    def _pull(self, now: float) -> None:
        for source, nodes in self.profiles.due_pulls(now).items():
            for start in range(0, len(nodes), WANTED_PER_MESSAGE):
                self._send(source, Want(tuple(nodes[start : start + WANTED_PER_MESSAGE])))

    def on_want(self, message: Want, sender: NodeId, now: float) -> None:
        """Rows go by datagram where they fit one, else over the stream."""
        small: list[ProfileRow] = []
        big: list[ProfileRow] = []
        room, stream_room = self.config.datagram_bytes - 16, STREAM_ROWS_BYTES
        for row in (self.profiles.row(node) for node in message.nodes):
            size = DATAGRAM_CODEC.size(row) if row else 0
            if row and size <= room:
                small.append(row)
                room -= size
            elif row and size <= stream_room:
                big.append(row)
                stream_room -= size
        if big:
            self._send(sender, BigRows(tuple(small + big)))
        elif small:
            self._send(sender, Rows(tuple(small)))

    def on_rows(self, message: Rows | BigRows, sender: NodeId, now: float) -> None:
        for row in message.rows:
            try:
                self._accept(row)
            except PeerError as error:
                self._out.append(Emit(Rejected(sender, str(error))))

    def _accept(self, row: ProfileRow) -> None:
        member = self.members.get(row.node)
        if member is None or row.node == self.identity.node:
            return
        key, verify = member.record.key, self.identity.verify
        if not self.profiles.accept(row, lambda message, signature: verify(row.node, key, message, signature)):
            return
        pull = self.profiles.pulls.get(row.node)
        if pull is not None and pull.version <= row.version:
            del self.profiles.pulls[row.node]
        if pull is not None and pull.spread:
            self._announce(row.node)
        else:
            self._note_version(row.node)
        self._out.append(Emit(ProfileChanged(row.node)))

    # -- load

    def on_load(self, owner: NodeId, row: LoadRow) -> None:
        if self.members.get(owner) is not None and self.profiles.accept_load(owner, row):
            self._out.append(Emit(ProfileChanged(owner, load_only=True)))

    def _push_load(self, now: float) -> None:
        """To everyone in a small mesh, else to those that route here; probers see it on their acks besides."""
        row = self.profiles.publish_load(int(self.profiles.version(self.identity.node)), now)
        for node in [node for node, until in self._watchers.items() if until <= now]:
            del self._watchers[node]
        small = self.members.n <= self.config.load_everyone
        for node in self.members.present if small else list(self._watchers):
            self._send(node, LoadPush(row))

    def on_load_push(self, message: LoadPush, sender: NodeId, now: float) -> None:
        self.on_load(sender, message.row)

    def on_watch(self, message: Watch, sender: NodeId, now: float) -> None:
        known = sender in self._watchers
        if known or len(self._watchers) < MAX_WATCHERS:
            self._watchers[sender] = now + 3 * self.config.watch_period_s
        row = self.profiles.load_row(self.identity.node)
        if row is not None and not known:
            self._send(sender, LoadPush(row))

    def watch(self, nodes: Sequence[NodeId], now: float) -> None:
        """Ask ``nodes``, to which this node routes, for their load from now on."""
        fresh = tuple(nodes)[:MAX_WATCHED]
        if fresh != self._watched:
            self._watched = fresh
            self._watch_at = now if fresh else math.inf

    def _watch(self, now: float) -> None:
        self._watch_at = now + self.config.watch_period_s
        if self.members.n > self.config.load_everyone:
            for node in self._watched:
                self._send(node, Watch())
