"""Streams gone on with by event id, and requests repeated under an idempotency key."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from tests.node.api.conftest import Http, chat_body, parse_sse

KEY = {"Idempotency-Key": "k-1"}


async def begin(http: Http, path: str = "/v1/chat/completions", **extra: Any) -> tuple[str, list[tuple[str, Any]]]:
    """A whole stream: (its session, its events)."""
    asked = chat_body(**extra) if "chat" in path else {"model": "demo", "prompt": "Once", **extra}
    body = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    async with http.session.post(path, json=body) as answer:
        return answer.headers["x-mesh-session"], parse_sse(await answer.text())


async def resume(http: Http, session: str, last: str = "", **headers: str) -> list[tuple[str, Any]]:
    head = {**({"Last-Event-ID": last} if last else {}), **headers}
    async with http.session.get(f"/v1/sessions/{session}/events", headers=head) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["x-mesh-session"] == session
        return parse_sse(await answer.text())


async def test_every_event_of_a_choice_has_an_id_of_its_own(http: Http) -> None:
    _, events = await begin(http, logprobs=True)
    ids = [name for name, data in events if data != "[DONE]" and data["choices"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_from_every_event_on_the_rest_is_the_same(http: Http, path: str) -> None:
    extra: dict[str, Any] = {"logprobs": True} if "chat" in path else {"logprobs": 2, "echo": True, "max_tokens": 20}
    session, events = await begin(http, path, stop=["are"], **extra)
    assert await resume(http, session) == events
    for at, (name, data) in enumerate(events):
        if data != "[DONE]" and data["choices"]:
            assert await resume(http, session, name) == events[at + 1 :], name


async def test_several_choices_are_resumed_each_at_its_place(http: Http) -> None:
    session, events = await begin(http, n=2)
    both = [(name, data) for name, data in events if data != "[DONE]" and data["choices"]]
    had = {name.split(":")[0]: name for name, _ in both[:6]}
    rest = await resume(http, session, ", ".join(had.values()))
    got = sorted(name for name, data in [*both[:6], *rest] if data != "[DONE]" and data["choices"])
    assert got == sorted(name for name, _ in both)


@pytest.mark.parametrize("last", ["x", "0:1", "0:1:2:3:4", "-1:0:0", "0:a:0", "0:99999999999:0", "1:0:0"])
async def test_an_event_id_that_is_none_is_refused_by_name(http: Http, last: str) -> None:
    session, _ = await begin(http)
    status, body = await http.get(f"/v1/sessions/{session}/events", **{"Last-Event-ID": last})
    assert (status, body["error"]["code"]) == (400, "invalid_event_id")


async def test_an_event_id_from_beyond_the_end_is_an_error_and_no_empty_answer(http: Http) -> None:
    session, events = await begin(http)
    (last, _) = [(name, data) for name, data in events if data != "[DONE]" and data["choices"]][-1]
    assert [data for _, data in await resume(http, session, last) if data != "[DONE]" and data["choices"]] == []
    (_, failed), (_, done) = await resume(http, session, "0:500:9000")
    assert (failed["error"]["code"], done) == ("invalid_event_id", "[DONE]")


async def test_sessions_are_bound_to_who_made_them(http: Http) -> None:
    session, _ = await begin(http)
    http.service.mesh[session] = type(http.service.mesh[session])(
        **{**{f: getattr(http.service.mesh[session], f) for f in http.service.mesh[session].__struct_fields__},
           "caller": "somebody"}
    )  # fmt: skip
    status, body = await http.get(f"/v1/sessions/{session}/events")
    assert (status, body["error"]["code"]) == (404, "session_not_found")
    assert await resume(http, session, Authorization="Bearer mk-admin") != []


async def test_a_choice_that_nobody_has_is_told(http: Http) -> None:
    session, _ = await begin(http, n=2)
    del http.service.mesh[f"{session}-1"]
    status, body = await http.get(f"/v1/sessions/{session}/events")
    assert (status, body["error"]["code"]) == (404, "session_incomplete")


async def test_a_repeat_attaches_and_says_the_same(http: Http) -> None:
    async def ask(**extra: Any) -> tuple[int, Any, aiohttp.ClientResponse]:
        return await http.post("/v1/chat/completions", chat_body(**extra), **KEY)

    status, first, answer = await ask(n=2)
    again_status, second, again = await ask(n=2)
    assert (status, again_status) == (200, 200)
    assert second == first
    assert again.headers["x-mesh-session"] == answer.headers["x-mesh-session"]
    assert len(http.service.opened) == 2, "two choices, run once"
    status, body, _ = await ask(n=1)
    assert (status, body["error"]["code"]) == (409, "idempotency_key_reused")


async def test_what_was_lost_before_a_repeat_is_run_under_the_old_name(http: Http) -> None:
    _, first, answer = await http.post("/v1/chat/completions", chat_body(), **KEY)
    session = answer.headers["x-mesh-session"]
    http.service.mesh.clear()
    _, second, _ = await http.post("/v1/chat/completions", chat_body(), **KEY)
    assert [g.request.session for g in http.service.opened] == [session, session]
    assert second["choices"] == first["choices"]


async def test_several_choices_that_are_lost_are_run_again_for_who_has_some_of_them(http: Http) -> None:
    """Which is told as a recovery, and not refused for want of room; a first request is neither."""
    body = chat_body(n=2, stream=True)
    async with http.session.post("/v1/chat/completions", json=body, headers=KEY) as answer:
        events = parse_sse(await answer.text())
    assert [each.request.rerun for each in http.service.opened] == [False, False]
    http.service.mesh.clear()
    http.service.opened.clear()
    last = {"Last-Event-ID": f"{events[2][0]},{events[3][0]}"}
    for lost in ("sessions", "claims too"):
        if lost == "claims too":
            http.service.claims.clear()
            http.service.mesh.clear()
        async with http.session.post("/v1/chat/completions", json=body, headers={**KEY, **last}) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()
        assert [each.request.rerun for each in http.service.opened] == [True, True], lost
        http.service.opened.clear()
