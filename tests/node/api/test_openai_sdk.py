"""The ordinary ``openai`` package against the API."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.fakes import make_tokenizer
from tests.node.api.conftest import Http

REPLY = "Hello there, how are you?"


@pytest.fixture
async def sdk(http: Http) -> Any:
    made = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{http.server.port}/v1", api_key="sk-any", max_retries=0)
    yield made
    await made.close()


async def test_chat(sdk: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = await sdk.chat.completions.create(model="demo", messages=messages, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].finish_reason == "stop"
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    stream = await sdk.chat.completions.create(
        model="demo", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == REPLY
    assert chunks[-1].usage.completion_tokens > 0


async def test_tool_calls(sdk: Any, http: Http) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    script = make_tokenizer().encode('{"name": "weather", "arguments": {"city": "Rome"}}', special=False)
    http.service.script = lambda request: [*script, 1]
    wanted = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": tools,
        "tool_choice": "required",
    }
    answer = await sdk.chat.completions.create(**wanted)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rome"}')
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("tool_calls", None)
    async with sdk.chat.completions.stream(**wanted) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.name, event.arguments) for event in done] == [("weather", '{"city": "Rome"}')]
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"city": "Rome"}'
    response = await sdk.responses.create(
        model="demo", input="Hi", tools=[{"type": "function", "name": "weather", "parameters": parameters}],
        tool_choice="required",
    )  # fmt: skip
    assert [(item.name, item.arguments) for item in response.output if item.type == "function_call"] == [
        ("weather", '{"city": "Rome"}')
    ]


async def test_completions_and_models(sdk: Any) -> None:
    answer = await sdk.completions.create(model="demo", prompt=["a", "b"], max_tokens=50, n=2)
    assert [c.text for c in answer.choices] == [REPLY] * 4
    assert [m.id for m in (await sdk.models.list()).data] == ["demo"]


async def test_errors(sdk: Any, http: Http) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await sdk.chat.completions.create(model="demo", messages=[], temperature=1)
    assert bad.value.param == "messages"
    with pytest.raises(openai.NotFoundError) as missing:
        await sdk.models.retrieve("gpt-9")
    assert missing.value.code == "model_not_found"
    http.service.break_after = 2
    with pytest.raises(openai.APIError, match="route was lost"):
        async for _ in await sdk.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Hi"}], stream=True
        ):
            pass


async def test_responses(sdk: Any) -> None:
    answer = await sdk.responses.create(model="demo", input="Hi")
    assert (answer.output_text, answer.status) == (REPLY, "completed")
    events = [event async for event in await sdk.responses.create(model="demo", input="Hi", stream=True)]
    assert events[0].type == "response.created"
    assert events[-1].response.output_text == REPLY
