"""The stream that all clients accept, and what happens to it when something breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from mesh.errors import NoRoute, SessionLost
from node.api.service import EndEvent, Event, GenerationRequest, TokenEvent
from tests.fakes import MODEL, FakeGeneration, FakeService, make_tokenizer
from tests.node.api.conftest import Http, chat_body, parse_sse, serve

REPLY = "Hello there, how are you?"
CHAT = "/v1/chat/completions"


async def test_headers(http: Http) -> None:
    async with http.session.post(CHAT, json=chat_body(stream=True)) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.headers["X-Accel-Buffering"] == "no"
        assert answer.headers["x-mesh-route"] == "ann:0-4,bob:4-8"
        assert answer.headers["x-mesh-session"] == http.service.opened[0].request.session
        assert answer.headers["x-request-id"]


async def test_chat_chunks(http: Http) -> None:
    events = await http.stream(CHAT, chat_body())
    assert events[-1][1] == "[DONE]"
    chunks = [data for _, data in events[:-1]]
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == REPLY
    assert all(c["choices"][0]["index"] == 0 for c in chunks)
    assert all("usage" not in c for c in chunks)


async def test_usage_comes_last_and_is_null_before(http: Http) -> None:
    for path, body in ((CHAT, chat_body()), ("/v1/completions", {"prompt": "Once", "max_tokens": 50})):
        events = await http.stream(path, {**body, "stream_options": {"include_usage": True}})
        *chunks, last = [data for _, data in events[:-1]]
        assert all(chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == http.service.opened[-1].drawn
        assert last["id"] == chunks[0]["id"]


async def test_every_event_says_choice_token_and_character(http: Http) -> None:
    events = await http.stream(CHAT, chat_body())
    text = ""
    for id_, data in events[:-1]:
        text += data["choices"][0]["delta"].get("content", "")
        choice, tokens, offset = map(int, id_.split(":"))
        assert (choice, offset) == (0, len(text))
        assert tokens <= http.service.opened[0].drawn
    drawn = http.service.opened[0].drawn
    assert events[-1][0] == f"0:{drawn}:{len(REPLY)}"


async def test_completion_chunks(http: Http) -> None:
    events = await http.stream("/v1/completions", {"prompt": "Once", "max_tokens": 50})
    chunks = [data for _, data in events[:-1]]
    assert {c["object"] for c in chunks} == {"text_completion"}
    assert "".join(c["choices"][0]["text"] for c in chunks) == REPLY
    assert chunks[-1]["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}


async def test_streamed_logprobs_are_those_of_the_whole_answer(http: Http) -> None:
    http.service.script = lambda request: [*make_tokenizer().encode("naïve 😀, done", special=False), 1]
    for path, body, key in (
        (CHAT, chat_body(logprobs=True, top_logprobs=1), "content"),
        ("/v1/completions", {"prompt": "Once", "logprobs": 1, "echo": True, "max_tokens": 50}, "tokens"),
    ):
        _, whole, _ = await http.post(path, body)
        events = await http.stream(path, body)
        streamed: dict[str, list[object]] = {}
        for _, data in events[:-1]:
            for name, values in (data["choices"][0]["logprobs"] or {}).items():
                streamed.setdefault(name, []).extend(values or [])
        expected = {name: values or [] for name, values in whole["choices"][0]["logprobs"].items()}
        assert streamed == expected
        assert len(streamed[key]) > 5


async def test_no_replacement_character_and_no_stop_string_in_any_chunk(http: Http) -> None:
    text = "日本語 😀 and then STO then STOP never this"
    http.service.script = lambda request: [*make_tokenizer().encode(text, special=False), 1]
    events = await http.stream(CHAT, chat_body(stop=["STOP", "nothing"]))
    pieces = [data["choices"][0]["delta"].get("content", "") for _, data in events[:-1]]
    assert "".join(pieces) == "日本語 😀 and then STO then "
    assert not any("\ufffd" in piece or "STOP" in piece for piece in pieces)
    assert events[-2][1]["choices"][0]["finish_reason"] == "stop"


async def test_choices_are_merged(http: Http) -> None:
    events = await http.stream(CHAT, chat_body(n=3))
    texts = ["", "", ""]
    finishes = []
    for _, data in events[:-1]:
        choice = data["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        finishes += [choice["index"]] if choice["finish_reason"] else []
    assert texts == [REPLY] * 3
    assert sorted(finishes) == [0, 1, 2]


async def test_tool_calls_in_a_stream(http: Http) -> None:
    text = 'Wait <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    http.service.script = lambda request: [*make_tokenizer().encode(text, special=False), 1]
    tools = [{"type": "function", "function": {"name": "f"}}]
    events = await http.stream(CHAT, chat_body(tools=tools))
    deltas = [data["choices"][0]["delta"] for _, data in events[:-1]]
    assert "".join(d.get("content", "") for d in deltas).strip() == "Wait"
    calls = [d["tool_calls"] for d in deltas if "tool_calls" in d]
    assert [(c[0]["index"], c[0]["function"].get("name")) for c in calls][:2] == [(0, "f"), (0, None)]
    assert "".join(c[0]["function"]["arguments"] for c in calls) == '{"a": 1}'
    assert events[-2][1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_failure_before_the_first_byte_has_its_own_status(http: Http) -> None:
    http.service.refuse = [NoRoute("no live node holds layers [2, 4) of demo")]
    status, body, answer = await http.post(CHAT, chat_body(stream=True))
    assert (status, body["error"]["code"]) == (503, "no_route")
    assert answer.headers["Retry-After"] == "2"


async def test_a_failure_after_the_headers_is_an_error_event_and_never_a_stop(http: Http) -> None:
    http.service.break_after = 3
    events = await http.stream(CHAT, chat_body())
    assert events[-1][1] == "[DONE]"
    error = events[-2][1]["error"]
    assert error["code"] == "session_lost"
    assert error["message"]
    assert all(data["choices"][0]["finish_reason"] is None for _, data in events[:-2])


async def test_a_failure_of_a_whole_answer(http: Http) -> None:
    http.service.break_after, http.service.breaks_with = 3, SessionLost("lost after 3 tokens")
    status, body = await http.chat()
    assert (status, body["error"]["code"], body["error"]["message"]) == (503, "session_lost", "lost after 3 tokens")


async def test_a_bug_says_nothing_of_its_inside(http: Http) -> None:
    def broken(request: object) -> list[int]:
        raise ZeroDivisionError("secret prompt text")

    http.service.script = broken
    status, body = await http.chat()
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "secret" not in body["error"]["message"]


async def test_comments_keep_a_silent_stream_alive(service: FakeService) -> None:
    async for http in serve(service, keepalive_s=0.02):
        service.hold_after = 1
        async with http.session.post(CHAT, json=chat_body(stream=True)) as answer:
            lines = []
            while not any(line.startswith(b":") for line in lines):
                lines.append(await answer.content.readline())
            service.gate.set()
            rest = (await answer.read()).decode()
        assert parse_sse(rest)[-1][1] == "[DONE]"


async def test_a_client_that_hangs_up_frees_the_session_at_once(http: Http) -> None:
    http.service.hold_after = 2
    async with http.session.post(CHAT, json=chat_body(stream=True)) as answer:
        await answer.content.readline()
        assert http.service.live
        http.service.ended.clear()
        answer.close()
    async with asyncio.timeout(2):
        await http.service.ended.wait()
    assert http.service.opened[0].cancelled == "disconnected"


async def test_a_client_that_hangs_up_before_the_first_byte(http: Http) -> None:
    http.service.hold_after = 0
    task = asyncio.create_task(http.chat())
    async with asyncio.timeout(2):
        await http.service.began.wait()
        task.cancel()
        await http.service.ended.wait()
    assert http.service.opened[0].cancelled == "disconnected"


async def test_what_was_sent_is_acknowledged_and_nothing_else_runs_ahead(http: Http) -> None:
    """The fake mesh stops 32 tokens past the acknowledgement, and refuses one of a token that it never showed."""
    http.service.script = lambda request: [9]
    http.service.known = [msgspec.structs.replace(MODEL, max_context=1_000)]
    await http.chat(max_tokens=500, logprobs=True)
    generation = http.service.opened[0]
    assert generation.drawn == 500
    assert generation.acknowledged >= len(generation.request.prompt) + 498


async def test_cancel_by_session_id(http: Http) -> None:
    http.service.hold_after = 2
    async with http.session.post(CHAT, json=chat_body(stream=True, n=2)) as answer:
        session = answer.headers["x-mesh-session"]
        await answer.content.readline()
        async with http.session.delete(f"/v1/sessions/{session}") as cancelled:
            assert cancelled.status == 200
            assert (await cancelled.json())["cancelled"] is True
        events = parse_sse("id: x" + (await answer.text()))
    assert events[-2][1]["error"]["code"] == "cancelled"
    assert events[-1][1] == "[DONE]"
    async with http.session.delete(f"/v1/sessions/{session}") as again:
        assert again.status == 404
        assert (await again.json())["error"]["code"] == "session_not_found"


async def test_a_stream_survives_a_dropped_connection_elsewhere(http: Http) -> None:
    """One client's end does not disturb another's stream."""
    http.service.hold_after = 2
    first = await http.session.post(CHAT, json=chat_body(stream=True))
    second = asyncio.create_task(http.stream(CHAT, chat_body()))
    first.close()
    http.service.gate.set()
    events = await second
    assert events[-2][1]["choices"][0]["finish_reason"] == "stop"


async def test_a_stream_that_waits_long_in_the_queue_is_kept_alive_too(service: FakeService) -> None:
    """Its headers go out before its place is free; a refusal then comes as an event."""
    async for http in serve(service, max_sessions=1, keepalive_s=0.02):
        service.hold_after = 1
        first = await http.session.post(CHAT, json=chat_body(stream=True))
        async with http.session.post(CHAT, json=chat_body(stream=True)) as second:
            assert second.status == 200
            assert (await second.content.readline()).startswith(b":")
            service.gate.set()
            await second.content.readline()
            assert parse_sse(await second.text())[-2][1]["choices"][0]["finish_reason"] == "stop"
        service.refuse = [NoRoute("gone")]
        assert (await first.text()).endswith("data: [DONE]\n\n")


async def test_64_streams_at_once(http: Http) -> None:
    http.service.hold_after = 3
    tasks = [asyncio.create_task(http.stream(CHAT, chat_body())) for _ in range(80)]
    async with asyncio.timeout(10):
        while len(http.service.live) < 64 or http.server.api.gate.waiting < 16:  # noqa: ASYNC110 - two conditions
            await asyncio.sleep(0.001)
    assert (len(http.service.live), http.server.api.gate.waiting) == (64, 16)
    http.service.gate.set()
    for events in await asyncio.gather(*tasks):
        assert events[-1][1] == "[DONE]"
        assert "".join(d["choices"][0]["delta"].get("content", "") for _, d in events[:-1]) == REPLY


class Ends(FakeGeneration):
    """Gives one token, then ends as ``how`` says."""

    how: type[BaseException] | EndEvent | None = None

    async def _events(self) -> AsyncIterator[Event]:
        self.drawn = 1
        yield TokenEvent(len(self.request.prompt), self._script[0])
        if isinstance(self.how, EndEvent):
            yield self.how
        elif self.how is not None:
            raise self.how()


class EndsOddly(FakeService):
    """``open`` makes a generation that ends as ``how`` says, or ends so itself."""

    how: type[BaseException] | EndEvent | None = None
    while_opening = False

    async def open(self, request: GenerationRequest) -> FakeGeneration:
        if self.while_opening:
            raise asyncio.CancelledError
        generation = Ends(self, request, self.script(request))
        generation.how = self.how
        self.live.add(generation)
        return generation


@pytest.mark.parametrize(
    ("how", "while_opening", "status", "code"),
    [
        (None, True, 409, "cancelled"),
        (asyncio.CancelledError, False, 409, "cancelled"),
        (EndEvent("cancelled"), False, 409, "cancelled"),
        (None, False, 503, "session_lost"),
    ],
)
async def test_a_session_that_ends_under_its_request(
    how: type[BaseException] | EndEvent | None, while_opening: bool, status: int, code: str
) -> None:
    service = EndsOddly()
    service.how, service.while_opening = how, while_opening
    async for http in serve(service):
        async with asyncio.timeout(10):
            seen, body = await http.chat()
            assert (seen, body["error"]["code"]) == (status, code)
            if while_opening:
                return
            events = await http.stream(CHAT, chat_body())
        assert events[-1][1] == "[DONE]"
        assert events[-2][1]["error"]["code"] == code
