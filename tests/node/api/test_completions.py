"""``/v1/completions``: the forms of a prompt, echo, and what evaluation harnesses read from log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import FakeGeneration, logprob_of, make_tokenizer
from tests.node.api.conftest import Http

REPLY = "Hello there, how are you?"


async def test_a_whole_answer(http: Http) -> None:
    status, body = await http.complete(max_tokens=50)
    assert status == 200
    assert (body["object"], body["model"]) == ("text_completion", "demo")
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": REPLY, "logprobs": None, "finish_reason": "stop"}]


async def test_sixteen_tokens_unless_told(http: Http) -> None:
    await http.complete()
    assert http.service.opened[0].request.sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "count"), [("Once", 1), (["Once", "Twice"], 2), ([72, 73, 74], 1), ([[72, 73], [74], [75]], 3)]
)
async def test_all_forms_of_a_prompt(http: Http, prompt: Any, count: int) -> None:
    status, body = await http.complete(prompt=prompt, n=2)
    assert status == 200
    assert [c["index"] for c in body["choices"]] == list(range(2 * count))
    prompts = [g.request.prompt for g in sorted(http.service.opened, key=lambda g: g.request.choice)]
    assert body["usage"]["prompt_tokens"] == sum(len(p) for p in prompts[::2])
    if isinstance(prompt, list) and isinstance(prompt[0], list):
        assert [list(p) for p in prompts[::2]] == prompt


@pytest.mark.parametrize(
    "prompt",
    [[1, None, 2], [[1, None]], [None], ["a", None], ["a", 1], [1, "a"], [], [[]], "", None, 7, {}, [True], [-1],
     [10**9], [1.5], [[1], 2]],
)  # fmt: skip
async def test_bad_prompts_are_named(http: Http, prompt: Any) -> None:
    status, body = await http.complete(prompt=prompt)
    assert (status, body["error"]["param"], body["error"]["type"]) == (400, "prompt", "invalid_request_error")
    assert not http.service.opened


async def test_more_prompts_than_places(http: Http) -> None:
    """Choices past the first of a request wait for places rather than fail it."""
    http.server.api.gate.max_sessions, http.server.api.gate.max_queue = 2, 0
    status, body = await http.complete(prompt=["Once"] * 40)
    assert (status, len(body["choices"])) == (200, 40)


async def test_echo_shows_the_prompt_first(http: Http) -> None:
    _, body = await http.complete(echo=True, max_tokens=50)
    assert body["choices"][0]["text"] == "Once" + REPLY
    _, body = await http.complete(echo=True, max_tokens=50, prompt=make_tokenizer().encode("Once"))
    assert body["choices"][0]["text"] == "Once" + REPLY


@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize("prompt", ["The quick brown fox", "T", [72, 73, 74, 75]])
async def test_echo_with_logprobs_as_a_harness_reads_it(http: Http, prompt: Any, first: int | None) -> None:
    """lm-evaluation-harness scores ``token_logprobs[ctxlen:-1]``: prompt tokens plus exactly one new one, EOS too."""
    if first is not None:
        http.service.script = lambda request: [first]
    _, body = await http.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0)
    ids = prompt if isinstance(prompt, list) else make_tokenizer().encode(prompt)
    entries = body["choices"][0]["logprobs"]
    assert {len(entries[key]) for key in entries} == {len(ids) + 1}
    assert set(entries) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert entries["token_logprobs"][0] is None
    assert entries["top_logprobs"][0] is None
    assert entries["token_logprobs"][1:-1] == [logprob_of(at, token) for at, token in enumerate(ids)][1:]
    for value, top in zip(entries["token_logprobs"][1:], entries["top_logprobs"][1:], strict=True):
        assert max(top.values()) == value
    assert body["usage"]["completion_tokens"] == 1


async def test_scoring_only(http: Http) -> None:
    _, body = await http.complete(prompt="The quick", echo=True, logprobs=0, max_tokens=0)
    ids = make_tokenizer().encode("The quick")
    assert body["choices"][0]["text"] == "The quick"
    assert len(body["choices"][0]["logprobs"]["tokens"]) == len(ids)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    assert http.service.opened[0].request.sampling.max_tokens == 1
    status, body = await http.complete(max_tokens=0)
    assert (status, body["error"]["param"]) == (400, "max_tokens")


async def test_text_offsets_and_spelling(http: Http) -> None:
    text = "a é b"
    http.service.script = lambda request: [*make_tokenizer().encode(text, special=False), 1]
    _, body = await http.complete(logprobs=2, max_tokens=20)
    entries = body["choices"][0]["logprobs"]
    for token, offset in zip(entries["tokens"], entries["text_offset"], strict=True):
        if not token.startswith(("bytes:", "</s>")):
            assert (body["choices"][0]["text"] + " ")[offset:].startswith(token) or offset > 1
    assert "bytes:\\xc3" in entries["tokens"]
    assert all(len(top) == 2 for top in entries["top_logprobs"])


async def test_best_of_is_refused(http: Http) -> None:
    status, body = await http.complete(best_of=3)
    assert (status, body["error"]["param"]) == (400, "best_of")
    status, _ = await http.complete(best_of=1)
    assert status == 200


async def test_scores_of_an_echoed_prompt_that_were_lost_with_an_owner_are_null(
    http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGeneration, "_prompt_events", lambda self: [])
    status, body = await http.complete(prompt="The quick", echo=True, logprobs=0, max_tokens=2)
    shown = body["choices"][0]["logprobs"]
    prompt = len(make_tokenizer().encode("The quick"))
    assert (status, shown["token_logprobs"][:prompt]) == (200, [None] * prompt)
    assert all(value < 0 for value in shown["token_logprobs"][prompt:])
