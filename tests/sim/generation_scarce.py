"""Worlds with too little room: sessions of all classes compete for few places while nodes come and go.

Besides P1 to P7: what has begun is never refused, whoever waits holds no room, and a session is paused for others only
where they are of a higher class.
"""

from __future__ import annotations

import random

import msgspec

from mesh.core import Send
from mesh.pipeline import events as e
from mesh.pipeline import messages as m
from mesh.types import PRIORITIES, Priority
from tests.sim.generation import Keeps, Peer
from tests.sim.generation_world import (
    LAYOUTS,
    Client,
    Weather,
    check_clients,
    check_freed,
    keeps_of,
    make_world,
    request,
    weather_of,
)
from tests.sim.world import NetParams, World


class PatientClient(Client):
    """Asks again, as the API's queue does, where a request was refused before it had begun."""

    def poll(self, world: World) -> None:
        super().poll(world)
        if isinstance(self.end, e.Failed) and not self.tokens:
            assert self.end.code in ("busy", "no_route"), (self.session, self.end)
            self.end = None
            world.do(self.node, lambda core, now: core.open(self.session, self.asked, now))


def endless(rng: random.Random, max_tokens: int, priority: Priority) -> m.SessionRequest:
    """So many tokens, whatever is drawn."""
    made = request(rng, max_tokens, priority=priority)
    return msgspec.structs.replace(made, sampling=msgspec.structs.replace(made.sampling, stop_token_ids=()))


def requests(rng: random.Random, count: int, max_tokens: int = 12) -> dict[str, m.SessionRequest]:
    """Sessions of random classes."""
    made = {}
    for number in range(count):
        priority = rng.choice(PRIORITIES)
        made[f"s{number}"] = request(rng, max_tokens, longest=12, priority=priority)
    return made


class Scarcity(Weather):
    """Clients that come one after another, and the checkers."""

    def __init__(self, world: World, wanted: dict[str, m.SessionRequest], every_s: float = 0.3) -> None:
        self.wanted = wanted
        super().__init__(world, {})
        world.after_step.append(self._check_room)
        for number, (name, ask) in enumerate(wanted.items()):
            world.at(world.now + number * every_s, lambda name=name, ask=ask: self._arrive(name, ask))

    @property
    def over(self) -> bool:
        return len(self.clients) == len(self.wanted) and super().over

    def _arrive(self, name: str, ask: m.SessionRequest) -> None:
        if not self.world.nodes["entry"].up or self.world.nodes["entry"].paused:
            self.world.at(self.world.now + 0.5, lambda: self._arrive(name, ask))
            return
        self.clients.append(PatientClient(name, ask))
        self.world.do("entry", lambda core, now: core.open(name, ask, now))

    def _check_room(self, world: World, name: str) -> None:
        core: Peer = world.core(name)
        held = {session for session, hop in core.stage._sessions.items() if not hop.parked}
        assert len(core.engine.sequences) == len(held) <= core.engine.slots, (name, held)
        for effect in world.effects:
            self.counts["pauses"] += isinstance(getattr(effect, "event", None), e.Paused)
            told = effect.message if isinstance(effect, Send) else None
            if isinstance(told, m.Refused) and told.code == "paused" and isinstance(world.heard, m.Open):
                paused, opened = self.wanted[told.session].priority, world.heard.priority
                higher = PRIORITIES.index(opened) < PRIORITIES.index(paused)
                assert higher or world.heard.session == told.session, f"{name} parks {paused} for {opened}"
        self.counts["preemptions"] = max(self.counts["preemptions"], core.stage.preemptions)


def play_scarce(seed: int, sessions: int = 7, peer: type[Peer] = Peer, keeps: Keeps | None = None) -> Scarcity:
    """One schedule of faults over more sessions than there is room for; traced if it fails, by doing it again."""
    keeps = keeps or keeps_of(seed)
    try:
        return _play(seed, sessions, peer, keeps, traced=False)
    except AssertionError:
        return _play(seed, sessions, peer, keeps, traced=True)


def _play(seed: int, sessions: int, peer: type[Peer], keeps: Keeps, traced: bool) -> Scarcity:
    layout, faults = weather_of(seed)
    rng = random.Random(f"{seed}/scarce")
    net = NetParams(loss=0.01 if seed % 3 == 0 else 0.0)
    slots = rng.randint(2, 3)
    world = make_world(seed, net, LAYOUTS[layout], step_s=0.05, peer=peer, slots=slots, keeps=keeps)
    world.traced = traced
    world.schedule(faults)
    weather = Scarcity(world, requests(rng, sessions))
    try:
        world.run(310.0, stop=lambda: weather.over)
        check_clients(weather)
        world.run(world.now + 250.0)
        check_freed(world)
    except AssertionError as violation:
        violation.add_note("\n".join([f"{seed} {layout}", *map(str, faults), *world.lines(200)]))
        raise
    return weather
