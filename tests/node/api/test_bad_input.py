"""Every wrong request is one clear error body in OpenAI's form, names its parameter, and starts nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mesh.errors import CapacityError
from node.text.tokenizer import Tokenizer
from tests.fakes import FakeService
from tests.node.api.conftest import Http, chat_body, serve

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("top_p", 1.5), ("top_p", -1),
        ("top_k", -2),
        ("top_k", 1.5), ("min_p", 2), ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0),
        ("repetition_penalty", -1), ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", "many"), ("max_tokens", True),
        ("max_completion_tokens", 0), ("n", 0), ("n", 129), ("n", -1), ("stop", ""), ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", [1]), ("stop", 5), ("seed", "x"), ("seed", 1.5), ("logit_bias", {"x": 1}), ("logit_bias", {"5000": 1}),
        ("logit_bias", {"-1": 1}), ("logit_bias", {"5": 101}), ("logit_bias", [1]), ("logprobs", 3),
        ("top_logprobs", 21),
        ("top_logprobs", -1), ("top_logprobs", 2), ("stream", "yes"), ("stream_options", {"include_usage": True}),
        ("stop_token_ids", [5000]), ("stop_token_ids", [-1]), ("stop_token_ids", 5), ("min_tokens", -1),
        ("mesh.timeout", 0), ("mesh.timeout", -1), ("mesh.timeout", 1e9), ("mesh.max_retries", -1),
        ("mesh.balance", "luck"), ("mesh.class", "vip"), ("mesh.allowed_nodes", [""]), ("mesh.allowed_nodes", []),
        ("mesh.max_layers", 0), ("mesh.max_layers", -1), ("mesh.max_layers", 2**70), ("mesh.max_layers", "all"),
        ("mesh", 5), ("messages", []),
        ("messages", "hi"), ("messages", None), ("messages", [1]), ("messages[0].role", "wizard"),
        ("messages[0].content", None), ("messages[0].content", 5), ("messages[0].content", [{"type": "image_url"}]),
        ("response_format", {"type": "xml"}), ("response_format", {"type": "json_schema"}), ("response_format", 5),
        ("tool_choice", "required"), ("tool_choice", "perhaps"), ("tools[0]", [{"type": "x"}]), ("tools", 5),
        ("chat_template_kwargs", {"tokenize": True}), ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"conversations": 1}), ("chat_template_kwargs", {"self": 1}),
        ("chat_template_kwargs", {"sanitize_control_tokens": True}), ("continue_final_message", True), ("suffix", "x"),
        ("functions", [{"name": "f"}]), ("modalities", ["audio"]), ("guided_json", {}), ("vector_store_ids", ["v"]),
        ("use_beam_search", True), ("best_of", 4), ("model", 5),
    ],
)  # fmt: skip
async def test_a_wrong_parameter_is_named(http: Http, param: str, value: Any) -> None:
    body = chat_body(add_generation_prompt=True)
    if param.startswith("mesh."):
        body["mesh"] = {param.removeprefix("mesh."): value}
    elif param.startswith("messages[0]."):
        body["messages"] = [{"role": "user", "content": "x", param.removeprefix("messages[0]."): value}]
    else:
        body[param.removesuffix("[0]")] = value
    status, answer, _ = await http.post("/v1/chat/completions", body)
    assert status == 400, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]
    assert not http.service.opened


async def test_logprobs_of_a_completion(http: Http) -> None:
    for value in (21, -1, True):
        status, body = await http.complete(logprobs=value)
        assert (status, body["error"]["param"]) == (400, "logprobs")


async def test_nulls_ask_for_nothing(http: Http) -> None:
    names = (
        "n max_tokens temperature top_p stop seed logit_bias logprobs stream stream_options tools mesh suffix best_of"
    )
    status, _ = await http.chat(**dict.fromkeys(names.split()))
    assert status == 200


async def test_an_unknown_model(http: Http) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        status, body, _ = await http.post(path, {"model": "gpt-9", "messages": [{"role": "user"}], "prompt": "x"})
        assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
    status, body = await http.get("/v1/models/gpt-9")
    assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_a_mesh_without_models(http: Http) -> None:
    http.service.known = []
    for extra in ({"model": None}, {"model": "demo"}):
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
            status, body, _ = await http.post(path, {**chat_body(), "prompt": "x", **extra})
            assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
            assert "no model yet" in body["error"]["message"]
            assert "model add" in body["error"]["message"]


async def test_the_context_length(http: Http) -> None:
    status, body = await http.complete(prompt=[9] * 256)
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    status, body = await http.complete(prompt=[9] * 200, max_tokens=57)
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "context_length_exceeded", "max_tokens")
    assert "256" in body["error"]["message"]
    status, _ = await http.complete(prompt=[9] * 200, max_tokens=56)
    assert status == 200
    status, _ = await http.complete(prompt=[9] * 250)
    assert (status, http.service.opened[-1].request.sampling.max_tokens) == (200, 6)
    status, body = await http.chat(max_completion_tokens=300)
    assert body["error"]["code"] == "context_length_exceeded"


async def test_what_cannot_fit_is_refused_before_it_is_encoded(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = max(map(len, http.service._tokenizer._hf.get_vocab()))
    text = "a " * (256 * longest)
    encoded: list[int] = []

    def encode(self: Tokenizer, text: str, *, special: bool = True) -> list[int]:
        encoded.append(len(text))
        return [9] * 5

    monkeypatch.setattr(Tokenizer, "encode", encode)
    for path, body, param in (
        ("/v1/completions", {"prompt": text, "max_tokens": 1}, "prompt"),
        ("/v1/completions", {"prompt": ["short", text]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
        ("/v1/responses", {"input": text}, "messages"),
        ("/tokenize", {"prompt": "a " * 600_000}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a " * 600_000}]}, "messages"),
    ):
        status, answer, _ = await http.post(path, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded"), path
        assert answer["error"]["param"] == param
    assert not encoded
    assert (await http.post("/tokenize", {"prompt": text}))[0] == 200, "what is longer than the context can be counted"


async def test_a_long_text_is_refused_by_its_head(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies have words of a hundred spaces, so that the length alone says little."""
    tokenizer, encoded = http.service._tokenizer, []
    monkeypatch.setattr(tokenizer, "_longest", 1000)
    encode = tokenizer.encode

    def counted(text: str, *, special: bool = True) -> list[int]:
        encoded.append(len(text))
        return encode(text, special=special)

    monkeypatch.setattr(tokenizer, "encode", counted)
    text = "a b " * 20_000
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        status, answer, _ = await http.post(path, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert encoded == [16 * 256] * 2
    monkeypatch.setattr(tokenizer, "encode", lambda text, *, special=True: [9] * (len(text) // 400))
    assert (await http.post("/v1/completions", {"prompt": text}))[0] == 200, "what may fit is looked at as a whole"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b'{"a": NaN}', b"[" * 50_000, b'{"a":' * 5_000,
     b'{"model": "\\ud800"}',
     b'{"prompt": "x"} trailing'],
)  # fmt: skip
async def test_malformed_json(http: Http, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        async with http.session.post(path, data=body, headers=JSON) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["type"]) == (400, "invalid_request_error")
    assert not http.service.opened


async def test_too_large_a_body(http: Http) -> None:
    body = b'{"prompt": "' + b"x" * (8 * 1024 * 1024) + b'"}'
    async with http.session.post("/v1/completions", data=body, headers=JSON) as answer:
        assert answer.status == 413
        error = (await answer.json())["error"]
        assert error["code"] == "request_too_large"
        assert str(len(body)) in error["message"]
        assert str(8 * 1024 * 1024) in error["message"]
        assert answer.headers["x-request-id"]

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 65_536):
            yield body[at : at + 65_536]

    async with http.session.post("/v1/completions", data=pieces(), headers=JSON) as answer:
        assert answer.status == 413
        assert str(8 * 1024 * 1024) in (await answer.json())["error"]["message"]


