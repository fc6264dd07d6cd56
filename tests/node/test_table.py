"""``status`` for people: what is shown, and that members cannot write in colours."""

from __future__ import annotations

from typing import Any

import pytest

from node.table import print_status


def document(**changes: Any) -> dict[str, Any]:
    load = {"running": 2, "waiting": 0, "free_tokens": 10, "tokens_per_s": 12.6, "step_ms": 1.0, "lag_ms": 0.0}
    member: dict[str, Any] = {
        "id": "a" * 32, "name": "ann", "state": "alive", "role": "any", "api": "http://h:1", "load": load,
        "spans": [{"model": "demo", "start": 0, "end": 4}], "loading": [], "fetched": 0, "refused": [],
    }  # fmt: skip
    member |= changes.pop("member", {})
    other = {**member, "id": "b" * 32, "name": "bob", "state": "dead", "spans": []}
    spans = [{"node": "a" * 32, "start": 0, "end": 4}, {"node": "c" * 32, "start": 4, "end": 8}]
    made: dict[str, Any] = {
        "mesh_id": "0123456789abcdef" * 2,
        "coordinator": "b" * 32,
        "term": 7,
        "voters": ["a" * 32, "d" * 32],
        "degraded": None,
        "members": [member, other],
        "placement": {"models": [{"id": "demo", "missing": None, "spans": spans}]},
        "survivability": {"demo": {"nodes_that_may_fail": 1}},
        "sessions": working(),
    }
    return made | changes


def working(*items: Any, limit: int = 64) -> dict[str, Any]:
    classes = {"interactive": {"waiting": 0, "limit": 64}, "normal": {"waiting": 1, "limit": 64}}
    classes["batch"] = {"waiting": 2, "limit": limit}
    return {"running": 1, "paused": 2, "waiting": 3, "classes": classes, "items": list(items)}


def session(**changes: Any) -> dict[str, Any]:
    hops = [{"node": "a" * 32, "start": 0, "end": 4}, {"node": "c" * 32, "start": 4, "end": 8}]
    made = {
        "id": "s1",
        "model": "demo",
        "class": "batch",
        "state": "running",
        "route": hops,
        "tokens": 17,
        "recoveries": [{}, {}],
    }
    return made | changes


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "300")

    def show(made: dict[str, Any]) -> list[str]:
        print_status(made)
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return show


def test_a_mesh_at_a_glance(shown: Any) -> None:
    assert shown(document(sessions=working(session()))) == [
        "mesh 01234567 coordinator bob term 7 voters ann, dddddddd",
        "NODE STATE ROLE API LAYERS LOAD",
        "ann alive any http://h:1 demo[0:4] 2 running, 13 tokens/s",
        "bob dead any http://h:1 - -",
        "MODEL PLACED ON SURVIVES",
        "demo ann[0:4] cccccccc[4:8] any 1 nodes failing",
        "sessions: 1 running, 2 paused, 3 waiting (1 normal, 2 batch)",
        "SESSION MODEL CLASS STATE ROUTE TOKENS RECOVERIES",
        "s1 demo batch running ann[0:4] cccccccc[4:8] 17 2",
    ]


def test_what_is_amiss_is_said(shown: Any) -> None:
    placement = {"models": [{"id": "demo", "missing": "layers [4, 8) fit nowhere", "spans": []}]}
    text = "\n".join(shown(document(coordinator=None, degraded="no majority", placement=placement, survivability={})))
    assert "coordinator none" in text
    assert "degraded: no majority" in text
    assert "demo layers [4, 8) fit nowhere -" in text
    assert "no failover" not in text


def test_a_mesh_that_cannot_elect_says_so(shown: Any) -> None:
    assert shown(document(failover="one node votes"))[1] == "no failover: one node votes"


def test_what_a_node_is_loading_and_what_it_refused(shown: Any) -> None:
    member = {"loading": [{"model": "demo", "start": 4, "end": 8}], "fetched": 35, "refused": ["demo[4:8]: no room"]}
    assert "demo[0:4] loading [4:8], 35 % fetched demo[4:8]: no room" in shown(document(member=member))[2]


@pytest.mark.parametrize("evil", ["[/red]", "[bold]x[/bold]", "[link=http://evil]click[/link]"])
@pytest.mark.parametrize("field", ["name", "api", "role"])
def test_what_members_say_of_themselves_is_no_markup(shown: Any, field: str, evil: str) -> None:
    lines = shown(document(member={field: evil}))
    assert evil in lines[2]


@pytest.mark.parametrize("field", ["id", "model"])
def test_names_of_sessions_and_models_are_no_markup(shown: Any, field: str) -> None:
    items = [session(**{field: "[/red]"})]
    text = "\n".join(shown(document(degraded="[/red]", sessions=working(*items))))
    assert text.count("[/red]") == 2


def test_places_that_were_taken_back_are_told(shown: Any) -> None:
    (line,) = [line for line in shown(document(sessions=working(limit=3))) if line.startswith("sessions")]
    assert line.endswith("; the mesh is short of room: waiting batch from 3 on")


def test_no_sessions_no_table(shown: Any) -> None:
    assert not any("SESSION " in line for line in shown(document()))
