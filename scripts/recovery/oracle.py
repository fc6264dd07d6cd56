"""The oracle with real processes: for each (hop, moment, fault, greedy or seeded) the tokens of an undisturbed run.

One mesh is used for all cases; what a case struck runs again before the next.  The entry is no hop (what happens when
it dies is tests/live/test_entry_dies.py), two nodes more than a route takes stand by.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from scripts.local_mesh import LocalMesh, LocalNode
from scripts.recovery.striking import Streamed, Strikes, by_name, coordinator_of, knowing, running_route

NODES, LAYERS, HOP_LAYERS = 6, 8, 3
CONTEXT = 512
GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 11}
HOPS = ("first", "middle", "last")
MOMENTS = ("prefill", "decode", "end")
PROMPT = {"prefill": 400, "decode": 60, "end": 60}
TOKENS = {"prefill": 60, "decode": 200, "end": 60}
STRIKE_AT = {"decode": 20, "end": -2}
"""The piece at which the fault comes, of the end counted from there: a special token is no piece.  ``prefill``: as soon
as the session has a route."""
AGAIN_S = 0.15
"""The second fault of ``during`` comes so long after the first: before a lost hop's tokens flow again."""


class Case(msgspec.Struct, frozen=True):
    """What strikes whom when."""

    hop: Literal["first", "middle", "last", "coordinator"]
    moment: Literal["prefill", "decode", "end"]
    fault: str
    """``kill``, ``freeze``, ``slow``, ``partition``, ``deaf`` or ``mute``."""
    seeded: bool = False
    then: Literal["", "row", "neighbour", "during"] = ""
    """A second node of the route: struck when tokens flow again, at the same moment, or during the recovery."""
    whole: bool = False
    """Not streamed."""

    @property
    def name(self) -> str:
        words = [self.hop, self.moment, self.fault, self.then, "whole" if self.whole else ""]
        return "-".join([*filter(None, words), "seeded" if self.seeded else "greedy"])


class Outcome(msgspec.Struct, frozen=True):
    """What became of a case."""

    case: Case
    failure: str = ""
    """Empty: every token was that of the undisturbed run."""
    pause_s: float = 0.0
    recoveries: tuple[dict[str, Any], ...] = ()
    struck: tuple[str, ...] = ()
    route: tuple[str, ...] = ()


def sweep(faults: Sequence[str]) -> list[Case]:
    """The full table: every hop, moment, fault and sampling, and the double faults."""
    singles = itertools.product(HOPS, MOMENTS, faults, (False, True))
    cases = [Case(hop, moment, fault, seeded) for hop, moment, fault, seeded in singles]  # type: ignore[arg-type]
    for then, seeded in itertools.product(("row", "neighbour", "during"), (False, True)):
        cases += [Case(hop, "decode", "kill", seeded, then) for hop in HOPS]  # type: ignore[arg-type]
    cases += [Case("coordinator", "decode", fault, True) for fault in faults]
    return [*cases, *(Case(hop, "decode", "kill", False, whole=True) for hop in HOPS)]  # type: ignore[arg-type]


class Oracle:
    """Plays cases on one mesh, whose first model spells its tokens (every piece names what was drawn)."""

    def __init__(self, mesh: LocalMesh, strikes: Strikes, model: str) -> None:
        self.mesh, self.strikes, self.model = mesh, strikes, model

    def play(self, case: Case) -> Outcome:
        """One case; the mesh is whole again at its end."""
        leader = coordinator_of(self.mesh) if case.hop == "coordinator" else None
        entry, others = self._parts(leader)
        body = self.body(case, others)
        try:
            expected = entry.within(lambda: self._undisturbed(entry, body))
            return entry.within(lambda: self._struck(case, leader, entry, body, expected))
        finally:
            self.strikes.undo()

    def body(self, case: Case, others: list[LocalNode]) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": self.prompt(case),
            "max_tokens": TOKENS[case.moment],
            "ignore_eos": True,
            "mesh": {"max_layers": HOP_LAYERS, "allowed_nodes": [node.name for node in others]},
            **(SEEDED if case.seeded else GREEDY),
        }

    @staticmethod
    def prompt(case: Case) -> list[int]:
        """Another one for each case: no node has pages of it."""
        rng = random.Random(case.name)
        return [rng.randrange(3, 250) for _ in range(PROMPT[case.moment])]

    def _parts(self, leader: LocalNode | None) -> tuple[LocalNode, list[LocalNode]]:
        """An entry, and the nodes that its route may use: neither is the coordinator, if that is to be struck."""
        entry, *others = [node for node in self.mesh.nodes if node is not leader]
        return entry, others

    def _undisturbed(self, entry: LocalNode, body: dict[str, Any]) -> str:
        """The text of the same request without a fault, by one hop: no pages are shared with the route to be struck."""
        return Streamed(self.mesh, entry, body | {"mesh": body["mesh"] | {"max_layers": LAYERS}}).run().text

    def _struck(
        self, case: Case, leader: LocalNode | None, entry: LocalNode, body: dict[str, Any], expected: str
    ) -> Outcome:
        streamed = Streamed(self.mesh, entry, body)
        blow = _Blow(self.strikes, case, leader, streamed, len(expected.split()))
        watch = threading.Thread(target=self._watch, args=(case, entry, blow))
        watch.start()
        try:
            if case.whole:
                streamed.text = _whole(self.mesh, entry, streamed)
            else:
                streamed.try_run(blow.piece)
        finally:
            blow.over.set()
            watch.join()
        at = blow.struck[0][0] if blow.struck else time.monotonic()
        return Outcome(
            case,
            _verdict(case, streamed, blow, expected),
            round(streamed.pause_s(at), 3),
            streamed.recoveries,
            tuple(name for _, name in blow.struck),
            blow.route,
        )

    def _watch(self, case: Case, entry: LocalNode, blow: _Blow) -> None:
        """Learn the route as soon as there is one, and strike where no piece is waited for."""
        while not blow.over.is_set() and not blow.route:
            with contextlib.suppress(OSError):  # it is busy: ask again
                blow.route = running_route(entry)
        if case.moment == "prefill" and blow.route:
            blow.first()
        elif case.whole:
            blow.over.wait(0.1)
            blow.first()


