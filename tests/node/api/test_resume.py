"""Going on, by ``mesh.resume_tokens``, with a text that another mesh, or this one before it stopped, began."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import make_tokenizer
from tests.node.api.conftest import Http, chat_body, parse_sse

REPLY = "Hello there, how are you \u00e4\u20ac\U0001f600 today?"
TOKENS = [*make_tokenizer().encode(REPLY, special=False), 1]


@pytest.fixture(autouse=True)
def scripted(http: Http) -> None:
    http.service.script = lambda request: TOKENS


async def stream(http: Http, path: str, body: dict[str, Any], **headers: str) -> list[tuple[str, Any]]:
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with http.session.post(path, json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return [(name, chunk) for name, chunk in parse_sse(await answer.text()) if isinstance(chunk, dict)]


def told(events: list[tuple[str, Any]]) -> list[int]:
    return [token for _, chunk in events for token in chunk.get("mesh", {}).get("tokens", ())]


def body(**mesh: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "Once", "max_tokens": 200, "seed": 7, "mesh": mesh}


CHAT = chat_body(seed=7, logprobs=True)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_every_cut_goes_on_to_the_same_events(http: Http, path: str) -> None:
    """Characters of several tokens, log-probabilities, the finish and the usage: nothing twice, nothing missing."""
    asked = body() if path == "/v1/completions" else CHAT
    whole = await stream(http, path, {**asked, "mesh": {"return_tokens": True}})
    assert told(whole) == TOKENS
    assert {chunk["mesh"]["seed"] for _, chunk in whole if "mesh" in chunk} == {7}
    cuts = 0
    for cut in range(1, len(whole)):
        if not told(whole[:cut]):
            continue
        mesh = {"return_tokens": True, "resume_tokens": told(whole[:cut])}
        rest = await stream(http, path, {**asked, "mesh": mesh}, **{"Last-Event-ID": whole[cut - 1][0]})
        assert [plain(chunk) for _, chunk in rest] == [plain(chunk) for _, chunk in whole[cut:]]
        assert [name for name, _ in rest] == [name for name, _ in whole[cut:]]
        assert http.service.opened[-1].request.resume == tuple(told(whole[:cut]))
        cuts += 1
    assert cuts > 10


def plain(chunk: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in chunk.items() if key not in ("id", "created")}


async def test_without_a_last_event_the_answer_is_whole(http: Http) -> None:
    status, answer, _ = await http.post("/v1/completions", body(resume_tokens=TOKENS[:5]))
    assert (status, answer["choices"][0]["text"]) == (200, REPLY)
    assert answer["usage"]["completion_tokens"] == len(TOKENS)


async def test_a_stop_string_across_the_seam(http: Http) -> None:
    asked = {**body(resume_tokens=TOKENS[:4]), "stop": "there, how"}
    _, answer, _ = await http.post("/v1/completions", asked)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("Hello ", "stop")


async def test_it_is_the_same_request_under_its_key(http: Http) -> None:
    """Whoever still knows the key attaches it, and does not take it for another request."""
    key = {"Idempotency-Key": "k"}
    await http.post("/v1/completions", body(), **key)
    status, answer, _ = await http.post("/v1/completions", body(resume_tokens=TOKENS[:3]), **key)
    assert (status, answer["choices"][0]["text"], len(http.service.opened)) == (200, REPLY, 1)
    other = {**body(resume_tokens=TOKENS[:3]), "max_tokens": 9}
    assert (await http.post("/v1/completions", other, **key))[0] == 409


async def test_structured_output_goes_on_within_its_grammar(http: Http) -> None:
    text = '{"a": 12}'
    tokens = make_tokenizer().encode(text, special=False)
    http.service.script = lambda request: [*tokens, 1]
    form = {"response_format": {"type": "json_object"}}
    status, answer, _ = await http.post(
        "/v1/chat/completions", chat_body(seed=1, **form, mesh={"resume_tokens": tokens[:3]})
    )
    assert (status, answer["choices"][0]["message"]["content"]) == (200, text)
    for wrong in (TOKENS[:1], [1], [*tokens, 1, 1], [*tokens[:3], 999]):
        asked = chat_body(seed=1, **form, mesh={"resume_tokens": wrong})
        status, answer, _ = await http.post("/v1/chat/completions", asked)
        assert (status, answer["error"]["param"]) == (400, "mesh.resume_tokens"), wrong


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mesh": {"resume_tokens": [1000]}}, "no token id below 1000"),
        ({"mesh": {"resume_tokens": [-1]}}, "no token id below 1000"),
        ({"mesh": {"resume_tokens": "abc"}}, "Expected `array"),
        ({"mesh": {"resume_tokens": [1.5]}}, "Expected `int`"),
        ({"max_tokens": 2}, "3 tokens, which count towards max_tokens, and that is 2"),
        ({"n": 2}, "one choice of one prompt"),
        ({"prompt": ["Once", "Twice"]}, "one choice of one prompt"),
        ({"seed": None}, "needs the seed"),
        ({"mesh": {"return_tokens": True}}, "needs stream: true"),
    ],
)
async def test_what_cannot_be_resumed_is_refused_by_name(http: Http, change: dict[str, Any], said: str) -> None:
    status, answer, _ = await http.post("/v1/completions", {**body(resume_tokens=[9, 9, 9]), **change})
    assert status == 400
    assert said in answer["error"]["message"]
    assert http.service.opened == []


async def test_the_seed_may_follow_from_the_key_and_a_greedy_text_needs_none(http: Http) -> None:
    asked = {**body(resume_tokens=TOKENS[:3]), "seed": None}
    assert (await http.post("/v1/completions", asked, **{"Idempotency-Key": "k"}))[0] == 200
    assert (await http.post("/v1/completions", {**asked, "temperature": 0}))[0] == 200


@pytest.mark.parametrize(("name", "value"), [("return_tokens", True), ("resume_tokens", [5])])
async def test_responses_refuse_it(http: Http, name: str, value: Any) -> None:
    asked = {"model": "demo", "input": "Hi", "stream": True, "mesh": {name: value}}
    async with http.session.post("/v1/responses", json=asked) as answer:
        assert (answer.status, (await answer.json())["error"]["param"]) == (400, f"mesh.{name}")


async def test_nobody_is_told_tokens_unasked(http: Http) -> None:
    assert told(await stream(http, "/v1/completions", body())) == []
