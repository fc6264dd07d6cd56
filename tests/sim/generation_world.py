"""Worlds of sessions and stages, random schedules of faults, and what must be true under them.

P1: the client sees each token once, in order, equal to an undisturbed run's, whichever node it has it from.
P2: every sequence, checkpoint and journal is freed after the end.  P3: every client's stream ends.  P4: no message of
another epoch than a hop follows changes it.  P6: what waits is bounded.  P7: what is shown is held by another node than
the one showing it, and no journal that has it ever loses it.  Shared by the tests and by ``scripts/simulate``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from mesh.core import Send
from mesh.pipeline import events as e
from mesh.pipeline import messages as m
from mesh.pipeline.journal import Adopt, needs_witness
from mesh.types import Priority, SamplingParams
from tests.sim.generation import ROW, Keeps, Peer, oracle
from tests.sim.world import Fault, NetParams, Node, World

Spans = dict[str, tuple[int, int]]

# Two holders of every layer besides the entry, so that any one stage may go.
SPANS: Spans = {"a1": (0, 2), "a2": (0, 2), "b1": (2, 4), "b2": (2, 4), "c1": (4, 6), "c2": (4, 6)}
LAYOUTS: dict[str, Spans] = {
    "pure entry": SPANS,
    "entry is hop 0": {"entry": (0, 2), **SPANS},
    "entry is sampler": {"entry": (4, 6), **SPANS},
    "entry is all": {"entry": (0, 6), "d1": (0, 6), "d2": (0, 6)},
    "two halves": {"entry": (0, 3), "a": (0, 3), "b": (3, 6), "c": (3, 6)},
}
TOKENS = 16
"""Drawn at most by a session of a schedule: enough that most faults strike before its end."""
GOSSIP_S = 2.0
"""A node that cannot be reached for this long is told dead."""
SILENCE_S = 3.0
"""A client whose node is silent for this long asks another."""
POLL_S = 0.25
RENEW_S = 20.0


def make_world(
    seed: int,
    net: NetParams | None = None,
    spans: Spans = SPANS,
    step_s: float = 0.01,
    peer: type[Peer] = Peer,
    forgets: float = 0.0,
    slots: int = 64,
    keeps: Keeps | None = None,
) -> World:
    """``slots``: sessions that a node has room for; ``keeps``: what it may keep of checkpointed rows."""
    world = World(seed, net)
    nodes = list(dict.fromkeys(["entry", *spans]))
    for name in nodes:
        world.add(
            name,
            make=lambda disk, now, name=name: peer(
                name,
                world.rng_for(name),
                spans,
                nodes,
                step_s=step_s,
                eager=name == "entry",
                forgets=forgets,
                slots=slots,
                keeps=keeps,
            ),
            on_reset=lambda core, gone, now: core.lost(gone, "reset", now),
        )
    return world


SYSTEM = tuple(range(40, 60))


def request(
    rng: random.Random,
    max_tokens: int = 24,
    timeout_s: float = 300.0,
    longest: int = 40,
    common: bool = False,
    priority: Priority = "interactive",
    stop: tuple[int, ...] = (0,),
) -> m.SessionRequest:
    """``common``: half of the prompts begin with some of ``SYSTEM``, a few of those after another first token."""
    prompt = tuple(rng.randrange(97) for _ in range(rng.randint(1, longest)))
    known = min((0, 0, 7, 12)[prompt[0] % 4], len(prompt) - 1)
    if common and known:
        prompt = (41 if prompt[1] % 4 == 0 else 40, *SYSTEM[1:known], *prompt[known:])
    sampling = SamplingParams(max_tokens=max_tokens, seed=rng.randrange(1 << 32), stop_token_ids=stop)
    return m.SessionRequest(model="toy", prompt=prompt, sampling=sampling, timeout_s=timeout_s, priority=priority)


def start(
    world: World,
    count: int,
    max_tokens: int = 24,
    timeout_s: float = 300.0,
    longest: int = 40,
    common: bool = False,
    stop: tuple[int, ...] = (0,),
) -> dict[str, m.SessionRequest]:
    rng = world.rng_for("requests")
    wanted = {f"s{index}": request(rng, max_tokens, timeout_s, longest, common, stop=stop) for index in range(count)}
    for name, ask in wanted.items():
        world.do("entry", lambda core, now, name=name, ask=ask: core.open(name, ask, now))
    return wanted


class Client:
    """Reads one stream: from the node that it asked, and when that is gone or silent from whichever owns it."""

    def __init__(self, session: str, asked: m.SessionRequest, node: str = "entry") -> None:
        self.session, self.node, self.asked = session, node, asked
        self.expected = oracle(asked)
        self.tokens: list[int] = []
        self.end: Any = None
        self.moves = 0
        self._silent_since: float | None = None

    def poll(self, world: World) -> None:
        """Take what there is; P1 is checked here."""
        source = self._source(world, world.nodes[self.node])
        if source is None:
            self._look_around(world)
            return
        self._silent_since = None
        stream = source.streams[self.session]
        self.tokens += stream[len(self.tokens) :]
        assert self.tokens == self.expected[: len(self.tokens)], (self.session, self.node, "tokens differ")
        if self.session in source.ends:
            self.end = source.ends[self.session]

    def _source(self, world: World, node: Node, hops: int = 3) -> Peer | None:
        """The core that this client's node has the stream from: itself, or whoever it says owns the session now."""
        if not node.up or node.paused:
            return None
        core: Peer = node.core
        if self.session in core.sessions or isinstance(core.ends.get(self.session), e.Ended | e.Failed):
            return core
        moved = core.ends.get(self.session)
        if not isinstance(moved, e.Moved) or not hops:
            return None
        there = world.nodes[moved.owner]
        blocked = world.blocked(node.id, there.id) or world.blocked(there.id, node.id)
        return None if blocked else self._source(world, there, hops - 1)

    def _look_around(self, world: World) -> None:
        """Once silence has lasted: the owner of the highest epoch among the living, else one that saw it end."""
        if self._silent_since is None:
            self._silent_since = world.now
        node = world.nodes[self.node]
        if world.now - self._silent_since < (SILENCE_S if node.up else 0.5):
            return
        cores = [n.core for n in world.nodes.values() if n.up and not n.paused]
        owners = [core for core in cores if self.session in core.sessions]
        ended = [core for core in cores if isinstance(core.ends.get(self.session), e.Ended)]
        if owners or ended:
            best = max(owners, key=lambda core: core.sessions[self.session].epoch) if owners else ended[0]
            self.node, self._silent_since = best.me, None
            self.moves += 1


