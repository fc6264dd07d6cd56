"""A world in virtual time for protocol cores: one seed gives one run.

It replaces clock, network, disk and process of ``node.driver`` and is generic over cores (``mesh/core.py``)::

    world = World(seed=7, net=NetParams(loss=0.1))
    world.add("a", make=lambda disk, now: MyCore("a", world.rng_for("a"), disk[-1] if disk else None),
              start=lambda core, now: core.join(seeds, now))
    world.schedule([Fault(at=5.0, kind="crash", nodes=("a",)), Fault(at=9.0, kind="restart", nodes=("a",))])
    world.after_step.append(lambda world, node: checker.check(node))
    world.run(until=60.0)

Times are seconds.  ``world.now`` is global; a core sees its own clock (``node.clock``), which may drift.  Nothing
iterates a set and no ``hash`` decides anything, so the digest of the trace is the same under any PYTHONHASHSEED.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from mesh.core import Effect, Emit, Persist, Send
from tests.sim.faults import Fault, NetParams
from tests.sim.network import PLAIN_BYTES, Network

__all__ = ["Fault", "NetParams", "Node", "World"]


class Rest(msgspec.Struct, frozen=True):
    """The effects of a step from the record on that is on its way to the disk."""

    effects: list[Any]
    at: int
    heard: Any


class Node:
    """One simulated process: a core, its disk, its clock and its inbox."""

    def __init__(self, node_id: str, make: Callable[[list[Any], float], Any], hooks: dict[str, Any]) -> None:
        self.id, self.make = node_id, make
        self.on_emit = hooks["on_emit"] or (lambda event, now: None)
        self.on_persist = hooks["on_persist"] or (lambda record, now: None)
        self.on_reset, self.start = hooks["on_reset"], hooks["start"]
        self.core: Any = None
        self.disk: list[Any] = []
        """Every record persisted, oldest first."""
        self.written: list[Any] = []
        """Every record that was ever durable, whatever became of the disk; for checkers."""
        self.emitted: deque[Any] = deque(maxlen=1000)
        self.inbox: deque[tuple[Any, str]] = deque()
        self.paused = False
        self.crash_after: int | None = None
        """``crash_mid``: how many more effects are performed."""
        self.paused_at, self.woke_at, self.slept_s = 0.0, -math.inf, 0.0
        """Of the last pause, in global time; for checkers."""
        self.step_s = self.fsync_s = 0.0
        self.lies = 0
        self.busy_until = 0.0
        """Global time until which nothing is read and no timer fires."""
        self.rest: Rest | None = None
        """What waits until the disk has written."""
        self.born_with = 0
        """Records on the disk when this life began; lies reach no further back."""
        self.timer = float("inf")
        """Global time of the earliest timer in the heap."""
        self.life = 0
        """Counts starts; timers of an earlier life are void."""
        self.rate, self.since, self.base = 1.0, 0.0, 0.0

    @property
    def up(self) -> bool:
        return self.core is not None

    def clock(self, now: float) -> float:
        """The node's own monotonic clock at global time ``now``."""
        return self.base + (now - self.since) * self.rate


