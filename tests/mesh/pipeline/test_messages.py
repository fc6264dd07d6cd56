"""When a generation is complete: the sampler and the owner ask the same function."""

from __future__ import annotations

import pytest

from mesh.pipeline.messages import SessionRequest, finish_reason
from mesh.types import SamplingParams

STOP = 7


def request(max_tokens: int = 4, min_tokens: int = 0, stop: tuple[int, ...] = (STOP,)) -> SessionRequest:
    sampling = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stop)
    return SessionRequest(model="m", prompt=(1, 2, 3), sampling=sampling)


@pytest.mark.parametrize(
    ("drawn", "min_tokens", "stop", "reason"),
    [
        ([], 0, (STOP,), None),
        ([1], 0, (STOP,), None),
        ([STOP], 0, (STOP,), "stop"),
        ([STOP, 1], 0, (STOP,), None),  # only the last token counts
        ([1, STOP], 2, (STOP,), "stop"),
        ([1, STOP], 3, (STOP,), None),  # before min_tokens a stop token is a token like any other
        ([1, 2, 3, 4], 0, (STOP,), "length"),
        ([1, 2, 3, STOP], 0, (STOP,), "stop"),  # a stop token at the very end is still a stop
        ([1, 2, 3, STOP], 5, (STOP,), "length"),
        ([1, 2, 3, 4, 5], 0, (STOP,), "length"),
        ([1, STOP], 0, (), None),  # ignore_eos
        ([1, 9], 0, (STOP, 9), "stop"),
    ],
)
def test_finish_reason(drawn: list[int], min_tokens: int, stop: tuple[int, ...], reason: str | None) -> None:
    assert finish_reason(request(min_tokens=min_tokens, stop=stop), drawn) == reason


def test_a_request_that_wants_no_tokens_is_complete_at_once() -> None:
    assert finish_reason(request(max_tokens=0), []) == "length"


def test_positions_are_prompt_and_completion_together() -> None:
    assert request(max_tokens=4).max_positions == 7
