"""The membership figures Q1 and Q3-Q8: production cores in the simulator, memberlist's settings beside them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from gossip import config as presets
from gossip.config import GossipConfig
from gossip.events import ProfileChanged
from gossip.swim import Swim
from mesh.types import NodeProfile
from node.security.keyring import OVERHEAD
from scripts.figures import spread
from tests.sim.gossip_checks import GossipChecks
from tests.sim.gossip_world import WireCodec, gossip_world, node_id, warm_world
from tests.sim.world import Fault, NetParams, World

PRESETS: dict[str, Callable[[], GossipConfig]] = {
    "lan": presets.lan,
    "wan": presets.wan,
    "loopback": presets.loopback,
    "memberlist": presets.memberlist,
}
UDP, TCP, SEGMENT, TLS = 28, 40, 1448, 29
"""Bytes of headers of a datagram and of a segment (IPv4), payload of a segment, one TLS record with our frame."""
SPACING_S = 1.5
"""Between two crashes.  What spreads of one competes with what spreads of those before: closer together is harder."""


@contextlib.contextmanager
def checking(world: World, checked: bool = True) -> Iterator[None]:
    """G1-G4 are checked after every step, of what the step changed; a violation carries the last events as a note."""
    if checked:
        GossipChecks(world)
    try:
        yield
    except AssertionError as violation:
        violation.add_note("\n".join(world.lines(200)))
        raise


# -- Q1, Q3: crashes


class Watch:
    """Who knows of which crash since when, from the events of the cores."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.crashed: dict[str, float] = {}
        self.knows: dict[str, dict[str, float]] = {}
        self.dead: dict[str, dict[str, float]] = {}
        world.after_step.append(self.after_step)

    def crash(self, victim: str) -> None:
        world = self.world
        live = [node for node in world.nodes.values() if node.up and node.id != victim]
        self.crashed[victim] = world.now
        self.knows[victim] = {n.id: world.now for n in live if n.core.member(victim).state in ("suspect", "dead")}
        self.dead[victim] = {}
        world.apply(Fault(world.now, "crash", (victim,), ("silent",)))

    def after_step(self, world: World, observer: str) -> None:
        for effect in world.effects:
            event = getattr(effect, "event", None)
            if event is not None and hasattr(event, "old") and event.node in self.crashed:
                self._changed(event.node, observer, event.new)

    def _changed(self, victim: str, observer: str, state: str) -> None:
        if state == "alive":
            self.knows[victim].pop(observer, None)
            return
        self.knows[victim].setdefault(observer, self.world.now)
        if state == "dead":
            self.dead[victim].setdefault(observer, self.world.now)

    def all_known(self) -> bool:
        live = sum(node.up for node in self.world.nodes.values())
        return all(len(self._kept(by)) >= live for by in self.dead.values())

    def _kept(self, by: dict[str, float]) -> dict[str, float]:
        """What those say that live to the end."""
        return {observer: at for observer, at in by.items() if self.world.nodes[observer].up}

    def times(self) -> dict[str, list[float]]:
        """Seconds: crash to first suspected and first dead anywhere; from the first suspicion until all know."""
        found: dict[str, list[float]] = {"suspect": [], "dead": [], "spread": []}
        live = sum(node.up for node in self.world.nodes.values())
        for victim, at in self.crashed.items():
            knows, dead = self.knows[victim], self.dead[victim]
            found["suspect"].append(min(knows.values(), default=math.inf) - at)
            found["dead"].append(min(dead.values(), default=math.inf) - at)
            kept = self._kept(knows)
            found["spread"].append(max(kept.values()) - min(knows.values()) if len(kept) == live else math.inf)
        return found


def crashes(
    n: int,
    seed: int,
    config: GossipConfig,
    count: int,
    loss: float,
    checked: bool,
    tell: Callable[[str], None] = lambda line: None,
    spacing_s: float = SPACING_S,
) -> dict[str, list[float]]:
    """One power cut every ``spacing_s`` until ``count`` of ``n`` members are gone.  ``tell`` hears now and then."""
    world = warm_world(n, seed, config, NetParams(loss=loss))
    watch = Watch(world)
    with checking(world, checked):
        world.run(10.0)
        for victim in world.rng_for("victims").sample(list(world.nodes), count):
            world.run(world.now + spacing_s)
            watch.crash(victim)
            if len(watch.crashed) % 20 == 0:
                found = [seconds for seconds in watch.times()["dead"] if seconds < math.inf]
                tell(f"    {len(watch.crashed)} crashes; first dead so far: {spread(found, None, None)['value']}")
        for _ in range(100):
            world.run(world.now + 1.0)
            if watch.all_known():
                break
    return watch.times()


