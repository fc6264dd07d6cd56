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
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec

from mesh.core import Effect, Emit, Persist, Send

FaultKind = Literal[
    "crash",  # kill -9: peers see their connections reset;  other=("silent",): power cut, they see nothing
    "crash_mid",  # the same, in the middle of the effects of the node's next step
    "restart",  # with its disk
    "wipe",  # restart without its disk
    "pause",  # SIGSTOP: messages wait in the inbox, no ticks
    "resume",
    "partition",  # no messages between `nodes` and `other` (empty: everyone else)
    "cut",  # one way: from `nodes` to `other` (empty: everyone else)
    "heal",  # all partitions, cuts and losses end
    "loss",  # probability `value` on all messages to and from `nodes` (empty: on every message)
    "slow",  # `value` seconds more on every message to and from `nodes`
    "drift",  # the clocks of `nodes` run at `value` x real time from now on
]


class Fault(msgspec.Struct, frozen=True):
    """One act of the weather.  A schedule is a list of them: it prints, and replays."""

    at: float
    kind: FaultKind
    nodes: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    value: float = 0.0


class NetParams(msgspec.Struct, frozen=True):
    """The network's habits.  One-way delay = base_s + Exp(jitter_s), in s; the rest are probabilities."""

    base_s: float = 0.0002
    jitter_s: float = 0.0003
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    reorder_s: float = 0.05
    """A reordered message is up to this much later than the others."""
    retransmit_s: float = 0.2
    """What one lost segment costs a reliable message."""
    inbox: int = 1024
    """Messages that wait for a paused node (a socket buffer); more are dropped."""


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
        self.emitted: deque[Any] = deque(maxlen=1000)
        self.inbox: deque[tuple[Any, str]] = deque()
        self.paused = False
        self.crash_after: int | None = None
        """``crash_mid``: how many more effects are performed."""
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
        self.loss = self.net.loss
        self.losses: dict[str, float] = {}
        self.slowness: dict[str, float] = {}
        self.cuts: list[tuple[frozenset[str], frozenset[str]]] = []
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
        self._fifo: dict[tuple[str, str], float] = {}

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
        """Call a verb of a live core now: ``world.do("a", lambda core, now: core.leave(now))``."""
        node = self.nodes[node_id]
        if node.up and not node.paused:
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
        if fault.kind in ("partition", "cut", "heal", "loss"):
            return self._apply_to_network(fault)
        for name in fault.nodes:
            self._apply_to_node(fault, self.nodes[name])

    def _apply_to_network(self, fault: Fault) -> None:
        here = frozenset(fault.nodes)
        there = frozenset(fault.other) or frozenset(self.nodes) - here
        if fault.kind == "heal":
            self.cuts, self.losses, self.loss = [], {}, self.net.loss
        elif fault.kind == "loss":
            self.loss = self.loss if fault.nodes else fault.value
            self.losses.update(dict.fromkeys(fault.nodes, fault.value))
        else:
            self.cuts.append((here, there))
            if fault.kind == "partition":
                self.cuts.append((there, here))

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
        elif kind == "pause":
            node.paused = True
        elif kind == "resume":
            self._resume(node)
        elif kind == "slow":
            self.slowness[node.id] = fault.value
        elif kind == "drift":
            node.base, node.since, node.rate = node.clock(self.now), self.now, fault.value
            self._set_timer(node, void=True)

    def _boot(self, node: Node) -> None:
        node.life += 1
        node.paused, node.crash_after, node.timer = False, None, float("inf")
        node.core = node.make(node.disk, node.clock(self.now))
        self._perform(node, node.start(node.core, node.clock(self.now)) if node.start else [])

    def _crash(self, node: Node, silent: bool = False) -> None:
        if not node.up:
            return
        node.core, node.paused, node.crash_after = None, False, None
        node.inbox.clear()
        for peer in [] if silent else list(self.nodes.values()):
            if peer.up and peer.on_reset and not self.blocked(node.id, peer.id):
                self._push(self.now + self._delay(node.id, peer.id), "reset", peer.id, node.id, None)

    def _resume(self, node: Node) -> None:
        """The inbox is drained before the clock is looked at, as the driver does."""
        node.paused = False
        while node.inbox and node.up and not node.paused:
            message, sender = node.inbox.popleft()
            self._perform(node, node.core.receive(message, sender, node.clock(self.now)), message)
        self._set_timer(node, void=True)

    # -- the network

    def blocked(self, source: str, to: str) -> bool:
        return bool(self.cuts) and any(source in here and to in there for here, there in self.cuts)

    def _delay(self, source: str, to: str) -> float:
        delay = self.net.base_s + self.rng.expovariate(1.0) * self.net.jitter_s
        return delay + self.slowness.get(source, 0.0) + self.slowness.get(to, 0.0)

    def _lost(self, source: str, to: str) -> bool:
        chance = max(self.loss, self.losses.get(source, 0.0), self.losses.get(to, 0.0))
        return chance > 0.0 and self.rng.random() < chance

    def _send(self, source: str, to: str, message: Any) -> None:
        count = self.sent[source]
        count[0] += 1
        if self.codec is not None:
            data = self.codec.encode(message)
            count[1] += len(data)
            message = self.codec.decode(data)
        if to not in self.nodes or self.blocked(source, to):
            return self._note("blocked", source, to, message)
        if self.reliable(message):
            return self._send_reliably(source, to, message)
        if self._lost(source, to):
            return self._note("lost", source, to, message)
        copies = 2 if self.net.duplicate and self.rng.random() < self.net.duplicate else 1
        for _ in range(copies):
            late = self.net.reorder and self.rng.random() < self.net.reorder
            delay = self._delay(source, to) + (self.rng.uniform(0.0, self.net.reorder_s) if late else 0.0)
            self._push(self.now + delay, "deliver", to, source, message)

    def _send_reliably(self, source: str, to: str, message: Any) -> None:
        delay = self._delay(source, to)
        for _ in range(8):
            if not self._lost(source, to):
                break
            delay += self.net.retransmit_s
        else:
            return self._note("lost", source, to, message)
        when = max(self.now + delay, self._fifo.get((source, to), 0.0))
        self._fifo[source, to] = when
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
        elif kind == "reset":
            self.do(a, lambda core, now: self.nodes[a].on_reset(core, b, now))
        else:
            a()

    def _deliver(self, node: Node, sender: str, message: Any) -> None:
        if not node.up or self.blocked(sender, node.id):
            return self._note("undelivered", sender, node.id, message)
        if node.paused:
            if len(node.inbox) < self.net.inbox:
                node.inbox.append((message, sender))
            return
        self._note("deliver", sender, node.id, message)
        self._perform(node, node.core.receive(message, sender, node.clock(self.now)), message)

    def _fire(self, node: Node, life: int) -> None:
        if life != node.life or self.now < node.timer:
            return  # of an earlier life, or replaced by an earlier timer
        node.timer = float("inf")
        if not node.up or node.paused:
            return
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
        self.heard, self.effects = heard, effects
        for effect in effects:
            if node.crash_after is not None:
                if node.crash_after == 0:
                    self._note("crash_mid", node.id, "", effect)
                    return self._crash(node)
                node.crash_after -= 1
            if isinstance(effect, Send):
                self._send(node.id, effect.to, effect.message)
            elif isinstance(effect, Persist):
                node.disk.append(effect.record)
                node.on_persist(effect.record, self.now)
            else:
                assert isinstance(effect, Emit), effect
                self._note("emit", node.id, "", effect.event)
                node.emitted.append(effect.event)
                node.on_emit(effect.event, self.now)
            if not node.up:
                return  # a hook crashed it
        self._set_timer(node)
        for check in self.after_step:
            check(self, node.id)

    # -- the trace

    def _note(self, kind: str, a: str, b: str, what: Any) -> None:
        self.trace.append((self.now, kind, a, b, what))
        self._digest.update(f"{self.now:.9f} {kind} {a} {b} {type(what).__name__}\n".encode())

    def lines(self, last: int = 200) -> list[str]:
        """The last events, one line each."""
        return [f"{t:12.6f} {kind:11} {a[:8]} {b[:8]} {what}"[:300] for t, kind, a, b, what in list(self.trace)[-last:]]

    def digest(self) -> str:
        """Of the whole trace: equal runs have equal digests, whatever PYTHONHASHSEED is."""
        return self._digest.hexdigest()
