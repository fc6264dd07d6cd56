"""What a node says of itself: its profile to the mesh, its figures to Prometheus, its certificate, its last peers."""

from __future__ import annotations

import asyncio
import collections
import random
import time
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import Counter

from mesh.types import PRIORITIES, NodeId, NodeProfile
from node.boot import remember_peers
from node.net.address import parse_address
from node.net.renewal import keep_renewed
from node.telemetry import get_logger

if TYPE_CHECKING:
    from node.node import Node

PUBLISH_S = 0.25
MEASURED_AGAIN, APART_S = 4, (5.0, 15.0)
"""How often, and between which times by chance: nodes that start side by side are not to measure side by side."""
REMEMBER_S = 5.0
REMEMBERED = 32


class Presence:
    """Says it, and says it again when it changes."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._log = get_logger("presence")
        self._counted: dict[Counter, int] = {}
        """What /metrics was told of figures that are counted elsewhere."""

    def profile(self) -> NodeProfile:
        """This node's row, as of now."""
        node = self._node
        return node.machine.profile(
            node.config,
            peer=node.address,
            api=node.api_url,
            models=tuple(node.offered.values()),
            loader=node.loader,
            engine=node.engine,
            seal_key=msgspec.msgpack.encode(node.identity.seal_key),
            draining=node.draining,
            rtt_ms=node.peers.swim.median_rtt_ms(),
            lag_ms=node.lag.p99_ms,
        )

    def announce(self) -> None:
        """Something that others should know has changed."""
        profile = self.profile()
        self._node.peers.gossip.cast(lambda core, now: core.set_profile(profile, now))
        self._node.outlook.touch()

    async def publish(self) -> None:
        """Until cancelled.  The core decides what is news; here it only hears it often enough."""
        peers, lag = self._node.peers, self._node.lag
        while True:
            await asyncio.sleep(PUBLISH_S)
            self.announce()
            peers.swim.note_lag(lag.worst_s())
            peers.core.note_health(peers.swim.local_health(time.monotonic()))
            self._measure()

    async def measure_again(self) -> None:
        """The machine's speed, a few times while it serves nobody: at the start it loads models, and others do.

        Routes believe these figures, and gather streams on nodes that merely measured themselves at a better moment.
        """
        node, left = self._node, MEASURED_AGAIN
        while left:
            await asyncio.sleep(random.uniform(*APART_S))
            if node.loader.loading is None and not node.engine.stats().running:
                await node.machine.measure_again(node.config)
                left -= 1

    def _measure(self) -> None:
        """Gauges for /metrics; and nobody starts before those of their class that are paused."""
        node, telemetry = self._node, self._node.telemetry
        stats, paused = node.engine.stats(), node.entry.paused()
        node.gate.hold(min(paused, key=PRIORITIES.index, default=None))
        for priority in PRIORITIES:
            telemetry.paused.labels(priority).set(paused.count(priority))
        pages = node.stage.core.pages
        kept = node.stage.kept()
        telemetry.checkpoint_bytes.set(kept["memory_bytes"])
        telemetry.checkpoint_disk_bytes.set(kept["disk_bytes"])
        self._count(telemetry.checkpoint_disk_read, kept["read_bytes"])
        self._count(telemetry.checkpoint_dropped, kept["dropped_bytes"])
        telemetry.prefix_bytes.set(stats.shared_bytes + pages.row_bytes)
        self._count(telemetry.preemptions, node.stage.core.preemptions)
        self._count(telemetry.prefix_queries, pages.looked_up)
        self._count(telemetry.prefix_hits, pages.found)
        self._count(telemetry.rows, stats.rows)
        telemetry.kv_usage.set(stats.used_bytes / node.machine.kv_bytes if node.machine.kv_bytes else 0.0)
        states = collections.Counter(member.state for member in node.view.members)
        for state in ("alive", "suspect", "dead", "left"):
            telemetry.members.labels(state).set(states[state])

    def _count(self, counter: Counter, total: int) -> None:
        counter.inc(total - self._counted.get(counter, 0))
        self._counted[counter] = total

    async def remember(self) -> None:
        """Until cancelled: where the others are, for a restart; and how long the certificate is good for.

        The first of them at once: a founder that leaves or is killed soon has no token that says where its mesh is.
        """
        known: tuple[tuple[NodeId, str], ...] = ()
        node = self._node
        while True:
            await asyncio.sleep(REMEMBER_S if known else PUBLISH_S)
            membership = await asyncio.to_thread(node.folder.membership)
            if membership is not None:
                node.telemetry.cert_expiry.set(membership.expires - time.time())
            members = [x for x in node.peers.swim.members() if x.node != node.me and x.state == "alive"]
            peers = tuple((x.node, x.address) for x in members[:REMEMBERED])
            if peers and peers != known:
                try:
                    await asyncio.to_thread(remember_peers, node.folder, peers)
                    known = peers
                except OSError as error:  # a full disk may cost the next start its hints, not this life
                    self._log.warning("where the others are is not on disk", why=str(error))

    async def renew(self) -> None:
        """Until cancelled: a new certificate at half of the old one's life."""
        node = self._node

        def doors() -> tuple[str, ...]:
            return (node.address, *(x.address for x in node.peers.swim.members() if x.state == "alive"))

        await keep_renewed(
            node.identity,
            node.folder,
            node.tls,
            (parse_address(node.address)[0],),
            doors,
            lambda why: self._log.warning("certificate not renewed yet", why=why),
        )
