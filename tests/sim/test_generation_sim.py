"""The production Session and Stage cores under weather: every stream ends with the undisturbed run's tokens."""

from __future__ import annotations

import gc
import random
from typing import Any

import msgspec
import pytest

from mesh.pipeline import events as e
from mesh.pipeline import hop as hops
from mesh.pipeline import messages as m
from mesh.pipeline import session, stage
from mesh.pipeline.keeping import Keeper
from mesh.pipeline.session import Session
from mesh.pipeline.stage import StageCore
from mesh.types import Priority, SamplingParams
from tests.sim import generation_mutants as mutants
from tests.sim.generation import ROW, FakeEngine, Keeps, oracle
from tests.sim.generation_scarce import endless, play_scarce
from tests.sim.generation_world import (
    LAYOUTS,
    Weather,
    check_clients,
    check_freed,
    check_streams,
    departures_of,
    lossy_departures_of,
    make_world,
    play,
    request,
    start,
    weather_of,
)
from tests.sim.world import Fault, NetParams


@pytest.mark.parametrize("sessions", [1, 5])
def test_a_quiet_run_gives_the_models_tokens_and_frees_everything(sessions: int) -> None:
    world = make_world(1)
    wanted = start(world, sessions)
    world.run(60.0, stop=lambda: len(world.core("entry").ends) == sessions)
    check_streams(world, wanted)
    world.run(world.now + 1.0)
    check_freed(world)


@pytest.mark.parametrize("victim", ["first", "middle", "sampler"])
@pytest.mark.parametrize("fault", ["crash", "silent", "pause"])
def test_a_lost_hop_is_rebuilt_and_survivors_compute_nothing_again(victim: str, fault: str) -> None:
    world = make_world(3)
    wanted = start(world, 1, max_tokens=60)
    entry = world.core("entry")
    world.run(60.0, stop=lambda: len(entry.streams["s0"]) >= 8 or bool(entry.ends))
    route = entry.sessions["s0"].route.hops
    node = route[{"first": 0, "middle": 1, "sampler": 2}[victim]].node
    before = {hop.node: world.core(hop.node).engine.computed_positions for hop in route}
    kind = "pause" if fault == "pause" else "crash"
    world.apply(Fault(world.now, kind, (node,), ("silent",) if fault == "silent" else ()))
    world.run(world.now + 30.0, stop=lambda: bool(entry.ends))
    check_streams(world, wanted)
    assert len(entry.recoveries) == 1
    positions = len(wanted["s0"].prompt) + len(entry.streams["s0"])
    for hop in route:
        if hop.node != node:
            again = before[hop.node] + positions
            # A survivor computes each position once, save for what was under way when the route changed.
            assert world.core(hop.node).engine.computed_positions <= positions + 2, (hop, again)


def test_frames_lost_repeated_and_reordered_change_nothing() -> None:
    world = make_world(5, NetParams(loss=0.05, duplicate=0.05, reorder=0.1))
    wanted = start(world, 4)
    world.run(250.0, stop=lambda: len(world.core("entry").ends) == 4)
    check_streams(world, wanted)


def test_a_session_waits_while_no_node_holds_a_span_and_goes_on_when_one_returns() -> None:
    world = make_world(7, spans={"a": (0, 3), "b": (3, 6)})
    wanted = start(world, 1, max_tokens=40)
    entry = world.core("entry")
    world.run(60.0, stop=lambda: len(entry.streams["s0"]) >= 5)
    world.apply(Fault(world.now, "crash", ("b",)))
    world.run(world.now + 20.0)
    assert not entry.ends
    world.apply(Fault(world.now, "restart", ("b",)))
    world.run(world.now + 30.0, stop=lambda: bool(entry.ends))
    check_streams(world, wanted)