class Weather:
    """Clients, gossip and checkers of one world."""

    def __init__(self, world: World, wanted: dict[str, m.SessionRequest]) -> None:
        self.world = world
        self.clients = [Client(name, ask) for name, ask in wanted.items()]
        self.lost: list[str] = []
        self.counts: Counter[str] = Counter()
        self._held: dict[tuple[str, str], int] = {}
        """(session, node) -> the most tokens that its journal there ever had."""
        self._journals: dict[tuple[str, str], tuple[Any, str, int]] = {}
        """(session, node) -> the journal there, its owner, and how many tokens it had."""
        self._shown: dict[str, int] = {}
        """Session -> tokens shown by any owner, prompt included."""
        self._before: dict[tuple[str, str], tuple[Any, ...]] = {}
        """(session, node) -> what its hop was after the node's last step."""
        self._hops: dict[tuple[str, str], Any] = {}
        """(session, node) -> its hop as it was last seen there."""
        self._came: Counter[tuple[str, str, int, m.Epoch]] = Counter()
        """(session, node, its life, epoch) -> positions of which pages came there, without a gap."""
        self._unreachable: dict[tuple[str, str], float] = {}
        self._renew_at = RENEW_S
        world.after_step.append(self._check)
        self._poll()

    @property
    def over(self) -> bool:
        return all(client.end is not None for client in self.clients)

    def _poll(self) -> None:
        self._gossip()
        self._leave()
        if self.world.now >= self._renew_at:
            self._renew_at = self.world.now + RENEW_S
            for node in self.world.nodes.values():
                if node.up and node.core.sessions:
                    self.world.do(node.id, lambda core, now: core.renew())
        for client in self.clients:
            if client.end is None:
                client.poll(self.world)
            if client.end is None and not self._anybody_knows(client.session):
                client.end = "lost"
                self.lost.append(client.session)
        self.world.at(self.world.now + (RENEW_S if self.over else POLL_S), self._poll)

    def _anybody_knows(self, session: str) -> bool:
        """Some process still has the session, its journal or its result: it must not be lost.  What ended at a node
        that died before its client had the last of it is: the SDK then asks again under its key."""
        for node in self.world.nodes.values():
            if node.up and (
                session in node.core.sessions
                or isinstance(node.core.ends.get(session), e.Ended | e.Failed)
                or node.core.stage.journals.get(session)
            ):
                return True
        # On its way, as an Open say.
        return any(
            kind == "deliver" and getattr(c, "session", "") == session for _, _, kind, _, _, c in self.world._heap
        )

    def _leave(self) -> None:
        """Gossip says who is to go, and who is say so to the owners of their sessions, again and again."""
        leavers = {node.id for node in self.world.nodes.values() if node.up and node.core.leaving}
        for node in self.world.nodes.values():
            if node.up:
                node.core.leavers = leavers
        for name in sorted(leavers):
            self.world.do(name, lambda core, now: core.leave(now))

    def _gossip(self) -> None:
        """Tell every node whom it could not reach for ``GOSSIP_S``."""
        world, nodes = self.world, list(self.world.nodes.values())
        gone = [node for node in nodes if not node.up or node.paused]
        if not gone and not world.network.cuts:
            self._unreachable.clear()
            return
        for one in nodes:
            for other in nodes if world.network.cuts else gone:
                pair = (one.id, other.id)
                cut = world.blocked(*pair) or world.blocked(other.id, one.id)
                if one is other or not one.up or one.paused or not (cut or other in gone):
                    self._unreachable.pop(pair, None)
                elif world.now - self._unreachable.setdefault(pair, world.now) >= GOSSIP_S:
                    self._unreachable[pair] = float("inf")
                    world.do(one.id, lambda core, now, gone=other.id: core.lost(gone, "gossip", now))

    def _check(self, world: World, name: str) -> None:
        """P4, P6 and P7, after every step."""
        core: Peer = world.core(name)
        held, before, heard = self._held, self._before, world.heard
        for journal in core.stage.journals:
            key, length = (journal.session, name), len(journal.tokens)
            state = (journal, journal.owner, length)
            known = self._journals.get(key)
            if known == state:
                continue
            self._journals[key] = state
            if held.get(key, 0) < length:
                held[key] = length
            # An owner knows itself what it showed.
            if known is not None and known[0] is journal and length < known[2] and known[1] != journal.owner:
                assert length >= self._shown.get(key[0], 0), f"{name} forgets what was shown of {key[0]}"
        foreign = heard.session if isinstance(heard, m.PipelineMessage) and not isinstance(heard, m.Open) else None
        for session, hop in core.stage._sessions.items():
            tokens = len(hop.journal.tokens) if hop.journal is not None else 0
            now, was = (hop.epoch, hop.submitted, hop.sent, tokens), before.get((session, name))
            if session == foreign and was is not None and heard.epoch != was[0]:
                assert now == was, f"{name} follows {was[0]} and obeyed {type(heard).__name__} of {heard.epoch}"
            before[session, name] = now
        self._check_pages(heard, core, name)
        for session, position in core.shown:
            others = any(held.get((session, other), 0) > position for other in world.nodes if other != name)
            assert others or self._alone(core, session), f"{name} shows {session}[{position}], which nobody else holds"
            self._shown[session] = max(self._shown.get(session, 0), position + 1)
        if core.shown:
            core.shown.clear()
        self.counts["carried"] += core.engine.carried
        core.engine.carried = 0
        stage = core.stage
        assert stage._early.frames <= stage.config.held_frames
        assert stage.held_bytes <= stage.config.checkpoint_bytes, name
        assert stage.keeper.ledger.disk <= stage.config.checkpoint_disk, name
        if core.disk.due is not None or core.disk.pieces:
            self._check_disk(core, name)
        for effect in world.effects:
            if isinstance(effect, Send):
                self.counts["contested"] += isinstance(effect.message, m.Ahead)
                self.counts["given away"] += isinstance(effect.message, m.Disown) and bool(effect.message.drawn)
                self.counts["pages"] += isinstance(effect.message, m.Pages) and effect.message.n > 0
            elif isinstance(effect.event, Adopt | e.Moved):
                self.counts["adoptions" if isinstance(effect.event, Adopt) else "relays"] += 1

    def _check_disk(self, core: Peer, name: str) -> None:
        """P6 of what is spilled: what is held there is what boundaries hold, less what is on its way."""
        disk, counts = core.disk, self.counts
        held = {p.number for hop in core.stage._sessions.values() for p in hop.checkpoints._pieces}
        if disk.due is None:
            assert set(disk.pieces) == held, (name, disk.pieces, held)
        counts["spilled"] += disk.written
        counts["replayed from disk"] += disk.replayed
        counts["shipped from disk"] += disk.shipped
        counts["refused by disk"] += disk.refused
        disk.written = disk.replayed = disk.shipped = disk.refused = 0

    def _check_pages(self, heard: Any, core: Peer, name: str) -> None:
        """P4 of what is shipped: a hop begins with what came in the epoch that its ``Open`` names, and was accepted."""
        life = self.world.nodes[name].life
        if isinstance(heard, m.Pages):
            key = (heard.session, name, life, heard.epoch)
            self._came[key] += heard.n if heard.start == self._came[key] else 0
        elif isinstance(heard, m.Open):
            hop = core.stage._sessions.get(heard.session)
            if hop is not None and hop is not self._hops.get((heard.session, name)) and hop.done:
                epoch, accepted = heard.shipped or ((0, ""), 0)
                came = min(accepted, self._came[heard.session, name, life, epoch])
                assert hop.done <= max(came, hop.prefix.length), (
                    f"{name} begins {heard.session} at {hop.done}, {came} came in {epoch}"
                )
            self._hops[heard.session, name] = hop

    @staticmethod
    def _alone(core: Peer, session: str) -> bool:
        """It is all hops and found no witness."""
        mine = core.sessions.get(session)
        return mine is None or (mine.witness is None and mine.route is not None and needs_witness(mine.route, core.me))


