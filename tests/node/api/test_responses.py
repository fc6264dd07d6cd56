"""``/v1/responses``: whole, streamed, with calls, refused by name."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from tests.fakes import make_tokenizer
from tests.node.api.conftest import Http

REPLY = "Hello there, how are you?"
PATH = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}


async def stream(http: Http, **body: Any) -> list[dict[str, Any]]:
    """Events, after checking that names, types and numbers agree."""
    async with http.session.post(PATH, json={"input": "Hi", **body, "stream": True}) as answer:
        assert answer.status == 200
        text = await answer.text()
    names = re.findall(r"^event: (.*)$", text, re.M)
    events = [msgspec.json.decode(data) for data in re.findall(r"^data: (.*)$", text, re.M)]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "[DONE]" not in text
    return events


async def test_a_whole_response(http: Http) -> None:
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    status, body, _ = await http.post(PATH, {"input": items, "instructions": "Be brief", "max_output_tokens": 50})
    assert (status, body["object"], body["status"], body["error"]) == (200, "response", "completed", None)
    assert body["output"][0]["content"][0]["text"] == REPLY
    assert body["usage"]["output_tokens"] == http.service.opened[0].drawn
    request = http.service.opened[0].request
    prompt = make_tokenizer().decode(request.prompt, special=True)
    assert prompt == "<|system|>Be brief<|end|><|user|>Hi<|end|><|assistant|>"
    assert (request.form, request.sampling.max_tokens) == ("response", 50)


async def test_the_order_of_events(http: Http) -> None:
    events = await stream(http)
    kinds = [event["type"] for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event["delta"] for event in events[4:-4]) == REPLY
    last = events[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == REPLY
    assert last["usage"]["output_tokens"] == http.service.opened[0].drawn


async def test_a_response_cut_by_its_length_says_so(http: Http) -> None:
    events = await stream(http, max_output_tokens=2)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_a_failure_is_never_a_completed_response(http: Http) -> None:
    http.service.break_after = 3
    events = await stream(http)
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == "session_lost"


async def test_calls_and_their_results(http: Http) -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    http.service.script = lambda request: [*make_tokenizer().encode(text, special=False), 1]
    events = await stream(http, tools=[TOOL])
    call = events[-1]["response"]["output"][1]
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "weather", '{"city": "Rome"}')
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    await http.post(PATH, {"input": items, "tools": [TOOL]})
    assert "<|tool|>sunny" in make_tokenizer().decode(http.service.opened[-1].request.prompt, special=True)


async def test_a_schema_becomes_a_grammar(http: Http) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "integer"}}
    status, _, _ = await http.post(PATH, {"input": "Hi", "text": {"format": form}})
    assert status == 200
    assert "integer" in http.service.opened[0].request.sampling.grammar


@pytest.mark.parametrize(
    ("param", "value"),
    [("input", 5), ("input", None), ("previous_response_id", "resp_1"), ("background", True), ("temperature", 9),
     ("tools[0]", [{"type": "web_search"}]), ("input[0]", [{"type": "item_reference"}]), ("max_output_tokens", "x")],
)  # fmt: skip
async def test_bad_requests(http: Http, param: str, value: Any) -> None:
    status, body, _ = await http.post(PATH, {"input": "Hi", param.removesuffix("[0]"): value})
    assert (status, body["error"]["param"]) == (400, param)
    assert not http.service.opened
