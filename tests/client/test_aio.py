"""The SDK against real HTTP servers over fake nodes."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from client import (
    AsyncMeshClient,
    BadRequest,
    Busy,
    NoNodeReachable,
    NotAllowed,
    NotFound,
    StreamFailed,
    StreamInterrupted,
    Unavailable,
)
from mesh.errors import CapacityError, Leaving, NoRoute, SessionLost
from node.api.service import Recovery
from tests.client.conftest import Served
from tests.fakes import make_tokenizer

REPLY = "Hello there, how are you?"
HI = [{"role": "user", "content": "Hi"}]
DEAD = "http://127.0.0.1:1"
Two = tuple[Served, Served]


def client(*served: Served | str, **settings: object) -> AsyncMeshClient:
    urls = [each if isinstance(each, str) else each.url for each in served]
    return AsyncMeshClient(urls, rng=random.Random(3), **settings)  # type: ignore[arg-type]


async def test_a_whole_answer(two: Two) -> None:
    two[0].service.recoveries = (Recovery("reset", "bob:4-8", "connection", 5.0, 7, "bitwise"),)
    async with client(two[0], learn=False) as mesh:
        answer = await mesh.chat(HI, temperature=0, seed=4, logprobs=True)
    request = two[0].service.opened[0].request
    assert (answer.text, answer.finish_reason, answer.model) == (REPLY, "stop", "demo")
    assert (answer.session, answer.route) == (request.session, "ann:0-4,bob:4-8")
    assert answer.usage.prompt_tokens == len(request.prompt)
    assert answer.usage.completion_tokens == two[0].service.opened[0].drawn
    assert answer.usage.recoveries[0]["cause"] == "reset"
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs["content"]) == answer.usage.completion_tokens
    assert (request.sampling.temperature, request.sampling.seed) == (0, 4)
    assert request.idempotency_key


async def test_a_stream(two: Two) -> None:
    async with client(two[0]) as mesh:
        pieces = [piece async for piece in mesh.chat(HI, stream=True)]
        assert "".join(piece.text for piece in pieces) == REPLY
        assert pieces[-1].usage is not None
        assert pieces[-2].finish_reason == "stop"
        assert all(piece.session and piece.route for piece in pieces)
        stream = await mesh.complete("Once", stream=True, max_tokens=50)
        assert stream.progress.session
        assert "".join([piece.text async for piece in stream]) == REPLY
        assert stream.progress.texts == {0: REPLY}
        assert stream.progress.event_ids[0].endswith(f":{len(REPLY)}")
        assert stream.progress.finished == {0}


async def test_a_completion_and_choices(two: Two) -> None:
    async with client(two[0]) as mesh:
        answer = await mesh.complete(["Once", "Twice"], n=2, max_tokens=3, logprobs=1, echo=True)
    assert len(answer.choices) == 4
    assert answer.text.startswith("Once")
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs["token_logprobs"][0] is None


async def test_log_probabilities_that_were_lost_are_none(two: Two) -> None:
    """They went with a node; the tokens did not."""
    two[0].service.forgotten = 2
    async with client(two[0], learn=False) as mesh:
        chat = (await mesh.chat(HI, logprobs=True, top_logprobs=1)).choices[0].logprobs
        completion = (await mesh.complete("Once", logprobs=1)).choices[0].logprobs
        pieces = [piece async for piece in mesh.chat(HI, stream=True, logprobs=True)]
    assert chat is not None
    assert completion is not None
    streamed = [entry for piece in pieces for entry in (piece.logprobs or {}).get("content", [])]
    for values in ([entry["logprob"] for entry in chat["content"]], completion["token_logprobs"],
                   [entry["logprob"] for entry in streamed]):  # fmt: skip
        assert values[:2] == [None, None]
        assert all(value < 0 for value in values[2:])
    assert [entry["top_logprobs"] for entry in chat["content"][:2]] == [[], []]
    assert completion["top_logprobs"][:2] == [None, None]
    assert chat["refusal"] is None


async def test_tool_calls(two: Two) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    two[0].service.script = lambda request: [*make_tokenizer().encode(text, special=False), 1]
    async with client(two[0], learn=False) as mesh:
        answer = await mesh.chat(HI, tools=[{"type": "function", "function": {"name": "f"}}])
    assert answer.finish_reason == "tool_calls"
    called = answer.choices[0].tool_calls[0]["function"]
    assert (called["name"], json.loads(called["arguments"])) == ("f", {"a": 1})


async def test_models_status_and_cancel(two: Two) -> None:
    async with client(two[0]) as mesh:
        assert await mesh.models() == ["demo"]
        assert (await mesh.status())["name"] == "ann"
        assert await mesh.cancel("nothing") is False
        two[0].service.hold_after = two[1].service.hold_after = 1
        async with mesh.chat(HI, stream=True) as stream:
            assert await mesh.cancel(stream.progress.session) is True


async def test_the_other_nodes_are_learned_and_the_load_is_spread(two: Two) -> None:
    async with client(two[0]) as mesh:
        await mesh.chat(HI)
        assert mesh._learner is not None
        await mesh._learner
        assert set(mesh.nodes.urls()) == {two[0].url, two[1].url}
        for each in two:
            each.service.hold_after = 1
        streams = [await mesh.chat(HI, stream=True) for _ in range(6)]
        assert [len(each.service.live) for each in two] == [3, 3]
        for each in two:
            each.service.gate.set()
        for stream in streams:
            assert "".join([piece.text async for piece in stream]) == REPLY


async def test_a_dead_node_is_passed_over_and_left_alone(two: Two) -> None:
    async with client(DEAD, two[0], learn=False) as mesh:
        for _ in range(5):
            assert (await mesh.chat(HI)).text == REPLY
        assert mesh.nodes._nodes[DEAD].failures <= 1


async def test_a_node_that_dies_before_the_first_token_costs_nothing(two: Two) -> None:
    two[0].service.hold_after = 0
    async with client(two[0]) as mesh:
        mesh.nodes.learn([two[1].url], two[0].url)
        mesh.nodes.began(two[1].url)  # so that the first is asked
        answer = asyncio.create_task(mesh.chat(HI))
        await two[0].service.began.wait()
        two[0].kill()
        assert (await answer).text == REPLY
    keys = {each.service.opened[0].request.idempotency_key for each in two}
    assert len(keys) == 1, "the second attempt is known as a repeat"


@pytest.mark.parametrize("after", range(1, 8))
async def test_a_stream_goes_on_at_another_node_without_a_gap_or_a_repeat(two: Two, after: int) -> None:
    two[1].service.mesh = two[0].service.mesh
    two[0].service.hold_after = after
    async with client(two[0]) as mesh:
        mesh.nodes.learn([two[1].url], two[0].url)
        mesh.nodes.began(two[1].url)  # so that the first is asked
        stream = await mesh.chat(HI, stream=True, logprobs=True)
        pieces = []
        async for piece in stream:
            pieces.append(piece)
            if stream.progress.event_ids.get(0, "").startswith(f"0:{after}:") and two[0].service.live:
                two[0].kill()
    assert "".join(piece.text for piece in pieces) == REPLY
    tokens = [entry["token"] for piece in pieces for entry in (piece.logprobs or {}).get("content", [])]
    assert "".join(tokens).removesuffix("</s>") == REPLY
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
    assert (stream.progress.moves, pieces[-1].usage is not None) == (1, True)
    assert two[1].service.opened == [], "it was gone on with, not run again"


async def test_a_session_that_nobody_knows_any_more_is_run_again_under_its_key(two: Two) -> None:
    two[0].service.hold_after = 4
    async with client(two[0]) as mesh:
        mesh.nodes.learn([two[1].url], two[0].url)
        mesh.nodes.began(two[1].url)
        stream = await mesh.chat(HI, stream=True)
        pieces = []
        async for piece in stream:
            pieces.append(piece)
            if stream.progress.event_ids.get(0, "").startswith("0:4:") and two[0].service.live:
                two[0].kill()
    assert "".join(piece.text for piece in pieces) == REPLY
    before, after = (each.service.opened[0].request for each in two)
    assert (before.idempotency_key, before.sampling.seed) == (after.idempotency_key, after.sampling.seed)
    assert after.resume == tuple(make_tokenizer().encode(REPLY, special=False)[:4]), "what came is not drawn again"
    assert stream.progress.tokens == [*make_tokenizer().encode(REPLY, special=False), 1]


@pytest.mark.parametrize("more", [{"n": 2}, {"mesh": {"class": "batch"}}])
async def test_several_choices_and_batch_are_run_again_whole(two: Two, more: dict[str, object]) -> None:
    two[0].service.hold_after = 4
    async with client(two[0]) as mesh:
        mesh.nodes.learn([two[1].url], two[0].url)
        mesh.nodes.began(two[1].url)
        stream = await mesh.chat(HI, stream=True, **more)
        texts = {0: "", 1: ""}
        async for piece in stream:
            texts[piece.index] += piece.text
            if stream.progress.event_ids.get(0, "").startswith("0:4:") and two[0].service.live:
                two[0].kill()
    assert texts == {0: REPLY, 1: REPLY if "n" in more else ""}
    assert all(each.request.resume == () for each in two[1].service.opened)


async def test_a_whole_answer_survives_too(two: Two) -> None:
    two[1].service.mesh = two[0].service.mesh
    two[0].service.hold_after = 4
    async with client(two[0]) as mesh:
        mesh.nodes.learn([two[1].url], two[0].url)
        mesh.nodes.began(two[1].url)
        answer = asyncio.create_task(mesh.chat(HI))
        await two[0].service.began.wait()
        while two[0].service.opened[0].drawn < 4:  # noqa: ASYNC110  the fake has no event for it
            await asyncio.sleep(0)
        two[0].kill()
        assert (await answer).text == REPLY


async def test_a_stream_that_no_node_goes_on_with_is_told_with_how_far_it_came(two: Two) -> None:
    two[0].service.hold_after = 6
    pieces = []
    async with client(two[0], learn=False, patience_s=0.2) as mesh:
        stream = await mesh.chat(HI, stream=True)

        async def read() -> None:
            async for piece in stream:
                pieces.append(piece)
                if stream.progress.event_ids.get(0, "").startswith("0:6:"):
                    two[0].service.mesh.clear()
                    two[0].service.refuse = [NoRoute("nobody holds it") for _ in range(99)]
                    two[0].kill()

        with pytest.raises(StreamInterrupted) as caught:
            await read()
    progress = caught.value.progress
    assert REPLY.startswith(progress.texts[0])
    assert progress.event_ids[0] == f"0:6:{len(progress.texts[0])}"
    assert progress.session == two[0].service.opened[0].request.session
    assert "".join(piece.text for piece in pieces) == progress.texts[0]


async def test_a_busy_node_is_passed_over(two: Two) -> None:
    two[0].service.refuse = [CapacityError("full", 1.0) for _ in range(9)]
    async with client(*two, patience_s=0.01) as mesh:
        for _ in range(5):
            assert (await mesh.chat(HI)).text == REPLY
    assert len(two[1].service.opened) == 5


async def test_patience_ends_with_what_the_mesh_said(two: Two) -> None:
    async with client(two[0], learn=False, patience_s=0.01) as mesh:
        two[0].service.refuse = [CapacityError("full", 7.0)]
        with pytest.raises(Busy, match="full") as busy:
            await mesh.chat(HI)
        assert busy.value.retry_after_s == 7.0
        two[0].service.refuse = [NoRoute("no live node holds layers [2, 4) of demo")]
        with pytest.raises(Unavailable, match=r"layers \[2, 4\)") as unavailable:
            await mesh.chat(HI)
        assert unavailable.value.code == "no_route"


async def test_nobody_there() -> None:
    async with client(DEAD, patience_s=0.2) as mesh:
        with pytest.raises(NoNodeReachable, match=r"127\.0\.0\.1:1") as caught:
            await mesh.chat(HI)
        assert set(caught.value.failures) == {DEAD}
        with pytest.raises(NoNodeReachable):
            await mesh.models()


async def test_the_callers_fault_is_told_at_once(two: Two) -> None:
    async with client(*two) as mesh:
        with pytest.raises(BadRequest) as bad:
            await mesh.chat(HI, temperature=9)
        assert (bad.value.param, bad.value.status) == ("temperature", 400)
        with pytest.raises(NotFound):
            await mesh.chat(HI, model="gpt-9")
    assert not two[0].service.opened + two[1].service.opened


async def test_keys() -> None:
    served = await Served("ann", host="0.0.0.0").start()
    async with client(served) as mesh:
        with pytest.raises(NotAllowed):
            await mesh.chat(HI)
    async with client(served, api_key="mk-infer") as mesh:
        assert (await mesh.chat(HI)).text == REPLY
    await served.stop()


async def test_an_error_in_the_middle_is_told(two: Two) -> None:
    two[0].service.break_after = 3
    async with client(two[0], learn=False) as mesh:
        with pytest.raises(StreamFailed, match="route was lost") as caught:
            await mesh.chat(HI)
    assert caught.value.code == "session_lost"
    assert REPLY.startswith(caught.value.progress.texts[0])


@pytest.mark.parametrize("code", ["session_gone", "peer_unreachable"])
async def test_a_session_that_was_lost_while_a_node_passed_it_on_is_run_again(
    code: str, two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = two[0].service
    service.break_after, service.breaks_with = 3, SessionLost("no node has the session any more")
    service.breaks_with.code = code

    async def nobody_knows_it(*asked: object) -> None:
        service.break_after = None

    monkeypatch.setattr(service, "attach", nobody_knows_it)
    async with client(two[0], learn=False) as mesh:
        assert (await mesh.chat(HI)).text == REPLY, "no text twice, none missing"
    assert len(service.opened) == 2


@pytest.mark.parametrize("after", [1, 3, 6])
async def test_a_stream_whose_node_leaves_goes_on_at_another_at_once(two: Two, after: int) -> None:
    """Without a word to the caller, and with patience from anew; that node is asked last from then on."""
    two[1].service.mesh = two[0].service.mesh
    two[0].service.break_after, two[0].service.breaks_with = after, Leaving("session goes on at the others")
    async with client(two[0], patience_s=20.0) as mesh:
        mesh.nodes.learn([two[1].url], two[0].url)
        mesh.nodes.began(two[1].url)  # so that the first is asked
        stream = await mesh.chat(HI, stream=True)
        assert "".join([piece.text async for piece in stream]) == REPLY
        assert (stream.progress.moves, two[1].service.opened) == (1, [])
        assert mesh.nodes._nodes[two[0].url].failures >= 1


async def test_a_request_that_is_refused_by_a_node_that_leaves_is_asked_elsewhere(two: Two) -> None:
    two[0].service.refuse = [Leaving("this node is leaving: ask another")]
    async with client(*two) as mesh:
        mesh.nodes.began(two[1].url)
        assert (await mesh.chat(HI)).text == REPLY
    assert (two[0].service.opened, len(two[1].service.opened)) == ([], 1)


async def test_a_node_that_falls_silent_counts_as_gone(two: Two) -> None:
    two[0].service.hold_after = 3
    async with client(two[0], learn=False, silence_s=0.1, patience_s=0.3) as mesh:
        with pytest.raises(StreamInterrupted):
            await mesh.chat(HI)
        assert mesh.nodes._nodes[two[0].url].failures >= 1


async def test_hanging_up_frees_the_session(two: Two) -> None:
    two[0].service.hold_after = 3
    async with client(two[0], learn=False) as mesh:
        async with mesh.chat(HI, stream=True) as stream:
            await anext(stream)
            two[0].service.ended.clear()
        async with asyncio.timeout(2):
            await two[0].service.ended.wait()
        assert two[0].service.opened[0].cancelled in ("disconnected", "cancelled")
    assert mesh.nodes._nodes[two[0].url].outstanding == 0


async def test_outstanding_counts_return_to_nothing(two: Two) -> None:
    async with client(*two) as mesh:
        await asyncio.gather(*(mesh.chat(HI) for _ in range(10)))
        await mesh.models()
        with pytest.raises(BadRequest):
            await mesh.chat([])
        assert {node.outstanding for node in mesh.nodes._nodes.values()} == {0}