def check_streams(world: World, wanted: dict[str, m.SessionRequest]) -> None:
    entry = world.core("entry")
    for name, ask in wanted.items():
        assert isinstance(entry.ends.get(name), e.Ended), (name, entry.ends.get(name), world.lines(40))
        assert entry.streams[name] == oracle(ask), name


def check_clients(weather: Weather) -> None:
    """P1 and P3: whole streams, but for those of which every holder was killed."""
    for client in weather.clients:
        if client.session in weather.lost:
            continue
        assert isinstance(client.end, e.Ended), (client.session, client.node, client.end, len(client.tokens))
        assert client.tokens == client.expected, client.session


def check_freed(world: World) -> None:
    for node in world.nodes.values():
        if node.up and not node.paused:
            assert node.core.sessions == {}, node.id
            assert node.core.stage.sessions() == [], node.id
            assert list(node.core.stage.journals) == [], node.id
            assert len(node.core.stage.arrivals) == 0, node.id
            assert node.core.stage.checkpoint_bytes == 0, node.id
            assert (node.core.stage.keeper.ledger.disk, node.core.stage.keeper.writing) == (0, 0), node.id
            assert node.core.disk.pieces == {}, node.id
            assert node.core.engine.sequences == {}, node.id
            assert set(node.core.engine.pages) == node.core.stage.pages.numbers(), node.id
            assert len(node.core.engine.pages) <= node.core.engine.room, node.id