# -- Q7: idle bytes


class MeteredCodec(WireCodec):
    """Counts what each message costs on the wire, seal and headers included."""

    def __init__(self) -> None:
        self.bytes = 0

    def encode(self, message: Any) -> bytes:
        data = super().encode(message)
        size = len(data) - 1
        if data[:1] == b"d":
            self.bytes += size + OVERHEAD + UDP
        else:
            segments = math.ceil((size + TLS) / SEGMENT)
            self.bytes += size + TLS + TCP * (segments + math.ceil(segments / 2))  # with the acknowledgements
        return data


def idle_bytes(n: int, seed: int, config: GossipConfig, seconds: float = 60.0) -> float:
    """Bytes a second that a node sends while nothing happens, mean."""
    world = warm_world(n, seed, config)
    world.codec = MeteredCodec()
    world.run(15.0)
    before = world.codec.bytes
    world.run(15.0 + seconds)
    return float(world.codec.bytes - before) / seconds / n


# -- Q8: joining


def joins(n: int, seed: int, config: GossipConfig, checked: bool, limit_s: float = 150.0) -> list[float]:
    """``n`` nodes start within one second and know one seed: when each sees all, since the first start."""
    world = gossip_world(n, seed, config, stagger_s=1.0 / n, seeds=1)
    full: dict[str, float] = {}

    def look(world: World, node: str) -> None:
        if node not in full and world.core(node).n == n:
            full[node] = world.now

    world.after_step.append(look)
    with checking(world, checked):
        world.run(limit_s, stop=lambda: len(full) == n)
    return [*full.values(), *[math.inf] * (n - len(full))]


# -- profiles


def profile_spread(n: int, seed: int, config: GossipConfig, count: int = 10) -> list[float]:
    """``count`` members publish a profile of 1 KB each, one a second: seconds until all others hold it."""
    world = warm_world(n, seed, config)
    publishers = world.rng_for("publishers").sample(list(world.nodes), count)
    published: dict[str, float] = {}
    missing = {node: n - 1 for node in publishers}
    times: list[float] = []

    def look(world: World, observer: str) -> None:
        for effect in world.effects:
            event = getattr(effect, "event", None)
            if type(event) is ProfileChanged and event.node in missing:
                missing[event.node] -= 1
                if not missing[event.node]:
                    times.append(world.now - published[event.node])

    world.after_step.append(look)
    for node in publishers:
        world.run(world.now + 1.0)
        published[node] = world.now
        profile = NodeProfile(name=node[:8], hardware="x" * 900)
        world.do(node, lambda core, now, profile=profile: core.set_profile(profile, now))
    world.run(world.now + 60.0, stop=lambda: len(times) == count)
    return [*times, *[math.inf] * (count - len(times))]


# -- Q4, Q5, Q6: false positives


class FalseDeaths:
    """Deaths declared of members whom nothing ails."""

    def __init__(self, world: World, healthy: set[str]) -> None:
        self.count, self.healthy, self.by_healthy = 0, healthy, 0
        world.after_step.append(self.after_step)

    def after_step(self, world: World, observer: str) -> None:
        for effect in world.effects:
            event = getattr(effect, "event", None)
            if getattr(event, "new", "") == "dead" and event.node in self.healthy:
                self.count += 1
                self.by_healthy += observer in self.healthy


class TimersFirst(Swim):
    """As in programs whose timers run as soon as they wake, before what came meanwhile is read.  Our driver reads
    first, and with that alone no mode declares a false death."""

    def receive(self, message: Any, sender: str, now: float) -> list[Any]:
        due = self.tick(now) if self.deadline is not None and self.deadline <= now else []
        return [*due, *super().receive(message, sender, now)]


def stalls(n: int, seed: int, config: GossipConfig, ill: int, stall_s: float, seconds: float = 120.0) -> int:
    """``ill`` members stall for ``stall_s`` and run for 1 s, again and again: deaths declared of the others."""
    world = warm_world(n, seed, config, swim=TimersFirst)
    victims = [node_id(index) for index in range(ill)]
    rng = world.rng_for("stalls")
    for victim in victims:
        at = 10.0 + rng.uniform(0.0, 1.0)
        while at < 10.0 + seconds:
            world.schedule([Fault(at, "pause", (victim,)), Fault(at + stall_s, "resume", (victim,))])
            at += stall_s + 1.0
    deaths = FalseDeaths(world, set(world.nodes) - set(victims))
    world.run(10.0 + seconds + stall_s)
    return deaths.count


