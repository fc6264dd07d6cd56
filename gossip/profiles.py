"""What each member says of itself beyond existing: profile rows, their load, and pulls of rows that are missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from gossip.config import GossipConfig
from gossip.messages import LoadRow, ProfileRow
from mesh.errors import PeerError
from mesh.types import Load, NodeId, NodeProfile
from mesh.wire import Codec

PROFILE_CODEC: Codec[NodeProfile] = Codec(NodeProfile, 32_768)
MAX_PULLS = 1_024
PULL_TRIES = 3

LEAST_CHANGE: dict[str, float] = {
    "running": 1.0,
    "waiting": 1.0,
    "free_tokens": 1.0,
    "tokens_per_s": 1.0,
    "step_ms": 1.0,
    "lag_ms": 20.0,
    "rtt_ms": 1.0,
}
"""A change below this is noise, whatever its share: an idle mesh must not chatter about a lag of 1 or 2 ms."""


def materially(field: str, old: float, new: float, share: float) -> bool:
    """Whether a measured figure changed enough to tell others."""
    return abs(new - old) >= max(LEAST_CHANGE[field], share * abs(old))


def load_changed(old: Load, new: Load, share: float) -> bool:
    return any(materially(name, getattr(old, name), getattr(new, name), share) for name in old.__struct_fields__)


def sound(value: Any) -> bool:
    """No number in ``value`` (a Struct, nested) is negative, infinite or not a number."""
    if isinstance(value, msgspec.Struct):
        return all(sound(getattr(value, name)) for name in value.__struct_fields__)
    if isinstance(value, tuple):
        return all(sound(item) for item in value)
    if isinstance(value, int | float):
        return math.isfinite(value) and 0 <= value < 2**63
    return True


class Pull(msgspec.Struct):
    """A profile row to be fetched."""

    version: int
    source: NodeId
    at: float
    tries: int = 0
    spread: bool = False
    """Learned from gossip: pass it on once it is here."""


class Profiles:
    """All profile rows held, the own one included, and the latest loads."""

    def __init__(self, me: NodeId, mesh_id: str, sign: Callable[[bytes], bytes], config: GossipConfig) -> None:
        self.me, self.mesh_id, self.sign, self.config = me, mesh_id, sign, config
        self._rows: dict[NodeId, ProfileRow] = {}
        self._decoded: dict[NodeId, NodeProfile] = {}
        """Without load."""
        self._loads: dict[NodeId, LoadRow] = {}
        self._whole: dict[NodeId, NodeProfile] = {}
        """With load; made when asked for."""
        self._wanted: NodeProfile | None = None
        """The latest own profile, published or not."""
        self._published_at = -math.inf
        self._load_published_at = -math.inf
        self.load_due = math.inf
        """When the own load is to be told; infinity: there is nothing new to tell."""
        self.pulls: dict[NodeId, Pull] = {}

    # -- reading

    def row(self, node: NodeId) -> ProfileRow | None:
        return self._rows.get(node)

    def version(self, node: NodeId) -> int:
        row = self._rows.get(node)
        return row.version if row else 0

    def load_row(self, node: NodeId) -> LoadRow | None:
        return self._loads.get(node)

    def get(self, node: NodeId) -> NodeProfile | None:
        """``node``'s profile with its latest load; ``None``: not heard yet."""
        profile = self._decoded.get(node)
        if profile is None or node in self._whole:
            return self._whole.get(node)
        load = self._loads.get(node)
        self._whole[node] = msgspec.structs.replace(profile, load=load.load) if load else profile
        return self._whole[node]

    # -- the own row

    def set_own(self, profile: NodeProfile, least_version: int, now: float) -> bool:
        """Note the own profile; True: a new version of the row was made and must be announced."""
        self._wanted = profile
        self._plan_load(now)
        held = self._decoded.get(self.me)
        said = msgspec.structs.replace(profile, load=Load())
        if held is not None:
            late = now >= self._published_at + self.config.load_period_s
            if not (late and materially("rtt_ms", held.rtt_ms, said.rtt_ms, self.config.load_change)):
                said = msgspec.structs.replace(said, rtt_ms=held.rtt_ms)
            if said == held:
                return False
        self._publish_row(said, max(self.version(self.me) + 1, least_version), now)
        return True

    def _publish_row(self, said: NodeProfile, version: int, now: float) -> None:
        bare = ProfileRow(self.me, version, PROFILE_CODEC.encode(said), b"")
        row = msgspec.structs.replace(bare, signature=self.sign(bare.signed_bytes(self.mesh_id)))
        self._store(row, said)
        self._published_at = now

    def outrank(self, version: int, now: float) -> None:
        """Another holds a later version of the own row, from an earlier life: go above it."""
        held = self._decoded.get(self.me)
        if held is not None:
            self._publish_row(held, version + 1, now)

    def _plan_load(self, now: float) -> None:
        """The own load is told when it changed enough, and not too often."""
        assert self._wanted is not None
        held = self._loads.get(self.me)
        changed = load_changed(held.load if held else Load(), self._wanted.load, self.config.load_change)
        self.load_due = max(now, self._load_published_at + self.config.load_period_s) if changed else math.inf

    def publish_load(self, least_version: int, now: float) -> LoadRow:
        """The next version of the own load."""
        assert self._wanted is not None
        held = self._loads.get(self.me)
        row = LoadRow(max(least_version, held.version + 1 if held else 0), self._wanted.load)
        self._store_load(self.me, row)
        self._load_published_at = now
        self.load_due = math.inf
        return row

    # -- others' rows

    def accept(self, row: ProfileRow, check: Callable[[bytes, bytes], bool]) -> bool:
        """Keep ``row`` if it is newer; ``check(message, signature)`` proves who wrote it.

        Raises:
            PeerError: its signature or its content is wrong.
        """
        if row.version <= self.version(row.node):
            return False
        if not check(row.signed_bytes(self.mesh_id), row.signature):
            raise PeerError(f"profile of {row.node} is not signed by it")
        profile = PROFILE_CODEC.decode(row.payload)
        if not sound(profile):
            raise PeerError(f"profile of {row.node} holds impossible numbers")
        self._store(row, profile)
        return True

    def accept_load(self, node: NodeId, row: LoadRow) -> bool:
        """Keep ``node``'s load if it is newer and possible."""
        held = self._loads.get(node)
        if (held and row.version <= held.version) or not sound(row.load):
            return False
        self._store_load(node, row)
        return True

    def _store(self, row: ProfileRow, profile: NodeProfile) -> None:
        self._rows[row.node] = row
        self._decoded[row.node] = profile
        self._whole.pop(row.node, None)

    def _store_load(self, node: NodeId, row: LoadRow) -> None:
        self._loads[node] = row
        self._whole.pop(node, None)

    def forget(self, node: NodeId) -> None:
        for table in (self._rows, self._decoded, self._loads, self._whole, self.pulls):
            table.pop(node, None)

    # -- pulls

    def want(self, node: NodeId, version: int, source: NodeId, now: float, spread: bool) -> bool:
        """Fetch ``node``'s row from ``source``, which has ``version``; False: it is held or on its way, or no room."""
        pull = self.pulls.get(node)
        if version <= self.version(node) or node == self.me or (pull and pull.version >= version):
            return False
        if pull is None and len(self.pulls) >= MAX_PULLS:
            return False  # anti-entropy brings it later
        self.pulls[node] = Pull(version, source, now, spread=spread or bool(pull and pull.spread))
        return True

    def next_pull(self) -> float:
        """When to ask for a row again; infinity: none is missing."""
        return min([pull.at for pull in self.pulls.values()]) if self.pulls else math.inf

    def due_pulls(self, now: float) -> dict[NodeId, list[NodeId]]:
        """Whom to ask now for which rows: first who told, then the owner; given up after three tries."""
        asks: dict[NodeId, list[NodeId]] = {}
        for node, pull in list(self.pulls.items()):
            if pull.at > now:
                continue
            if pull.tries == PULL_TRIES:
                del self.pulls[node]
                continue
            source = pull.source if pull.tries % 2 == 0 else node
            pull.at = now + self.config.pull_retry_s * 2**pull.tries
            pull.tries += 1
            asks.setdefault(source, []).append(node)
        return asks