def keeps_of(seed: int) -> Keeps:
    """In half of the schedules there is too little memory for checkpointed rows, and some disk, not always enough."""
    rng = random.Random(f"{seed}/keeps")
    if rng.random() < 0.5:
        return Keeps()
    return Keeps(ROW * rng.choice([1, 5, 10, 20]), ROW * rng.choice([20, 100, 1000]), rng.choice([0.0, 0.0, 0.1]))


def schedule(rng: random.Random, nodes: list[str]) -> list[Fault]:
    """At least two faults; half of the first ones strike the entry.  All are undone."""
    faults: list[Fault] = []
    at = rng.uniform(0.05, 1.0)
    for number in range(rng.randint(2, 4)):
        victim = "entry" if rng.random() < (0.5 if number == 0 else 0.2) else rng.choice(nodes)
        kind = rng.choice(["crash", "crash", "pause", "partition", "cut", "slow"])
        lasts = rng.uniform(0.2, 6.0)
        other = ("silent",) if kind == "crash" and rng.random() < 0.5 else ()
        faults.append(Fault(at, kind, (victim,), other, value=0.3 if kind == "slow" else 0.0))
        undo = {"crash": "restart", "pause": "resume", "slow": "slow"}.get(kind, "heal")
        faults.append(Fault(at + lasts, undo, (victim,)))
        at += lasts + rng.uniform(0.0, 1.0) if rng.random() < 0.7 else rng.uniform(0.05, 2.0)
    return faults