@pytest.mark.parametrize("other", [(), ("silent",)], ids=["reset", "silent"])
def test_trying_the_only_holder_again_and_again_is_waiting_and_uses_up_no_retries(other: tuple[str, ...]) -> None:
    """Who is dead stays on the view for a while, the longer the busier the mesh: each try of it must not count."""
    world = make_world(7, spans={"a": (0, 3), "b": (3, 6)})
    wanted = start(world, 1, max_tokens=40)
    entry = world.core("entry")
    world.run(60.0, stop=lambda: len(entry.streams["s0"]) >= 5)
    world.apply(Fault(world.now, "crash", ("b",), other))
    world.run(world.now + 120.0)
    assert not entry.ends
    world.apply(Fault(world.now, "restart", ("b",)))
    world.run(world.now + 30.0, stop=lambda: bool(entry.ends))
    check_streams(world, wanted)


def test_a_session_ends_with_a_reason_at_its_deadline() -> None:
    world = make_world(7, spans={"a": (0, 3), "b": (3, 6)})
    start(world, 1, max_tokens=40, timeout_s=20.0)
    entry = world.core("entry")
    world.run(60.0, stop=lambda: len(entry.streams["s0"]) >= 5)
    world.apply(Fault(world.now, "crash", ("b",)))
    world.run(world.now + 30.0)
    end = entry.ends["s0"]
    assert (end.code, "of at most 40 tokens" in end.why) == ("timeout", True)


def test_full_hops_refuse_before_anything_is_computed() -> None:
    world = make_world(9, spans={"a": (0, 6)})
    for name in ("a",):
        world.core(name).engine = FakeEngine(random.Random(0), slots=1)
    start(world, 3)
    world.run(60.0, stop=lambda: len(world.core("entry").ends) == 3)
    ends = world.core("entry").ends
    assert sorted(type(end).__name__ for end in ends.values()) == ["Ended", "Failed", "Failed"]
    assert all(end.code in ("busy", "no_route") for end in ends.values() if isinstance(end, e.Failed))


@pytest.mark.parametrize("block", range(10))
def test_any_weather(block: int) -> None:
    """1,000 schedules of two to four faults over three sessions; ``scripts/simulate generation`` plays more."""
    thresholds, from_disk = gc.get_threshold(), 0
    gc.set_threshold(100_000)  # worlds are cycles, and few of them live at once: a sixth of the time
    try:
        for seed in range(100 * block, 100 * block + 100):
            from_disk += play(seed).counts["replayed from disk"]
    finally:
        gc.set_threshold(*thresholds)
    assert from_disk > 20, "memory for checkpointed rows was short in half of them"


def test_an_end_that_died_with_its_node_before_it_was_read_is_no_hang() -> None:
    """The owner ended and released a session, and was killed at once; another had yielded to it before."""
    world = make_world(11, spans=LAYOUTS["pure entry"], step_s=0.05)
    world.schedule([Fault(0.5, "partition", ("entry",)), Fault(4.0, "heal", ("entry",))])
    weather = Weather(world, start(world, 1, max_tokens=60))

    def winner() -> list[str]:
        return [n.id for n in world.nodes.values() if n.up and isinstance(n.core.ends.get("s0"), e.Ended)]

    assert world.run(100.0, stop=lambda: bool(winner()))
    assert isinstance(world.core("entry").ends["s0"], e.Moved)
    world.apply(Fault(world.now, "crash", tuple(winner())))
    assert world.run(200.0, stop=lambda: weather.over)
    assert weather.lost == ["s0"]


# -- shared prefixes ---------------------------------------------------------------------------------------------------