class World:
    """Nodes, the network between them, faults, and the one clock."""

    def __init__(
        self,
        seed: int,
        net: NetParams | None = None,
        *,
        codec: Any = None,
        reliable: Callable[[Any], bool] = lambda message: False,
    ) -> None:
        """``codec``: pass each message through ``encode`` and ``decode`` and count bytes; ``reliable``: messages that
        travel by a stream: in order, not lost or repeated unless the link is cut."""
        self.seed, self.net, self.codec, self.reliable = seed, net or NetParams(), codec, reliable
        self.rng = self.rng_for("world")
        self.now = 0.0
        self.nodes: dict[str, Node] = {}
        self.after_step: list[Callable[[World, str], None]] = []
        self.network = Network(self.net, self.rng)
        self.traced = True
        """Whether a trace is kept; without one a run is the same, and sooner done."""
        self.trace: deque[tuple[float, str, str, str, Any]] = deque(maxlen=5000)
        self.sent: dict[str, list[int]] = {}
        """Node -> [messages, bytes] sent (bytes only with a codec)."""
        self.steps = 0
        self.heard: Any = None
        """For checkers: the message of the last step (None: it was a tick or a verb) ..."""
        self.effects: list[Effect] = []
        """... and its effects."""
        self._heap: list[tuple[float, int, str, Any, Any, Any]] = []
        self._number = itertools.count()
        self._digest = hashlib.blake2b(digest_size=16)
        self._undigested: list[tuple[float, str, str, str, str]] = []

    def rng_for(self, name: str) -> random.Random:
        """A generator of its own for ``name``, drawn from the seed."""
        return random.Random(f"{self.seed}/{name}")

    # -- building and steering

    def add(
        self,
        node_id: str,
        core: Any = None,
        *,
        make: Callable[[list[Any], float], Any] | None = None,
        start: Callable[[Any, float], list[Effect]] | None = None,
        on_emit: Callable[[Any, float], None] | None = None,
        on_persist: Callable[[Any, float], None] | None = None,
        on_reset: Callable[[Any, str, float], list[Effect]] | None = None,
        boot: bool = True,
    ) -> Node:
        """Add a node.  ``make(disk, clock)`` builds its core at each start (needed for restarts; ``core`` serves one
        life), ``start(core, clock)`` gives its first effects, ``on_reset(core, peer, clock)`` is told of resets."""
        if make is None:
            make = lambda disk, now: core  # noqa: E731
        hooks = {"on_emit": on_emit, "on_persist": on_persist, "on_reset": on_reset, "start": start}
        node = self.nodes[node_id] = Node(node_id, make, hooks)
        node.base = self.rng.uniform(0.0, 1000.0)
        node.since = self.now
        self.sent[node_id] = [0, 0]
        if boot:
            self._boot(node)
        return node

    def core(self, node_id: str) -> Any:
        return self.nodes[node_id].core

    def do(self, node_id: str, verb: Callable[[Any, float], list[Effect]]) -> None:
        """Call a verb of a live core now: ``world.do("a", lambda core, now: core.leave(now))``; nothing happens while
        the node is down, paused or busy."""
        node = self.nodes[node_id]
        if node.up and not node.paused and self.now >= node.busy_until:
            self._note("do", node_id, "", "")
            self._perform(node, verb(node.core, node.clock(self.now)))

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Run ``act`` at global time ``when``."""
        self._push(when, "act", act, None, None)

    def schedule(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self._push(fault.at, "fault", fault, None, None)

    def run(self, until: float, stop: Callable[[], bool] | None = None) -> bool:
        """Run to global time ``until``; with ``stop``, return True as soon as it holds after a step."""
        while self._heap and self._heap[0][0] <= until:
            self._step()
            if stop is not None and stop():
                return True
        self.now = max(self.now, until)
        return False

    # -- faults

    def apply(self, fault: Fault) -> None:
        """Let ``fault`` happen now."""
        self._note("fault", fault.kind, ",".join(fault.nodes), fault)
        if fault.kind in ("partition", "cut", "flap", "heal", "loss", "slow", "uplink"):
            return self.network.apply(fault, frozenset(self.nodes), self.now)
        for name in fault.nodes:
            self._apply_to_node(fault, self.nodes[name])

    def _apply_to_node(self, fault: Fault, node: Node) -> None:
        kind = fault.kind
        if kind == "crash":
            self._crash(node, silent="silent" in fault.other)
        elif kind == "crash_mid" and node.up:
            node.crash_after = self.rng.randrange(4)
        elif kind in ("restart", "wipe") and not node.up:
            if kind == "wipe":
                node.disk = []
            self._boot(node)
        elif kind == "pause" and not node.paused:
            node.paused, node.paused_at = True, self.now
        elif kind == "resume":
            self._resume(node)
        elif kind == "leave" and node.up:
            node.core.leaving = True
        elif kind == "busy":
            node.step_s = fault.value
        elif kind == "fsync":
            node.fsync_s = fault.value
        elif kind == "lies":
            node.lies = int(fault.value)
        elif kind == "drift":
            node.base, node.since, node.rate = node.clock(self.now), self.now, fault.value
            self._set_timer(node, void=True)

    def _boot(self, node: Node) -> None:
        node.life += 1
        node.paused, node.crash_after, node.timer, node.busy_until = False, None, math.inf, 0.0
        node.born_with = len(node.disk)
        node.core = node.make(node.disk, node.clock(self.now))
        self._perform(node, node.start(node.core, node.clock(self.now)) if node.start else [])

    def _crash(self, node: Node, silent: bool = False) -> None:
        if not node.up:
            return
        node.core, node.paused, node.crash_after = None, False, None
        node.inbox.clear()
        if node.rest is not None and self.rng.random() < 0.5:
            self._durable(
                node, node.rest.effects[node.rest.at].record
            )  # the power went after the last byte was written
        node.rest = None
        if node.lies:
            del node.disk[max(node.born_with, len(node.disk) - node.lies) :]
            node.lies = 0
        if not silent:
            self._reset(node)

    def _reset(self, node: Node) -> None:
        """Peers see their connections end, after what was already on its way."""
        last: dict[str, float] = {}
        for when, _, kind, to, source, _ in self._heap:
            if kind == "deliver" and source == node.id:
                last[to] = max(when, last.get(to, 0.0))
        for peer in self.nodes.values():
            if peer.up and peer.on_reset and not self.blocked(node.id, peer.id):
                when = max(self.now + self.network.delay(node.id, peer.id), last.get(peer.id, 0.0))
                when += self.rng.uniform(0.0, self.net.reset_s) if self.net.reset_s else 0.0
                self._push(when, "reset", peer.id, node.id, None)

    def _resume(self, node: Node) -> None:
        if node.paused:
            node.paused, node.woke_at, node.slept_s = False, self.now, self.now - node.paused_at
        self._go_on(node)

    def _go_on(self, node: Node) -> None:
        """What a node does that was paused or busy.  The inbox is drained before the clock is looked at, as the driver
        does."""
        while node.up and not node.paused and self.now >= node.busy_until:
            if node.rest is not None:
                rest, node.rest = node.rest, None
                self._durable(node, rest.effects[rest.at].record)
                self._perform_from(node, rest.at + 1, rest.effects, rest.heard)
            elif node.inbox:
                message, sender = node.inbox.popleft()
                self._perform(node, node.core.receive(message, sender, node.clock(self.now)), message)
            else:
                return self._set_timer(node, void=True)

    def _keep_busy(self, node: Node, seconds: float) -> None:
        node.busy_until = max(node.busy_until, self.now + seconds)
        self._push(node.busy_until, "free", node.id, node.life, None)

    def _durable(self, node: Node, record: Any) -> None:
        node.disk.append(record)
        node.written.append(record)
        node.on_persist(record, self.now)

    # -- messages

    def blocked(self, source: str, to: str) -> bool:
        return self.network.blocked(source, to, self.now)

    def _send(self, source: str, to: str, message: Any) -> None:
        count = self.sent[source]
        count[0] += 1
        size = PLAIN_BYTES
        if self.codec is not None:
            data = self.codec.encode(message)
            size = len(data)
            count[1] += size
            message = self.codec.decode(data)
        if to not in self.nodes:
            return self._note("blocked", source, to, message)
        fate, arrivals = self.network.carry(source, to, size, self.reliable(message), self.now)
        if fate != "sent":
            self._note(fate, source, to, message)
        for when in arrivals:
            self._push(when, "deliver", to, source, message)

    # -- one step

    def _push(self, when: float, kind: str, a: Any, b: Any, c: Any) -> None:
        heapq.heappush(self._heap, (max(when, self.now), next(self._number), kind, a, b, c))

    def _step(self) -> None:
        self.now, _, kind, a, b, c = heapq.heappop(self._heap)
        if kind == "deliver":
            self._deliver(self.nodes[a], b, c)
        elif kind == "timer":
            self._fire(self.nodes[a], b)
        elif kind == "fault":
            self.apply(a)
        elif kind == "free":
            self._go_on(self.nodes[a]) if self.nodes[a].life == b else None
        elif kind == "reset" and self.now < self.nodes[a].busy_until:
            self._push(self.nodes[a].busy_until, "reset", a, b, c)
        elif kind == "reset":
            self.do(a, lambda core, now: self.nodes[a].on_reset(core, b, now))
        else:
            a()

    def _deliver(self, node: Node, sender: str, message: Any) -> None:
        if not node.up or self.blocked(sender, node.id):
            return self._note("undelivered", sender, node.id, message)
        if node.paused or self.now < node.busy_until:
            if len(node.inbox) < self.net.inbox:
                node.inbox.append((message, sender))
            return
        self._note("deliver", sender, node.id, message)
        self._perform(node, node.core.receive(message, sender, node.clock(self.now)), message)

    def _fire(self, node: Node, life: int) -> None:
        if life != node.life or self.now < node.timer:
            return  # of an earlier life, or replaced by an earlier timer
        node.timer = float("inf")
        if not node.up or node.paused or self.now < node.busy_until:
            return  # whoever goes on sets a timer
        deadline, clock = node.core.deadline, node.clock(self.now)
        if deadline is not None and deadline <= clock + 1e-9:
            self._note("tick", node.id, "", "")
            self._perform(node, node.core.tick(max(clock, deadline)))
        else:
            self._set_timer(node)

    def _set_timer(self, node: Node, void: bool = False) -> None:
        """One timer per node is enough: an earlier one that fires in vain sets the next."""
        deadline = node.core.deadline if node.up else None
        if void:
            node.timer = float("inf")
        if deadline is None or node.paused:
            return
        when = max(self.now, node.since + (deadline - node.base) / node.rate)
        if when < node.timer:
            node.timer = when
            self._push(when, "timer", node.id, node.life, None)

    def _perform(self, node: Node, effects: list[Effect], heard: Any = None) -> None:
        """The effects of one step, in order; then the checkers."""
        self.steps += 1
        if node.step_s:
            self._keep_busy(node, node.step_s)
        self._perform_from(node, 0, effects, heard)

    def _perform_from(self, node: Node, start: int, effects: list[Effect], heard: Any) -> None:
        for at in range(start, len(effects)):
            effect = effects[at]
            if node.crash_after is not None:
                if node.crash_after == 0:
                    self._note("crash_mid", node.id, "", effect)
                    return self._crash(node)
                node.crash_after -= 1
            kind = type(effect)
            if kind is Send:
                self._send(node.id, effect.to, effect.message)
            elif kind is Persist and node.fsync_s:
                node.rest = Rest(effects, at, heard)
                return self._keep_busy(node, node.fsync_s)
            elif kind is Persist:
                self._durable(node, effect.record)
            else:
                assert kind is Emit, effect
                self._note("emit", node.id, "", effect.event)
                node.emitted.append(effect.event)
                node.on_emit(effect.event, self.now)
            if node.core is None:
                return  # a hook crashed it
        self._set_timer(node)
        self.heard, self.effects = heard, effects
        for check in self.after_step:
            check(self, node.id)

    # -- the trace

    def _note(self, kind: str, a: str, b: str, what: Any) -> None:
        if not self.traced:
            return
        self.trace.append((self.now, kind, a, b, what))
        self._undigested.append((self.now, kind, a, b, type(what).__name__))
        if len(self._undigested) >= 1000:
            self._digest.update(msgspec.msgpack.encode(self._undigested))
            self._undigested.clear()

    def lines(self, last: int = 200) -> list[str]:
        """The last events, one line each."""
        return [f"{t:12.6f} {kind:11} {a[:8]} {b[:8]} {what}"[:300] for t, kind, a, b, what in list(self.trace)[-last:]]

    def digest(self) -> str:
        """Of the whole trace: equal runs have equal digests, whatever PYTHONHASHSEED is."""
        assert self.traced, "a run without a trace has no digest"
        digest = self._digest.copy()
        digest.update(msgspec.msgpack.encode(self._undigested))
        return digest.hexdigest()