def weather_of(seed: int) -> tuple[str, list[Fault]]:
    """The layout and the faults of a schedule."""
    rng = random.Random(f"{seed}/weather")
    layout = rng.choice(list(LAYOUTS))
    return layout, schedule(rng, list(LAYOUTS[layout]))


def departures(rng: random.Random, nodes: list[str]) -> list[Fault]:
    """Nodes leave and come back, one after the other or at once; around it whatever else may happen."""
    faults: list[Fault] = []
    at = rng.uniform(0.05, 1.0)
    for number in range(rng.randint(2, 4)):
        victim = "entry" if rng.random() < 0.3 else rng.choice(nodes)
        stays = rng.choice([0.02, 0.3, 0.6, 1.5, 4.0]) * rng.uniform(0.5, 1.5)
        faults.append(Fault(at, "leave", (victim,)))
        faults.append(Fault(at + stays, "crash", (victim,)))
        faults.append(Fault(at + stays + rng.uniform(0.2, 2.0), "restart", (victim,)))
        if rng.random() < 0.5:
            other = rng.choice(nodes)
            when = at + rng.uniform(0.0, 0.6)
            kind = rng.choice(["crash", "pause", "cut"])
            undo = {"crash": "restart", "pause": "resume", "cut": "heal"}[kind]
            faults += [Fault(when, kind, (other,)), Fault(when + rng.uniform(0.2, 3.0), undo, (other,))]
        at += stays + rng.uniform(0.0, 2.0) if number % 2 else rng.uniform(0.0, 0.5)
    return faults


def departures_of(seed: int) -> tuple[str, list[Fault]]:
    rng = random.Random(f"{seed}/departures")
    layout = rng.choice(list(LAYOUTS))
    return layout, departures(rng, list(LAYOUTS[layout]))


def lossy_departures_of(seed: int) -> tuple[str, list[Fault]]:
    layout, faults = departures_of(seed)
    return layout, [Fault(0.0, "loss", value=0.1), *faults]


Schedules = Callable[[int], tuple[str, list[Fault]]]


def play(
    seed: int,
    sessions: int = 3,
    peer: type[Peer] = Peer,
    traced: bool = False,
    weather: Schedules = weather_of,
    keeps: Keeps | None = None,
) -> Weather:
    """One schedule: faults while ``sessions`` stream, P1, P3, P6 and P7, and P2 once leases have run out.

    ``keeps``: what nodes may keep of checkpointed rows; ``None``: as the seed says.

    A violation carries the schedule and the last events as notes: only then is the run traced, by doing it again.
    """
    keeps = keeps or keeps_of(seed)
    try:
        return _play(seed, sessions, peer, weather, keeps, traced)
    except AssertionError:
        return _play(seed, sessions, peer, weather, keeps, traced=True)


def _play(seed: int, sessions: int, peer: type[Peer], weather: Schedules, keeps: Keeps, traced: bool) -> Weather:
    layout, faults = weather(seed)
    net = NetParams(loss=0.01 if seed % 3 == 0 else 0.0)
    world = make_world(seed, net, LAYOUTS[layout], step_s=0.05, peer=peer, forgets=0.2, keeps=keeps)
    world.traced = traced
    world.schedule(faults)
    watched = Weather(world, start(world, sessions, TOKENS, longest=12, common=True))
    try:
        world.run(310.0, stop=lambda: watched.over)
        check_clients(watched)
        world.run(world.now + 250.0)
        check_freed(world)
    except AssertionError as violation:
        violation.add_note("\n".join([f"{layout} {keeps}", *map(str, faults), *world.lines(200)]))
        raise
    return watched