class _Blow:
    """The faults of one case, each struck once."""

    def __init__(self, strikes: Strikes, case: Case, leader: LocalNode | None, streamed: Streamed, pieces: int) -> None:
        """``pieces``: of the undisturbed run."""
        self.strikes, self.case, self.leader, self.streamed = strikes, case, leader, streamed
        at = STRIKE_AT.get(case.moment, 1 << 30)
        self._first_at = at if at > 0 else pieces + at
        self.over = threading.Event()
        self.route: tuple[str, ...] = ()
        self.struck: list[tuple[float, str]] = []
        self._second_at = 0

    def piece(self, count: int) -> None:
        """A piece came."""
        self.route = self.route or self.streamed.route
        if count >= self._first_at and not self.struck and self.route:
            self.first()
            self._second_at = count + 40  # past what was on its way already
        elif self.case.then == "row" and len(self.struck) == 1 and count >= self._second_at:
            self._strike(1)

    def first(self) -> None:
        self._strike(0, *([1] if self.case.then == "neighbour" else []))
        if self.case.then == "during":
            timer = threading.Timer(AGAIN_S, self._strike, [1])
            timer.daemon = True
            timer.start()

    def _strike(self, *which: int) -> None:
        """The hop of the case (0), its neighbour (1)."""
        if self.leader is not None:  # as it was before the stream: by now the entry may lead, which is another case
            nodes = [self.leader]
        else:
            place = HOPS.index(self.case.hop)
            beside = place + 1 if place < len(HOPS) - 1 else place - 1
            nodes = by_name(self.strikes.mesh, [self.route[(place, beside)[index]] for index in which])
        self.strikes.strike(self.case.fault, *nodes)
        self.struck += [(time.monotonic(), node.name) for node in nodes]


def _whole(mesh: LocalMesh, entry: LocalNode, streamed: Streamed) -> str:
    params = {name: value for name, value in streamed.body.items() if name != "prompt"}
    with knowing(mesh, entry) as client:
        answer = client.complete(streamed.body["prompt"], **params)
    streamed.finish, streamed.recoveries = answer.finish_reason, answer.usage.recoveries
    return str(answer.text)


def _verdict(case: Case, streamed: Streamed, blow: _Blow, expected: str) -> str:
    """What is wrong; empty: nothing."""
    if streamed.error:
        return streamed.error
    if streamed.text != expected:
        return f"other tokens: {streamed.text!r} instead of {expected!r}"
    if streamed.finish != "length":
        return f"finish reason {streamed.finish!r}"
    if len(blow.struck) < (2 if case.then else 1):
        return f"struck only {blow.struck}: the stream was over"
    # The mesh may have been done already, or may have waited for a node that was only slow or froze at the end.
    sure = case.moment == "decode" and case.fault in ("kill", "freeze") and case.hop != "coordinator"
    if sure and not streamed.recoveries:
        return "no recovery is told of"
    for told in streamed.recoveries:
        if told["exact"] != "bitwise" or told["pause_ms"] < 0.0 or not told["detected_by"]:
            return f"a strange trace: {told}"
    return ""
