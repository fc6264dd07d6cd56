"""F1 to F5: streams over a mesh of the bench model, one node struck in each trial, and what others do instead."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from scripts.figures import nearest_rank, spread
from scripts.local_mesh import LocalMesh, LocalNode
from scripts.recovery.striking import Streamed, Strikes, by_name, coordinator_of

PROMPT, BEFORE, TOKENS = 240, 16, 64
"""Positions of a prompt, tokens of the slowest stream at the fault (context 256 then), and of all."""
HOP_LAYERS, LAYERS = 3, 12
WINDOW_S = 3.0
"""F5 compares the gaps between tokens so long before the fault and after it."""
HOPS = ("first", "second", "third", "last")


class Trial(msgspec.Struct):
    """One fault."""

    fault: str
    hop: str
    pauses: list[float]
    """Of the streams that it struck, s: from the fault, or the last token that was on its way, to the next."""
    told: list[float]
    """Of the same, as the trace tells it: from the detection to the next token."""
    replayed: list[int]
    equal: int
    """Streams with the tokens of the undisturbed run, of ``streams``."""
    streams: int
    causes: dict[str, int]
    inexact: int
    """Recoveries that did not promise the same bits."""
    gaps: dict[str, list[float]]
    """Between tokens, ``before`` and ``after``."""
    errors: list[str]


class Pauses:
    """Trials on one mesh; the entry is no hop."""

    def __init__(self, mesh: LocalMesh, model: str, streams: int, tell: Callable[[str], None]) -> None:
        self.mesh, self.model, self.streams, self.tell = mesh, model, streams, tell
        self.strikes = Strikes(mesh)
        self._asked = 0
        self.restart_s: list[float] = []
        """What a restart from scratch takes until each stream is where it was: it took so long before the fault."""
        self.reprefill_s: list[float] = []
        """What prompt and tokens as one new prompt, through all layers, take until each stream goes on."""

    # -- streams -------------------------------------------------------------------------------------------------------

    def bodies(self, nodes: list[LocalNode], more: int = 0, tokens: int = TOKENS) -> list[dict[str, Any]]:
        """Prompts that were not asked for before, so that no node has pages of them."""
        self._asked += self.streams
        return [self._body(self._asked + number, nodes, more, tokens) for number in range(self.streams)]

    def _body(self, number: int, nodes: list[LocalNode], more: int, tokens: int) -> dict[str, Any]:
        """Every second stream is greedy, the others are seeded."""
        rng = random.Random(number)
        seeded = {"temperature": 1.0, "top_p": 0.95, "seed": number}
        return {
            "model": self.model,
            "prompt": [rng.randrange(3, 250) for _ in range(PROMPT + more)],
            "max_tokens": tokens,
            "ignore_eos": True,
            "mesh": {"max_layers": HOP_LAYERS, "allowed_nodes": [node.name for node in nodes]},
            **(seeded if number % 2 else {"temperature": 0}),
        }

    def stream_all(
        self, entry: LocalNode, bodies: list[dict[str, Any]], on_strike: Callable[[list[Streamed]], None] | None = None
    ) -> list[Streamed]:
        """All at once, to the end; ``on_strike`` when each has ``BEFORE`` tokens."""
        group = [Streamed(self.mesh, entry, body) for body in bodies]
        struck = threading.Event()

        def on_piece(count: int) -> None:
            if on_strike and not struck.is_set() and all(len(one.pieces) >= BEFORE or one.error for one in group):
                struck.set()
                on_strike(group)

        threads = [threading.Thread(target=one.try_run, args=(on_piece,)) for one in group]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return group

    def warm_up(self) -> None:
        """And what others would do in place of a recovery."""
        entry, nodes = self.mesh.nodes[0], self.mesh.nodes[1:]
        self.stream_all(entry, self.bodies(nodes, tokens=4))
        for _ in range(2):
            again = self.stream_all(entry, self.bodies(nodes, BEFORE, 2))
            errors = [one.error for one in again if one.error]
            assert not errors, errors
            self.reprefill_s += [one.pieces[0][0] - one.asked_at for one in again]

    def undisturbed(self, entry: LocalNode, bodies: list[dict[str, Any]]) -> list[str]:
        """The texts without a fault, by one hop: they share no pages with the routes that are struck."""
        whole = [body | {"mesh": body["mesh"] | {"max_layers": LAYERS}} for body in bodies]
        quiet = self.stream_all(entry, whole)
        errors = [one.error for one in quiet if one.error]
        assert not errors, errors
        return [one.text for one in quiet]

    # -- faults --------------------------------------------------------------------------------------------------------

    def trial(self, fault: str, number: int) -> Trial:
        """``kill`` or ``freeze`` a hop, the hops in turn; ``entry`` or ``coordinator``: kill that one."""
        leader = coordinator_of(self.mesh) if fault == "coordinator" else None
        entry, *nodes = [node for node in self.mesh.nodes if node is not leader]
        hop = HOPS[number % len(HOPS)] if fault in ("kill", "freeze") else fault
        at: list[tuple[float, LocalNode]] = []

        def strike(group: list[Streamed]) -> None:
            if fault in ("kill", "freeze"):
                victim = by_name(self.mesh, [group[0].route[HOPS.index(hop)]])[0]
            else:
                victim = entry if leader is None else leader
            at.append((time.monotonic(), victim))
            self.strikes.strike("freeze" if fault == "freeze" else "kill", victim)

        bodies = self.bodies(nodes)
        expected = self.undisturbed(entry, bodies)
        try:
            group = self.stream_all(entry, bodies, strike)
        finally:
            self.strikes.undo()
            self.mesh.wait_holders(len(self.mesh.nodes))
        assert at, "a stream ended before each of them had enough tokens"
        trial = self._judged(fault, hop, at[0][0], group, expected)
        self.tell(
            f"{fault} {hop}: {trial.equal} of {trial.streams} equal; {len(trial.pauses)} paused for "
            f"{_round(trial.pauses)} s, of that after the detection {_round(trial.told)} s, "
            f"replayed {trial.replayed}; {trial.causes} {trial.errors or ''}"
        )
        return trial

    def _judged(self, fault: str, hop: str, at: float, group: list[Streamed], expected: list[str]) -> Trial:
        self.restart_s += [one.pieces[BEFORE - 1][0] - one.asked_at for one in group if len(one.pieces) >= BEFORE]
        hit = [one for one in group if one.recoveries or one.moves]
        told = [trace for one in group for trace in one.recoveries]
        causes: dict[str, int] = {}
        for trace in told:
            name = f"{trace['cause']} by {trace['detected_by']}"
            causes[name] = causes.get(name, 0) + 1
        return Trial(
            fault=fault,
            hop=hop,
            pauses=[one.pause_s(at) for one in hit],
            told=[sum(trace["pause_ms"] for trace in one.recoveries) / 1e3 for one in hit],
            replayed=sorted({trace["positions_replayed"] for trace in told}),
            equal=sum(one.text == wanted for one, wanted in zip(group, expected, strict=True)),
            streams=len(group),
            causes=causes,
            inexact=sum(trace["exact"] != "bitwise" for trace in told),
            gaps={
                "before": [gap for one in group for gap in one.gaps(at - WINDOW_S, at)],
                "after": [gap for one in group for gap in one.gaps(at, at + WINDOW_S)],
            },
            errors=[one.error for one in group if one.error],
        )


# -- figures -----------------------------------------------------------------------------------------------------------


def of_kills(trials: list[Trial], replay_s: float) -> dict[str, Any]:
    """F1: median and longest pause; after its detection no pause is longer than 1.3 x a batched replay and 0.2 s."""
    pauses, told = _all(trials, "pauses"), _all(trials, "told")
    bound = 1.3 * replay_s + 0.2
    found = _profile(trials) | {
        "longest": round(max(pauses, default=0.0), 3),
        "longest_after_detection": round(max(told, default=0.0), 3),
        "bound_after_detection": round(bound, 3),
        "batched_replay": round(replay_s, 3),
    }
    holds = bool(pauses) and found["median"] <= 0.6 and max(told) <= bound and max(pauses) <= 1.5
    goal = "median <= 0.6; longest <= detection + 1.3 x batched replay + 0.2 and <= 1.5"
    return {"value": found, "unit": "s", "goal": goal, "holds": holds, "anchor": "13 (mesh-llm), 32.6 (shard)"}


def of_freezes(trials: list[Trial]) -> dict[str, Any]:
    pauses = _all(trials, "pauses")
    held = bool(pauses) and nearest_rank(pauses, 0.99) <= 3.0
    return {
        "value": _profile(trials),
        "unit": "s",
        "goal": "p99 <= 3",
        "holds": held,
        "anchor": "180 (Petals), 600 (Parallax)",
    }


def of_entries(trials: list[Trial]) -> dict[str, Any]:
    pauses = _all(trials, "pauses")
    held = bool(pauses) and nearest_rank(pauses, 0.99) <= 3.0
    return {"value": _profile(trials), "unit": "s", "goal": "p99 <= 3", "holds": held, "anchor": "the request is lost"}


def of_coordinators(trials: list[Trial]) -> dict[str, Any]:
    """F5: no recovery, and the gaps between tokens after the kill are those of before."""
    before = [gap for trial in trials for gap in trial.gaps["before"]]
    after = [gap for trial in trials for gap in trial.gaps["after"]]
    found = {
        "gap_p99_before": round(nearest_rank(before, 0.99), 3),
        "gap_p99_after": round(nearest_rank(after, 0.99), 3),
        "longest_before": round(max(before, default=0.0), 3),
        "longest_after": round(max(after, default=0.0), 3),
        "recoveries": sum(sum(trial.causes.values()) for trial in trials),
        "n": len(trials),
    }
    holds = bool(after) and not found["recoveries"] and found["gap_p99_after"] <= 1.2 * found["gap_p99_before"]
    return {"value": found, "unit": "s", "goal": "p99 of gaps after <= 1.2 x before, no recovery", "holds": holds,
            "anchor": "exo loses all instances"}  # fmt: skip


def of_equality(trials: list[Trial]) -> dict[str, Any]:
    streams, equal = sum(trial.streams for trial in trials), sum(trial.equal for trial in trials)
    found = {
        "equal": equal,
        "streams": streams,
        "recoveries": sum(sum(trial.causes.values()) for trial in trials),
        "inexact": sum(trial.inexact for trial in trials),
        "errors": [error for trial in trials for error in trial.errors][:5],
    }
    return {
        "value": found,
        "unit": "streams",
        "goal": "all",
        "holds": 0 < equal == streams,
        "anchor": "none promises it",
    }


def of_others(pauses: Pauses) -> dict[str, Any]:
    """What the streams would have waited without recovery, detection not counted."""
    found = {
        "restart_from_scratch": spread(pauses.restart_s, None, None)["value"],
        "reprefill_all_layers": spread(pauses.reprefill_s, None, None)["value"],
    }
    return {"value": found, "unit": "s", "goal": "beside F1", "holds": True, "anchor": None}


def _profile(trials: list[Trial]) -> dict[str, Any]:
    """Where the time of a pause goes: until the detection, and from there on."""
    pauses, told = _all(trials, "pauses"), _all(trials, "told")
    detection = [pause - after for pause, after in zip(pauses, told, strict=True)]
    causes: dict[str, int] = {}
    for trial in trials:
        for cause, count in trial.causes.items():
            causes[cause] = causes.get(cause, 0) + count
    median = statistics.median
    return {
        "median": round(median(pauses), 3) if pauses else None,
        "p99": round(nearest_rank(pauses, 0.99), 3),
        "detection_median": round(median(detection), 3) if pauses else None,
        "after_detection_median": round(median(told), 3) if pauses else None,
        "by_hop": {
            hop: round(median(found), 3)
            for hop in dict.fromkeys(trial.hop for trial in trials)
            if (found := [pause for trial in trials if trial.hop == hop for pause in trial.pauses])
        },
        "causes": causes,
        "pauses": len(pauses),
        "n": len(trials),
    }


def _all(trials: list[Trial], field: str) -> list[float]:
    return [value for trial in trials for value in getattr(trial, field)]


def _round(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"