def lose_a_hop_of_a_shared_prefix() -> None:
    """A conversation goes on, at the hops that answered before; one is lost, and rebuilt from what the others hold."""
    world = make_world(3, spans={"a": (0, 2), "b": (2, 4), "c": (4, 6), "spare": (2, 4)})
    entry, others = world.core("entry"), ("a", "b", "c")
    for name in others:
        world.core(name).engine.room = 100
    world.apply(Fault(world.now, "crash", ("spare",)))
    ask = request(random.Random(1), max_tokens=60)
    world.do("entry", lambda core, now: core.open("first", ask, now))
    world.run(60.0, stop=lambda: "first" in entry.ends)
    world.run(world.now + 1.0)  # its pages are named when it is released
    known = (*ask.prompt, *entry.streams["first"])
    again = msgspec.structs.replace(ask, prompt=(*known[:50], 1), sampling=SamplingParams(max_tokens=24))
    before = {name: world.core(name).engine.computed_positions for name in others}
    world.do("entry", lambda core, now: core.open("again", again, now))
    world.run(world.now + 60.0, stop=lambda: len(entry.streams["again"]) >= 8)
    assert entry.sessions["again"].shared == 48  # whole pages of three, of what was prompt and what was answer
    world.apply(Fault(world.now, "restart", ("spare",)))
    world.apply(Fault(world.now, "crash", ("b",)))
    world.run(world.now + 60.0, stop=lambda: "again" in entry.ends)
    assert entry.streams["again"] == oracle(again)
    for name in ("a", "c"):  # each position once, save for what was under way
        computed = world.core(name).engine.computed_positions - before[name]
        assert computed <= len(again.prompt) + 24 - 48 + 2, (name, computed)


def test_a_shared_prefix_is_computed_by_no_hop_and_replayed_to_a_substitute() -> None:
    lose_a_hop_of_a_shared_prefix()


def test_a_prefix_hit_without_its_checkpoints_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hops, "Prefix", mutants.Hollow)
    with pytest.raises(AssertionError, match="'a'"):
        lose_a_hop_of_a_shared_prefix()


def ask_in_turn(*prompts: tuple[int, ...]) -> None:
    world = make_world(3, spans={"a": (0, 2), "b": (2, 4), "c": (4, 6)})
    entry = world.core("entry")
    for number, prompt in enumerate(prompts):
        ask = m.SessionRequest(model="toy", prompt=prompt, sampling=SamplingParams(max_tokens=4))
        world.do("entry", lambda core, now, name=f"s{number}", ask=ask: core.open(name, ask, now))
        world.run(world.now + 30.0, stop=lambda: not entry.sessions)
        assert entry.streams[f"s{number}"] == oracle(ask), f"tokens of {number} differ"


def test_pages_are_those_of_all_tokens_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ((9, 2, 3, 7), (1, 2, 3, 4, 5, 6, 7), (9, 2, 3, 4, 5, 6, 7))
    ask_in_turn(*prompts)
    monkeypatch.setattr(session, "chain_of", mutants.unchained)
    with pytest.raises(AssertionError, match="tokens of 2 differ"):
        ask_in_turn(*prompts)


# -- rows on the disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refuses", [0.0, 1.0])
def test_a_lost_hop_is_rebuilt_from_the_disk_and_without_one_from_further_upstream(refuses: float) -> None:
    """Memory holds one row of a boundary."""
    world = make_world(
        3, spans={"a": (0, 2), "b": (2, 4), "c": (4, 6), "d": (2, 4)}, keeps=Keeps(ROW, 1 << 20, refuses)
    )
    wanted = start(world, 1, max_tokens=60, stop=())
    entry = world.core("entry")
    world.run(60.0, stop=lambda: len(entry.streams["s0"]) >= 20)
    lost = entry.sessions["s0"].route.hops[1].node
    shown = len(wanted["s0"].prompt) + len(entry.streams["s0"])
    before = {name: world.core(name).engine.computed_positions for name in ("a", "c")}
    world.apply(Fault(world.now, "crash", (lost,)))
    world.run(world.now + 30.0, stop=lambda: bool(entry.ends))
    check_streams(world, wanted)
    rest = 60 - (shown - len(wanted["s0"].prompt))
    again = {name: world.core(name).engine.computed_positions - old - rest for name, old in before.items()}
    assert again["c"] <= 2, "save for what was under way"
    assert (again["a"] <= 2, world.core("a").disk.replayed >= shown - 2) == (
        (False, False) if refuses else (True, True)
    )
    world.run(world.now + 1.0)
    check_freed(world)


# -- the owner dies ----------------------------------------------------------------------------------------------------


