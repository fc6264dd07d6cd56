"""The status document: names, rounding, and that it is JSON."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from mesh.pipeline.messages import SessionRequest
from mesh.pipeline.session import State
from mesh.placement import Assigned, ModelPlacement, Placement
from mesh.types import Hop, LayerSpan, Load, NodeProfile, Route, SamplingParams
from mesh.view import MemberView, MeshView
from node.advice import failover_gap
from node.api.service import Recovery
from node.status import status_document
from tests.mesh.exhaustive import model

SPANS = (Assigned("a", LayerSpan("m", 0, 8)), Assigned("b", LayerSpan("m", 4, 8)))


def view(**changes: Any) -> MeshView:
    loaded = NodeProfile(
        name="ann", peer="h:1", api="http://h:2", spans=(LayerSpan("m", 0, 8),), loading=(LayerSpan("m", 0, 9),),
        fetched=40, refused=("m[0:9]: no room",),
        load=Load(running=1, tokens_per_s=1.2345, step_ms=1.2345, lag_ms=0.06),
    )  # fmt: skip
    members = (MemberView("a", "alive", loaded, rtt_ms=1.23456), MemberView("b", "suspect", degraded=True))
    made = MeshView("a", members, Placement((ModelPlacement(model(), SPANS),)), (1 << 40, 6), coordinator="b", term=9)
    return msgspec.structs.replace(made, **changes)


def session(route: Route | None) -> Any:
    request = SessionRequest(model="m", prompt=(1, 2), sampling=SamplingParams(), priority="batch")
    core = SimpleNamespace(
        id="s1",
        me="a",
        request=request,
        state=State.RUNNING,
        route=route,
        drawn=[5, 6, 7],
        waits_for="",
    )
    return SimpleNamespace(session=core, recoveries=(Recovery("reset", "1", "gossip", 12.5, 7, "tokens"),))


def document(seen: MeshView, *sessions: Any) -> dict[str, Any]:
    made = status_document(
        seen, mesh_id="m1", name="ann", voters=("a", "b"), epoch=2, version=11, term=8, sessions=list(sessions),
        waiting={"interactive": 0, "normal": 1, "batch": 3}, limits={"interactive": 64, "normal": 64, "batch": 2},
        addresses={"b": "h:9"}, checkpoints={"memory_bytes": 5, "disk_bytes": 7, "dropped_bytes": 0},
    )  # fmt: skip
    assert json.loads(json.dumps(made)) == made
    return made


def test_the_mesh() -> None:
    made = document(view())
    top = ("mesh_id", "node_id", "name", "coordinator", "term", "voters", "degraded")
    assert [made[key] for key in top] == ["m1", "a", "ann", "b", 9, ["a", "b"], None]
    assert document(view(degraded="alone", coordinator=None))["degraded"] == "alone"


def test_the_placement_names_the_record_that_it_is_of() -> None:
    placement = document(view())["placement"]
    assert (placement["id"], placement["term"], placement["version"]) == ([2, 6], 8, 11)
    spans = [{"node": "a", "start": 0, "end": 8}, {"node": "b", "start": 4, "end": 8}]
    assert placement["models"] == [
        {"id": "m", "layers": 8, "dtype": "bfloat16", "quantize": None, "missing": None, "spans": spans}
    ]


def test_members() -> None:
    one, other = document(view())["members"]
    assert one["spans"] == [{"model": "m", "start": 0, "end": 8}]
    assert one["loading"] == [{"model": "m", "start": 0, "end": 9}]
    assert (one["fetched"], one["refused"], one["rtt_ms"], one["peer"]) == (40, ["m[0:9]: no room"], 1.235, "h:1")
    assert (one["load"]["tokens_per_s"], one["load"]["step_ms"], one["load"]["lag_ms"]) == (1.2, 1.23, 0.1)
    assert (other["name"], other["state"], other["degraded"], other["peer"]) == ("b", "suspect", True, "h:9")


def test_survivability_is_never_below_none() -> None:
    assert document(view())["survivability"] == {"m": {"nodes_that_may_fail": 0}}
    nobody = view(members=())
    assert document(nobody)["survivability"] == {"m": {"nodes_that_may_fail": 0}}


def test_sessions() -> None:
    route = Route("m", (Hop("a", 0, 4), Hop("b", 4, 8)))
    sessions = document(view(), session(route), session(None))["sessions"]
    assert (sessions["running"], sessions["paused"], sessions["waiting"]) == (2, 0, 4)
    assert sessions["classes"]["batch"] == {"waiting": 3, "limit": 2}
    assert sessions["items"][0] == {
        "id": "s1",
        "model": "m",
        "class": "batch",
        "state": "running",
        "waits_for": None,
        "entry": "a",
        "route": [{"node": "a", "start": 0, "end": 4}, {"node": "b", "start": 4, "end": 8}],
        "tokens": 3,
        "recoveries": [
            {
                "cause": "reset",
                "hop": "1",
                "detected_by": "gossip",
                "pause_ms": 12.5,
                "positions_replayed": 7,
                "exact": "tokens",
            }
        ],
    }
    assert sessions["items"][1]["route"] == []


def test_a_paused_session_says_what_it_waits_for() -> None:
    paused = session(None)
    paused.session.state, paused.session.waits_for = State.PAUSED, "no room"
    sessions = document(view(), session(None), paused)["sessions"]
    assert (sessions["running"], sessions["paused"]) == (1, 1)
    assert (sessions["items"][1]["state"], sessions["items"][1]["waits_for"]) == ("paused", "no room")


@pytest.mark.parametrize(
    ("voters", "living", "members", "says"),
    [
        (1, 1, 1, ""),
        (1, 1, 2, "takeover"),
        (1, 1, 3, "as yet"),
        (3, 3, 3, ""),
        (3, 2, 4, "2 of 3 voters"),
        (2, 2, 3, "2 of 2 voters"),
        (5, 5, 7, ""),
        (5, 4, 6, ""),
        (5, 3, 6, "3 of 5 voters"),
        (3, 1, 2, "1 of 3 voters"),
    ],
)
def test_what_stands_in_the_way_of_a_failover(voters: int, living: int, members: int, says: str) -> None:
    found = failover_gap(voters, living, members)
    assert (says in found) if says else not found