def lossy(n: int, seed: int, config: GossipConfig, seconds: float, loss: float = 0.1) -> int:
    """Uniform loss and nothing else: deaths declared."""
    world = warm_world(n, seed, config, NetParams(loss=loss))
    deaths = FalseDeaths(world, set(world.nodes))
    with checking(world):
        world.run(seconds)
    return deaths.count


def ill_one_percent(n: int, seed: int, config: GossipConfig, kind: str, seconds: float = 120.0) -> int:
    """1 % of ``n`` are heard by nobody every other 20 s (``flip``), or lose 80 % (``loss``): healthy members that
    healthy ones removed."""
    world = warm_world(n, seed, config)
    victims = tuple(node_id(index) for index in range(max(1, n // 100)))
    for k in range(int(seconds / 40.0) if kind == "flip" else 0):
        world.schedule([Fault(10.0 + 40.0 * k, "cut", victims), Fault(30.0 + 40.0 * k, "heal")])
    if kind == "loss":
        world.schedule([Fault(10.0, "loss", victims, value=0.8)])
    deaths = FalseDeaths(world, set(world.nodes) - set(victims))
    world.run(10.0 + seconds)
    return deaths.by_healthy


# -- the figures


class Runs:
    """What was asked for; each figure measures the preset and, with ``compare``, memberlist's."""

    def __init__(
        self,
        n: int,
        preset: str,
        compare: bool,
        seed: int,
        count: int,
        minutes: float,
        tell: Callable[[str], None] = lambda line: None,
        spacing_s: float = SPACING_S,
        seeds: int = 1,
    ) -> None:
        self.tell, self.spacing_s, self.seeds = tell, spacing_s, seeds
        self.n, self.seed, self.count, self.minutes = n, seed, min(count, n // 5), minutes
        self.preset, self.compare = preset, compare and preset != "memberlist"
        self.config = PRESETS[preset]()
        self.checked = preset != "memberlist"

    def _anchor(self, what: Callable[[GossipConfig], Any], otherwise: str) -> Any:
        return {"memberlist preset, same run": what(presets.memberlist())} if self.compare else otherwise

    def q1(self) -> dict[str, Any]:
        times = crashes(self.n, self.seed, self.config, self.count, 0.0, self.checked, self.tell, self.spacing_s)
        anchor = self._anchor(
            lambda other: spread(
                crashes(self.n, self.seed, other, self.count, 0.0, False, spacing_s=self.spacing_s)["dead"], 0, 0
            )["value"],
            "memberlist LAN 13.7 s median, 17.5 s p99 [model]",
        )
        what = f"first detection (dead) of a crash, N = {self.n}, {self.count} crashes"
        first = spread(times["suspect"], None, None)["value"]
        return {"what": what, **spread(times["dead"], 5.0, 8.0), "anchor": anchor, "first_suspect": first}

    def q3(self) -> dict[str, Any]:
        times = crashes(self.n, self.seed, self.config, self.count, 0.1, self.checked, self.tell, self.spacing_s)
        anchor = self._anchor(
            lambda other: spread(
                crashes(self.n, self.seed, other, self.count, 0.1, False, spacing_s=self.spacing_s)["spread"], 0, 0
            )["value"],
            "1.78 s",
        )
        what = f"from the first suspicion until all live members know, N = {self.n}, 10 % loss, {self.count} crashes"
        dead, suspect = (spread(times[name], None, None)["value"] for name in ("dead", "suspect"))
        return {
            "what": what,
            **spread(times["spread"], None, 2.0),
            "anchor": anchor,
            "first_dead": dead,
            "first_suspect": suspect,
        }

    def q4(self) -> dict[str, Any]:
        modes = {"lifeguard": self.config, "swim": presets.without_lifeguard(self.config)}
        if self.compare:
            modes["memberlist"] = presets.memberlist()
        seeds = range(self.seed, self.seed + self.seeds)
        deaths = {name: sum(self._stalled(config, seed) for seed in seeds) for name, config in modes.items()}
        detected = {
            name: spread([s for seed in seeds for s in crashes(128, seed, config, 12, 0.0, False)["dead"]], None, None)
            for name, config in modes.items()
        }
        share = 100.0 * deaths["lifeguard"] / max(1, deaths["swim"])
        detected_s = {name: figure["value"] for name, figure in detected.items()}
        no_slower = detected_s["lifeguard"]["median"] <= detected_s["swim"]["median"]
        what = (
            "false deaths as a share of SWIM mode's, N = 128, 1-32 members stalled for 0.128-32 s, 2 min each, "
            f"{self.seeds} seeds; first detection of a crash beside them"
        )
        return {
            "what": what, "value": round(share, 3), "unit": "%", "goal": "<= 1 %, and no slower to detect",
            "holds": share <= 1.0 and no_slower, "anchor": "Lifeguard: 50-100 x fewer", "deaths": deaths,
            "detected_s": detected_s,
        }  # fmt: skip

    def _stalled(self, config: GossipConfig, seed: int) -> int:
        found = 0
        for ill in (1, 4, 8, 16, 32):
            for stall_s in (0.128, 2.0, 8.0, 32.0):
                found += stalls(128, seed, config, ill, stall_s)
            self.tell(f"Q4 seed {seed}, {ill} stalled: {found} deaths so far")
        return found

    def q5(self) -> dict[str, Any]:
        n, seconds = min(self.n, 100), self.minutes * 60.0
        deaths = lossy(n, self.seed, self.config, seconds)
        anchor = self._anchor(lambda other: lossy(n, self.seed, other, seconds), "plain SWIM lost 5 of 17")
        what = f"false deaths at 10 % uniform loss, {self.minutes:g} min, N = {n}"
        return {"what": what, **none(deaths), "anchor": anchor}

    def q6(self) -> dict[str, Any]:
        def both(config: GossipConfig) -> int:
            return sum(ill_one_percent(self.n, self.seed, config, kind) for kind in ("flip", "loss"))

        deaths = both(self.config)
        what = f"healthy members removed while 1 % of N = {self.n} flip-flop one way, or lose 80 %; 2 min each"
        return {"what": what, **none(deaths), "anchor": self._anchor(both, "memberlist oscillates, Rapid is exact")}

    def q7(self) -> dict[str, Any]:
        large, small = (idle_bytes(n, self.seed, self.config) for n in (self.n, max(8, self.n // 4)))
        holds = large <= 600.0 and large <= 1.1 * small
        what = f"idle bytes sent per node, N = {self.n} (and at a quarter of it), seal and headers counted"
        value = {"bytes": round(large), "bytes_at_a_quarter": round(small)}
        goal = "<= 600 B/s, and at most 1.1 x that of a quarter of the nodes"
        anchor = self._anchor(lambda other: round(idle_bytes(self.n, self.seed, other)), "640 B/s")
        return {"what": what, "value": value, "unit": "B/s", "goal": goal, "holds": holds, "anchor": anchor}

    def q8(self) -> dict[str, Any]:
        times = joins(self.n, self.seed, self.config, self.checked)
        limit = 10.0 if self.n <= 1000 else 15.0
        anchor = self._anchor(
            lambda other: spread(joins(self.n, self.seed, other, False), 0, 0)["value"],
            "memberlist up to 95 s mean at 2,000",
        )
        what = f"from one seed to full views, N = {self.n} started within 1 s"
        return {"what": what, **spread(times, None, limit), "anchor": anchor}

    def profiles(self) -> dict[str, Any]:
        times = profile_spread(self.n, self.seed, self.config)
        anchor = self._anchor(
            lambda other: spread(profile_spread(self.n, self.seed, other), 0, 0)["value"],
            "memberlist: rides on updates",
        )
        what = f"from a changed profile of 1 KB until all N = {self.n} hold it, ten of them, one a second"
        return {"what": what, **spread(times, None, 5.0), "anchor": anchor}


def none(count: int) -> dict[str, Any]:
    return {"value": count, "unit": "deaths", "goal": "0", "holds": count == 0}


def figures(runs: Runs, which: list[str], tell: Callable[[str], None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in which:
        start = time.monotonic()
        found[name] = figure = getattr(runs, name.lower())()
        took = time.monotonic() - start
        tell(f"{name}: {figure['what']}: {figure['value']} {figure['unit']} (goal {figure['goal']}; {took:.0f} s)")
        if runs.compare:
            tell(f"    memberlist preset: {figure['anchor']}")
    return found


# -- schedules


def storm(seed: int) -> dict[str, int]:
    """One schedule of weather over a small mesh with a mixture of its own, G1-G6 checked; what it covered."""
    from tests.sim.gossip_weather import Storm, draw_mix

    played = Storm(seed, draw_mix(seed))
    played.run()
    return played.covered()