def weathered(layout: str, faults: list[Fault], max_tokens: int = 24) -> Weather:
    """One session under ``faults``, to its end and until everything must be free."""
    world = make_world(11, spans=LAYOUTS[layout], step_s=0.05)
    world.schedule(faults)
    weather = Weather(world, start(world, 1, max_tokens))
    assert world.run(200.0, stop=lambda: weather.over)
    check_clients(weather)
    assert not weather.lost
    world.run(world.now + 250.0)
    check_freed(world)
    return weather


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("silent", [(), ("silent",)], ids=["reset", "silent"])
@pytest.mark.parametrize("at", [0.001, 0.3, 1.5, 3.0])
def test_the_owner_dies(layout: str, silent: tuple[str, ...], at: float) -> None:
    weather = weathered(layout, [Fault(at, "crash", ("entry",), silent)])
    client = weather.clients[0]
    assert client.node != "entry" or client.moves == 0
    assert weather.counts["adoptions"] >= (client.moves > 0)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_frozen_owner_wakes_and_passes_its_client_on(layout: str) -> None:
    weather = weathered(layout, [Fault(0.5, "pause", ("entry",)), Fault(4.5, "resume", ("entry",))])
    assert weather.counts["adoptions"] >= 1


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_an_owner_that_was_cut_off_shows_nothing_that_the_winner_did_not_accept(layout: str) -> None:
    weathered(layout, [Fault(0.5, "partition", ("entry",)), Fault(6.0, "heal", ("entry",))])


def test_the_owner_dies_during_a_recovery() -> None:
    weather = weathered("pure entry", [Fault(0.8, "crash", ("b1",)), Fault(0.801, "crash", ("b2",)),
                                       Fault(1.0, "crash", ("entry",)), Fault(3.0, "restart", ("b1",))])  # fmt: skip
    assert weather.clients[0].moves == 1


def test_the_adopter_dies_too() -> None:
    world = make_world(11, spans=LAYOUTS["pure entry"], step_s=0.05)
    weather = Weather(world, start(world, 1))
    world.run(0.8)
    world.apply(Fault(world.now, "crash", ("entry",)))
    world.run(20.0, stop=lambda: weather.counts["adoptions"] == 1)
    (adopter,) = [node for node in world.nodes.values() if node.up and node.core.sessions]
    world.run(world.now + 0.4)
    world.apply(Fault(world.now, "crash", (adopter.id,)))
    assert world.run(200.0, stop=lambda: weather.over)
    check_clients(weather)
    assert (weather.lost, weather.counts["adoptions"] >= 2) == ([], True)