async def test_unknown_paths_and_methods(http: Http) -> None:
    status, body = await http.get("/v1/nothing")
    assert (status, body["error"]["code"]) == (404, "not_found")
    status, body = await http.get("/v1/chat/completions")
    assert (status, body["error"]["code"]) == (405, "method_not_allowed")
    for path in ("/v1/embeddings", "/v1/files/abc", "/v1/files/abc/content", "/v1/vector_stores/x/search"):
        status, body, _ = await http.post(path, {"input": "x"})
        assert (status, body["error"]["code"]) == (501, "not_supported")
        assert path in body["error"]["message"]
        assert (await http.get(path))[0] == 501
    assert (await http.get("/v1/filesystem"))[0] == 404
    status, body = await http.get("/v1/sessions/abc/events")
    assert status == 404


async def test_the_content_type(http: Http) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        async with http.session.post("/v1/completions", data=b"{}", headers={"Content-Type": kind}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (415, "unsupported_media_type")


async def test_every_answer_carries_our_headers(http: Http) -> None:
    for path in ("/health", "/nothing", "/v1/models", "/metrics"):
        async with http.session.get(path, headers={"x-request-id": "mine-1"}) as answer:
            assert answer.headers["x-request-id"] == "mine-1"
            assert {"x-mesh-session", "x-mesh-route"} <= set(answer.headers)
    async with http.session.get("/health", headers={"x-request-id": "bad id <script>"}) as answer:
        assert answer.headers["x-request-id"].startswith("req-")


async def test_a_full_node(service: FakeService) -> None:
    async for http in serve(service, max_sessions=2, max_queue=1):
        service.hold_after = 1
        streams = [await http.session.post("/v1/completions", json={"prompt": "x", "stream": True}) for _ in range(2)]
        waiting = await _started(http, {"prompt": "waits"})
        status, body, answer = await http.post("/v1/completions", {"prompt": "x"})
        assert (status, body["error"]["code"], body["error"]["type"]) == (
            429,
            "rate_limit_exceeded",
            "rate_limit_error",
        )
        assert int(answer.headers["Retry-After"]) >= 1
        service.gate.set()
        assert (await waiting)[0] == 200
        for stream in streams:
            assert (await stream.text()).endswith("data: [DONE]\n\n")


async def _started(http: Http, body: dict[str, Any]) -> Any:
    task = asyncio.create_task(http.post("/v1/completions", body))
    while not http.server.api.gate.waiting:  # noqa: ASYNC110 - the gate has no event for a test to wait on
        await asyncio.sleep(0)
    return task


async def test_the_queue_has_a_deadline(service: FakeService) -> None:
    async for http in serve(service, max_sessions=1):
        service.hold_after = 1
        stream = await http.session.post("/v1/completions", json={"prompt": "x", "stream": True})
        status, body, answer = await http.post("/v1/completions", {"prompt": "x", "mesh": {"timeout": 0.02}})
        assert (status, body["error"]["code"]) == (503, "timeout")
        assert answer.headers["Retry-After"]
        service.gate.set()
        await stream.read()


async def test_a_mesh_without_room(http: Http) -> None:
    http.service.refuse = [CapacityError("no pages free on bob", 3.2)]
    status, body, answer = await http.post("/v1/chat/completions", chat_body())
    assert (status, body["error"]["message"]) == (429, "no pages free on bob")
    assert answer.headers["Retry-After"] == "4"


async def test_a_template_that_refuses(http: Http) -> None:
    http.service._tokenizer._hf.chat_template, kept = (
        "{{ raise_exception('no') }}",
        http.service._tokenizer._hf.chat_template,
    )
    try:
        status, body = await http.chat()
    finally:
        http.service._tokenizer._hf.chat_template = kept
    assert (status, body["error"]["code"]) == (400, "chat_template")
