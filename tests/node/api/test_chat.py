"""``/v1/chat/completions``: whole answers, parameters, logprobs, structure."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mesh.types import SamplingParams
from node.api.service import Recovery
from tests.fakes import logprob_of, make_tokenizer, vocabulary_of
from tests.node.api.conftest import Http, chat_body

REPLY = "Hello there, how are you?"


async def test_a_whole_answer_has_every_field(http: Http) -> None:
    status, body, answer = await http.post("/v1/chat/completions", chat_body(seed=7, temperature=0))
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "demo"
    assert isinstance(body["created"], int)
    choice = body["choices"][0]
    assert choice["index"] == 0
    assert choice["message"] == {"role": "assistant", "content": REPLY, "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt = make_tokenizer().encode("<|user|>Hi<|end|><|assistant|>", special=False)
    drawn = len(make_tokenizer().encode(REPLY, special=False)) + 1
    assert body["usage"]["prompt_tokens"] == len(prompt)
    assert body["usage"]["completion_tokens"] == drawn
    assert body["usage"]["total_tokens"] == len(prompt) + drawn
    assert "mesh" not in body["usage"]
    assert answer.headers["x-mesh-route"] == "ann:0-4,bob:4-8"
    assert answer.headers["x-mesh-session"] == http.service.opened[0].request.session
    assert answer.headers["x-request-id"] == http.service.opened[0].request.request_id


async def test_the_request_reaches_the_mesh_as_it_was_meant(http: Http) -> None:
    extras = {"class": "batch", "timeout": 30, "max_retries": 2, "balance": "memory", "allowed_nodes": ["ann"]}
    wanted: dict[str, Any] = {
        "max_completion_tokens": 9, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1,
        "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1, "logit_bias": {"7": -100},
        "seed": -1, "stop": ["\n\n"], "stop_token_ids": [9], "min_tokens": 2, "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    status, _ = await http.chat(**wanted, mesh=extras, user="someone", unknown_thing=1)
    assert status == 200
    request = http.service.opened[0].request
    assert request.sampling == SamplingParams(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, presence_penalty=1.0, frequency_penalty=-1.0,
        repetition_penalty=1.1, logit_bias={7: -100.0}, seed=2**64 - 1, stop_token_ids=(1, 6, 9),
        min_tokens=2, logprobs=3,
    )  # fmt: skip
    assert request.stop == ("\n\n",)
    assert (request.priority, request.timeout_s, request.max_retries) == ("batch", 30.0, 2)
    assert (request.balance, request.allowed_nodes, request.form) == ("memory", ("ann",), "chat")


async def test_the_request_can_be_kept_in_a_journal(http: Http) -> None:
    await http.chat(logit_bias={"7": 1})
    request = http.service.opened[0].request
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=type(request)) == request


async def test_defaults(http: Http) -> None:
    await http.chat()
    request = http.service.opened[0].request
    assert request.sampling.max_tokens == 256 - len(request.prompt)  # what fits the context
    assert request.sampling.temperature == 1.0
    assert request.sampling.stop_token_ids == (1, 6)
    assert request.sampling.seed == 1000  # drawn by the service
    assert request.sampling.logprobs == -1


async def test_a_seed_follows_the_idempotency_key(http: Http) -> None:
    _, _, _ = await http.post("/v1/chat/completions", chat_body(), **{"Idempotency-Key": "abcde"})
    request = http.service.opened[0].request
    assert (request.sampling.seed, request.idempotency_key, len(request.body_hash)) == (1005, "abcde", 64)


async def test_ignore_eos_keeps_only_the_callers_stop_tokens(http: Http) -> None:
    await http.chat(ignore_eos=True, stop_token_ids=[42], max_tokens=60)
    assert http.service.opened[0].request.sampling.stop_token_ids == (42,)


async def test_length(http: Http) -> None:
    _, body = await http.chat(max_tokens=2)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


async def test_developer_is_system_and_content_may_be_parts(http: Http) -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]
    messages = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}]
    await http.post("/v1/chat/completions", {"messages": messages})
    prompt = make_tokenizer().decode(http.service.opened[0].request.prompt, special=True)
    assert prompt == "<|system|>Be brief<|end|><|user|>Hi you<|end|><|assistant|>"


async def test_template_switches(http: Http) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    await http.post("/v1/chat/completions", {"messages": messages, "continue_final_message": True})
    await http.chat(add_generation_prompt=False, chat_template_kwargs={"mood": "glad"})
    texts = [make_tokenizer().decode(g.request.prompt, special=True) for g in http.service.opened]
    assert texts == ["<|user|>Hi<|end|><|assistant|>Well", "<|user|>Hi<|end|><|mood|>glad"]


async def test_n_choices_have_their_own_seeds_and_sessions(http: Http) -> None:
    tokenizer = make_tokenizer()
    http.service.script = lambda request: [*tokenizer.encode(f"Choice {request.choice}", special=False), 1]
    status, body = await http.chat(n=3, seed=2**64 - 1)
    assert status == 200
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert [c["message"]["content"] for c in body["choices"]] == ["Choice 0", "Choice 1", "Choice 2"]
    requests = sorted((g.request for g in http.service.opened), key=lambda r: r.choice)
    assert [r.sampling.seed for r in requests] == [2**64 - 1, 0, 1]
    first = requests[0].session
    assert [r.session for r in requests] == [first, f"{first}-1", f"{first}-2"]
    assert body["usage"]["prompt_tokens"] == len(requests[0].prompt)
    assert body["usage"]["completion_tokens"] == sum(g.drawn for g in http.service.opened)


async def test_stop_strings_are_not_shown_and_end_the_session(http: Http) -> None:
    _, body = await http.chat(stop=", how")
    choice = body["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello there", "stop")
    assert http.service.opened[0].cancelled == "stop"


async def test_logprobs(http: Http) -> None:
    _, body = await http.chat(logprobs=True, top_logprobs=2)
    request = http.service.opened[0].request
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == body["usage"]["completion_tokens"]
    ids = [*make_tokenizer().encode(REPLY, special=False), 1]
    for at, (entry, token) in enumerate(zip(content, ids, strict=True)):
        spelled = make_tokenizer().token_bytes(token)
        assert entry["token"] == spelled.decode()
        assert entry["bytes"] == list(spelled)
        assert entry["logprob"] == logprob_of(len(request.prompt) + at, token)
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["token"] == entry["token"]
    _, body = await http.chat()
    assert body["choices"][0]["logprobs"] is None


async def test_recoveries_are_told_in_the_usage(http: Http) -> None:
    http.service.recoveries = (Recovery("reset", "bob:4-8", "connection", 412.0, 77, "bitwise"),)
    _, body = await http.chat()
    assert body["usage"]["mesh"]["recoveries"] == [
        {"cause": "reset", "hop": "bob:4-8", "detected_by": "connection", "pause_ms": 412.0, "positions_replayed": 77,
         "exact": "bitwise"}
    ]  # fmt: skip


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "weather"}}


def reply(http: Http, text: str) -> None:
    tokenizer = make_tokenizer()
    http.service.script = lambda request: [*tokenizer.encode(text, special=False), 1]


def schema_in(grammar: str) -> dict[str, Any]:
    """The JSON schema that a grammar is made of."""
    (made,) = msgspec.json.decode(grammar)["grammars"]
    schema = msgspec.json.decode(made["lark_grammar"].partition("start: %json ")[2])
    assert "whitespace_pattern" in schema.pop("x-guidance")
    return dict(schema)


@pytest.mark.parametrize(
    ("wanted", "schema"),
    [({"type": "json_object"}, {"type": "object"}),
     ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}, {"type": "integer"})],
)  # fmt: skip
async def test_response_format_becomes_a_grammar(http: Http, wanted: dict[str, Any], schema: dict[str, Any]) -> None:
    status, _ = await http.chat(response_format=wanted)
    assert status == 200
    assert schema_in(http.service.opened[0].request.sampling.grammar) == schema


async def test_a_forced_call_is_generated_under_its_schema(http: Http) -> None:
    reply(http, '{"name": "weather", "arguments": {"city": "Rome"}}')
    for choice, finish in ((NAMED, "stop"), ("required", "tool_calls")):
        status, body = await http.chat(tools=[WEATHER], tool_choice=choice)
        assert status == 200
        message = body["choices"][0]["message"]
        assert message["content"] is None
        assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
        assert message["tool_calls"][0]["type"] == "function"
        assert body["choices"][0]["finish_reason"] == finish
    schema = schema_in(http.service.opened[0].request.sampling.grammar)
    assert schema["properties"]["name"] == {"const": "weather"}


async def test_a_call_of_the_models_own_choice(http: Http) -> None:
    reply(http, 'Let me see. <tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>')
    _, body = await http.chat(tools=[WEATHER])
    choice = body["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"].strip() == "Let me see."
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert "<|tools|>1" in make_tokenizer().decode(http.service.opened[0].request.prompt, special=True)
    reply(http, "No need: 3 < 4 <tool")
    _, body = await http.chat(tools=[WEATHER])
    assert body["choices"][0]["message"]["content"] == "No need: 3 < 4 <tool"
    assert "tool_calls" not in body["choices"][0]["message"]


async def test_tool_choice_none_shows_the_model_no_tools(http: Http) -> None:
    await http.chat(tools=[WEATHER], tool_choice="none")
    assert "<|tools|>" not in make_tokenizer().decode(http.service.opened[0].request.prompt, special=True)


async def test_structure_is_refused_by_name_where_it_cannot_be_enforced(http: Http) -> None:
    http.service.grammar = False
    status, body = await http.chat(response_format={"type": "json_object"})
    assert (status, body["error"]["param"]) == (400, "response_format")
    status, body = await http.chat(tools=[WEATHER], tool_choice="required")
    assert (status, body["error"]["param"]) == (400, "tool_choice")
    status, _ = await http.chat(tools=[WEATHER])
    assert status == 200
    http.service.grammar = True
    status, body = await http.chat(
        response_format={"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    )
    assert (status, body["error"]["code"]) == (400, "invalid_schema")


STRICT = {"type": "function", "function": {
    "name": "say", "strict": True,
    "parameters": {"type": "object", "properties": {"word": {"enum": ["a", "b"]}}, "required": ["word"],
                   "additionalProperties": False}}}  # fmt: skip


def _chunks(events: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    return [data for _, data in events if isinstance(data, dict)]


async def test_a_streamed_call_has_its_name_first_and_its_arguments_in_pieces(http: Http) -> None:
    reply(http, '{"name": "weather", "arguments": {"city": "Rome", "days": [1, 2]}}')
    for choice, finish in ((NAMED, "stop"), ("required", "tool_calls")):
        chunks = _chunks(
            await http.stream("/v1/chat/completions", chat_body(stream=True, tools=[WEATHER], tool_choice=choice))
        )
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": None}
        calls = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
        assert all(len(entries) == 1 and entries[0]["index"] == 0 for entries in calls)
        first, rest = calls[0][0], [entries[0] for entries in calls[1:]]
        assert first["type"] == "function"
        assert first["function"] == {"name": "weather", "arguments": ""}
        assert all(set(entry) == {"index", "function"} and set(entry["function"]) == {"arguments"} for entry in rest)
        assert "".join(entry["function"]["arguments"] for entry in rest) == '{"city": "Rome", "days": [1, 2]}'
        assert len(rest) > 3
        assert not any(delta.get("content") for delta in deltas)
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == finish
        assert first["id"].startswith("call_")


async def test_a_call_cut_by_max_tokens_is_a_call_with_what_there_is(http: Http) -> None:
    reply(http, '{"name": "weather", "arguments": {"city": "Rome", "days": [1, 2]}}')
    _, body = await http.chat(tools=[WEATHER], tool_choice=NAMED, max_tokens=30)
    choice = body["choices"][0]
    assert choice["finish_reason"] == "length"
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert '{"city": "Rome", "days": [1, 2]}'.startswith(arguments)


async def test_a_strict_tool_holds_the_models_own_calls_to_its_schema(http: Http) -> None:
    await http.chat(tools=[WEATHER])
    assert http.service.opened[-1].request.sampling.grammar == ""
    await http.chat(tools=[WEATHER, STRICT])
    tokenizer, grammar = make_tokenizer(), http.service.opened[-1].request.sampling.grammar
    vocabulary = vocabulary_of(tokenizer)
    for text, fits in (
        ("No need for it: <tool", True),
        ('See: <tool_call>\n{"name": "say", "arguments": {"word": "b"}}\n</tool_call> and so on', True),
        ('<tool_call>{"name": "weather", "arguments": {"any": [1]}}</tool_call>', True),
        ('<tool_call>{"name": "say", "arguments": {"word": "c"}}', False),
        ('<tool_call>{"name": "shout"', False),
    ):
        allowed, ids = vocabulary.start(grammar), tokenizer.encode(text, special=False)
        masks = (allowed.after(ids[:at])[token >> 3] >> (token & 7) & 1 for at, token in enumerate(ids))
        assert all(masks) == fits, text


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"tools": [WEATHER, {"type": "function", "function": {"name": "x", "parameters": {"type": "no"}}}],
          "tool_choice": "required"}, "tools[1].function.parameters", "invalid_schema"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1]", "invalid_tool"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]", "invalid_tool"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]}, "tools[0]", "invalid_tool"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
            "invalid_schema",
        ),
        ({"tools": [STRICT], "response_format": {"type": "json_object"}}, "tool_choice", "invalid_request"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "invalid_request"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens", "invalid_request"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}},
         "response_format", "invalid_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"oneOf": [{"type": "object"}] * 2}}}},
         "response_format", "invalid_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "(?=a)"}}}},
         "response_format", "invalid_schema"),
        ({"logit_bias": {"1000": 1}}, "logit_bias", "invalid_token"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_token"),
    ],
)  # fmt: skip
async def test_what_is_wrong_with_a_structured_request_is_named(
    http: Http, change: dict[str, Any], param: str, code: str
) -> None:
    status, body = await http.chat(**change)
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, param, code)
    assert not http.service.opened


async def test_a_schema_that_is_nested_without_end_is_refused(http: Http) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        schema = {"type": "array", "items": schema}
    status, body = await http.chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")