def test_the_owner_dies_between_the_last_token_and_the_end() -> None:
    world = make_world(11, spans=LAYOUTS["pure entry"], step_s=0.05)
    weather = Weather(world, start(world, 1))

    def sampler_is_done() -> bool:
        return any(j.complete for node in world.nodes.values() if node.up for j in node.core.stage.journals)

    assert world.run(60.0, stop=sampler_is_done)
    world.apply(Fault(world.now, "crash", ("entry",)))
    assert world.run(200.0, stop=lambda: weather.over)
    check_clients(weather)
    assert weather.lost == []


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("owner", ["lives", "dies"])
@pytest.mark.parametrize("after", [0.0, 0.02, 0.06, 0.3, 2.0])
def test_who_is_cancelled_during_a_recovery_stays_so(layout: str, owner: str, after: float) -> None:
    """While a hop is rebuilt, while no route is found, before and while others adopt: everything is freed, and nobody
    adopts it later."""
    spans = dict(LAYOUTS[layout])
    world = make_world(11, spans=spans, step_s=0.05)
    start(world, 1, max_tokens=60, stop=())
    world.run(1.0)
    used = [hop.node for hop in world.core("entry").sessions["s0"].route.hops]
    lost = [name for name, span in spans.items() if span == spans[used[len(used) // 2]] and name != "entry"]
    for name in [*lost, *(["entry"] if owner == "dies" else [])]:
        world.apply(Fault(world.now, "crash", (name,)))
        spans.pop(name, None)  # as gossip tells all
    world.run(world.now + after)
    rest = [name for name in world.nodes if world.nodes[name].up]

    def owners() -> list[str]:
        return [name for name in rest if world.core(name).sessions]

    def held() -> bool:
        return any(list(world.core(name).stage.journals) for name in rest)

    assert world.run(world.now + 70.0, stop=lambda: bool(owners()) or not held()), "a service asks until it finds one"
    for name in owners():
        world.do(name, lambda core, now: core.cancel("s0", now))
    adopted = []
    ended = world.now
    while world.now < ended + 100.0:
        world.run(world.now + 0.5)
        adopted += owners()
    assert adopted == []
    check_freed(world)


# -- planned moves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(5))
def test_nodes_leave_in_any_weather(block: int) -> None:
    """Hops, owners and whole routes are to go: alone, together, during recoveries; successors and leavers die."""
    for seed in range(100 * block, 100 * block + 100):
        play(seed, weather=departures_of)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_rolling_restart_loses_nothing_and_computes_next_to_nothing_again(layout: str) -> None:
    world = make_world(11, spans=LAYOUTS[layout], step_s=0.02)
    for number, node in enumerate(world.nodes):
        for late, kind in ((0.0, "leave"), (1.0, "crash"), (2.0, "restart")):
            world.schedule([Fault(3.0 + 2.5 * number + late, kind, (node,))])  # type: ignore[arg-type]
    weather = Weather(world, start(world, 4, max_tokens=250, stop=()))
    assert world.run(200.0, stop=lambda: weather.over)
    check_clients(weather)
    assert weather.lost == []
    assert weather.counts["carried"] >= 4
    told = [event.recovery for node in world.nodes.values() for event in node.emitted if isinstance(event, e.Recovered)]
    moved = [trace for trace in told if trace.cause in ("moved", "owner moved")]
    assert len(moved) >= 8
    # A witness goes without a word, and is only replaced; every other change of route is planned.
    assert [trace for trace in told if trace.positions_replayed > 8] == []
    world.run(world.now + 250.0)
    check_freed(world)


def test_what_came_before_the_leaver_died_is_not_computed_again() -> None:
    """The old hop dies while its pages are on their way: the successor goes on from what it has."""
    world = make_world(3, spans={"a": (0, 3), "b1": (3, 6), "b2": (3, 6)}, step_s=0.05)
    weather = Weather(world, start(world, 1, max_tokens=60, stop=()))
    entry = world.core("entry")
    assert world.run(60.0, stop=lambda: len(entry.streams["s0"]) >= 8)
    leaver = entry.sessions["s0"].route.hops[1].node
    world.core(leaver).leaving = True
    other = world.core({"b1": "b2", "b2": "b1"}[leaver])
    assert world.run(60.0, stop=lambda: any(x.have > 8 for x in other.stage.arrivals._arrivals.values()))
    prompt = len(entry.sessions["s0"].request.prompt)
    came = next(iter(other.stage.arrivals._arrivals.values())).have
    world.apply(Fault(world.now, "crash", (leaver,)))
    assert world.run(60.0, stop=lambda: weather.over)
    check_clients(weather)
    positions = prompt + len(weather.clients[0].tokens) - 1  # the last token's are never computed
    assert other.engine.computed_positions == positions - came


# -- negative controls: each mistake is seen by a pinned seed ----------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "seed"),
    [
        (mutants.OlderEpochsObeyed, 20),
        (mutants.NewerEpochsObeyed, 58),
        (mutants.OwnerNotInEpoch, 549),
        (mutants.Untrimmed, 66),
        (mutants.Shifted, 0),
        (mutants.Deaf, 0),
        (mutants.Hasty, 1),
        (mutants.HeedlessClaim, 58),
        (mutants.PagesOfAnyEpoch, 115),
        (mutants.MoreThanArrived, 0),
        (mutants.PiecesUnchecked, 45),
        (mutants.UntrimmedOnDisk, 21),
        (mutants.AnyPiece, 228),
        (mutants.Hoarding, 3),
    ],
)
def test_mistakes_are_seen(mistake: type, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = mutants.peer_with()
    if issubclass(mistake, StageCore):
        peer = mutants.peer_with(stage=mistake)
    elif issubclass(mistake, Session):
        peer = mutants.peer_with(session=mistake)
    else:
        where, name = (stage, "Keeper") if issubclass(mistake, Keeper) else (hops, "Checkpoints")
        monkeypatch.setattr(where, name, mistake)
    of_moves = {
        mutants.PagesOfAnyEpoch: lossy_departures_of,
        mutants.MoreThanArrived: departures_of,
        mutants.PiecesUnchecked: departures_of,
    }
    of_disks = (mutants.UntrimmedOnDisk, mutants.AnyPiece, mutants.Hoarding)
    keeps = None if mistake in of_disks else Keeps()
    with pytest.raises(AssertionError):
        play(seed, peer=peer, weather=of_moves.get(mistake, weather_of), keeps=keeps)


# -- too little room ---------------------------------------------------------------------------------------------------


def test_a_higher_class_flows_while_a_lower_one_waits_and_then_goes_on() -> None:
    world = make_world(21, spans={"a": (0, 3), "b": (3, 6)}, slots=2)
    rng, entry = world.rng_for("requests"), world.core("entry")
    wanted = {f"b{n}": endless(rng, 60, "batch") for n in range(2)}
    urgent = {f"i{n}": endless(rng, 20, "interactive") for n in range(2)}
    for name, ask in wanted.items():
        world.do("entry", lambda core, now, name=name, ask=ask: core.open(name, ask, now))
    assert world.run(60.0, stop=lambda: all(len(entry.streams[name]) > 5 for name in wanted))
    for name, ask in urgent.items():
        world.do("entry", lambda core, now, name=name, ask=ask: core.open(name, ask, now))
    assert world.run(60.0, stop=lambda: all(name in entry.ends for name in urgent))
    assert not any(name in entry.ends for name in wanted)
    assert entry.recoveries == [], "those of a higher class were never interrupted"
    assert world.run(120.0, stop=lambda: all(name in entry.ends for name in wanted))
    check_streams(world, wanted | urgent)
    assert {told.cause for told in entry.recoveries} == {"paused"}
    world.run(world.now + 1.0)
    check_freed(world)


def test_half_of_the_nodes_are_lost_and_nothing_accepted_is() -> None:
    """Room for four sessions, then for two: those of the higher class go on, the others wait for them."""
    world = make_world(22, slots=2)
    rng, entry = world.rng_for("requests"), world.core("entry")
    classes: list[Priority] = ["batch", "interactive", "batch", "interactive"]
    wanted = {f"{each}-{n}": endless(rng, 40, each) for n, each in enumerate(classes)}
    weather = Weather(world, {})
    for name, ask in wanted.items():
        world.do("entry", lambda core, now, name=name, ask=ask: core.open(name, ask, now))
        assert world.run(world.now + 60.0, stop=lambda name=name: len(entry.streams[name]) > 2 or name in entry.ends)
    for node in ("a1", "b1", "c1"):
        world.apply(Fault(world.now, "crash", (node,)))
    urgent = [name for name in wanted if name.startswith("interactive")]
    assert world.run(world.now + 60.0, stop=lambda: all(name in entry.ends for name in urgent))
    assert not any(name in entry.ends for name in wanted if name not in urgent)
    assert world.run(world.now + 120.0, stop=lambda: len(entry.ends) == len(wanted))
    check_streams(world, wanted)
    assert weather.lost == []


@pytest.mark.parametrize("block", range(2))
def test_any_weather_with_too_little_room(block: int) -> None:
    """60 schedules: seven sessions of all classes, nodes with room for two or three."""
    pauses = 0
    for seed in range(30 * block, 30 * block + 30):
        pauses += play_scarce(seed).counts["pauses"]
    assert pauses > 20, "room was scarce"


@pytest.mark.parametrize(
    ("where", "name", "mistake", "seed"),
    [(hops, "Checkpoints", mutants.Untrimmed, 6), (stage, "victims", mutants.anybody_gives_way, 0)],
)
def test_mistakes_with_too_little_room_are_seen(
    where: Any, name: str, mistake: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, mistake)
    with pytest.raises(AssertionError):
        play_scarce(seed, keeps=Keeps())
