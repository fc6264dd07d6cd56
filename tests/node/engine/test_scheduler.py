"""What a step takes, told as tables."""

from __future__ import annotations

import pytest

from mesh.types import ModelId, Priority
from node.engine.scheduler import LEAST_CHUNK, LONGEST_RATIO, RATIO, Pace, Slice, StepPlan, plan_step, ratio
from node.engine.sequence import Sequence, SequenceSpec, Work

MODEL = ModelId("m")


def sequence(
    key: str,
    rows: int,
    *,
    done: int = 10,
    priority: Priority = "interactive",
    hops: int = 1,
    arrival: int = 0,
    served: int = -1,
    start: int = 0,
    rebuilds: int = 0,
) -> Sequence:
    """One that has computed ``done`` positions and wants ``rows`` more (0: it waits for its next token)."""
    made = Sequence(SequenceSpec(key, MODEL, start, 4, 4096, priority, hops, rebuilds=rebuilds), arrival)
    made.length, made.served, made.decoding = done, served, rows <= 1
    if rows:
        made.push(Work(key, 0, done, rows))
    return made


def taken(plan: StepPlan) -> dict[str, int]:
    return {piece.key: piece.n for group in plan.groups for piece in group.slices}


def test_nothing_wanted_is_an_empty_plan() -> None:
    assert plan_step([sequence("a", 0)], 64, 64) == StepPlan()


def test_single_rows_and_chunks_share_a_step() -> None:
    plan = plan_step([sequence("a", 1), sequence("long", 100), sequence("b", 1)], 64, 16)
    assert taken(plan) == {"a": 1, "b": 1, "long": 16}
    assert [piece for g in plan.groups for piece in g.slices if piece.key == "long"] == [Slice("long", 10, 16, False)]


def test_a_chunk_that_completes_its_work_says_so() -> None:
    plan = plan_step([sequence("a", 12)], 64, 16)
    assert plan.groups[0].slices == (Slice("a", 10, 12, True),)


def test_long_prompts_never_keep_single_rows_waiting() -> None:
    crowd = [sequence(f"p{i}", 1000, arrival=i) for i in range(8)] + [sequence("late", 1, arrival=99)]
    assert taken(plan_step(crowd, 64, 64))["late"] == 1


def test_single_rows_never_keep_long_prompts_waiting() -> None:
    crowd = [sequence(f"d{i}", 1, arrival=i) for i in range(200)] + [sequence("prompt", 1000, arrival=999)]
    plan = plan_step(crowd, 64, 16)
    assert taken(plan)["prompt"] == 16
    assert plan.rows == 64


def test_more_single_rows_than_room_take_turns() -> None:
    crowd = [sequence(f"d{i}", 1, arrival=i, served=5 if i < 4 else 4) for i in range(8)]
    assert set(taken(plan_step(crowd, 4, 4))) == {"d4", "d5", "d6", "d7"}


def test_prompts_of_a_class_take_turns() -> None:
    """A short prompt that came second does not wait for all of a long one."""
    long, short = sequence("long", 4000, arrival=1, served=7), sequence("short", 100, arrival=2)
    plan = plan_step([long, short], 128, 128)
    assert [(piece.key, piece.n) for group in plan.groups for piece in group.slices] == [("short", 100), ("long", 28)]


def test_streams_are_rebuilt_before_new_prompts_the_soonest_done_first() -> None:
    crowd = [
        sequence("prompt", 50, served=-1),
        sequence("longer", 90, rebuilds=100, served=1),
        sequence("shorter", 60, rebuilds=70, served=2),
    ]
    assert list(taken(plan_step(crowd, 200, 200))) == ["shorter", "longer", "prompt"]
    assert taken(plan_step(crowd, 80, 80)) == {"shorter": 60, "longer": 20}, "one after the other"


@pytest.mark.parametrize(
    ("crowd", "expected"),
    [
        ([sequence("prompt", 50)], 0.0),
        ([sequence("prompt", 50), sequence("decodes", 1)], RATIO),
        ([sequence("stands", 50, rebuilds=60), sequence("decodes", 1)], LONGEST_RATIO),
        ([sequence("done", 50, rebuilds=10), sequence("decodes", 1)], RATIO),
        ([sequence("stands", 50, rebuilds=60, priority="batch"), sequence("decodes", 1)], RATIO),
        ([sequence("stands", 50, rebuilds=60), sequence("decodes", 1, priority="batch")], LONGEST_RATIO),
    ],
)
def test_steps_are_longer_while_a_stream_of_no_lower_class_is_rebuilt(crowd: list[Sequence], expected: float) -> None:
    assert ratio(crowd) == expected


@pytest.mark.parametrize(
    ("waiting", "decoding", "priority", "expected"),
    [
        (1, 4, "interactive", RATIO),
        (4, 4, "interactive", RATIO),
        (6, 4, "interactive", 1.5 * RATIO),
        (12, 1, "interactive", LONGEST_RATIO),
        (12, 1, "batch", RATIO),
    ],
)
def test_steps_are_longer_while_more_streams_wait_than_decode(
    waiting: int, decoding: int, priority: Priority, expected: float
) -> None:
    crowd = [sequence(f"w{i}", 50, priority=priority) for i in range(waiting)]
    assert ratio([*crowd, *(sequence(f"d{i}", 1) for i in range(decoding))]) == expected


@pytest.mark.parametrize("rows", [1, 50])
def test_classes_go_in_order_and_arrivals_within_a_class(rows: int) -> None:
    crowd = [
        sequence("batch", rows, priority="batch", arrival=0),
        sequence("normal 2", rows, priority="normal", arrival=3),
        sequence("normal 1", rows, priority="normal", arrival=2),
        sequence("interactive", rows, arrival=4),
    ]
    assert list(taken(plan_step(crowd, 3 * rows, 3 * rows))) == ["interactive", "normal 1", "normal 2"]


def test_what_was_cancelled_is_not_in_the_next_plan() -> None:
    """Closing removes the sequence, truncating its queued work; a plan is made from what is left."""
    kept, cut = sequence("kept", 1), sequence("cut", 50)
    cut.cut(10)
    assert taken(plan_step([kept, cut], 64, 64)) == {"kept": 1}


def test_sequences_over_other_layers_are_another_group() -> None:
    plan = plan_step([sequence("a", 1), sequence("b", 1, start=2), sequence("c", 1)], 64, 64)
    assert [(g.start, g.end, [s.key for s in g.slices]) for g in plan.groups] == [(0, 4, ["a", "c"]), (2, 4, ["b"])]


@pytest.mark.parametrize(
    ("hops", "decoding", "ready", "expected"),
    [
        (1, 16, 16, 16),  # one stage: all at once
        (4, 16, 16, 4),  # four stages: a quarter each, so that each has one to work on
        (4, 16, 2, 2),  # the others are under way
        (3, 7, 7, 3),  # rounded up: nobody waits for a fraction
        (4, 1, 1, 1),
    ],
)
def test_hop_0_makes_as_many_micro_batches_as_there_are_hops(
    hops: int, decoding: int, ready: int, expected: int
) -> None:
    crowd = [sequence(f"s{i}", int(i < ready), hops=hops, arrival=i) for i in range(decoding)]
    assert plan_step(crowd, 64, 64).rows == expected


def test_micro_batches_are_hop_0s_alone() -> None:
    crowd = [sequence(f"s{i}", 1, hops=4, arrival=i, start=2) for i in range(8)]
    assert plan_step(crowd, 64, 64).rows == 8


def test_micro_batches_take_turns() -> None:
    crowd = [sequence(f"s{i}", 1, hops=2, arrival=i) for i in range(4)]
    first = taken(plan_step(crowd, 64, 64))
    for s in crowd:
        if s.spec.key in first:
            s.advance(1, step=1)
            s.push(Work(s.spec.key, 0, s.length, 1))
    second = taken(plan_step(crowd, 64, 64))
    assert set(first) | set(second) == {"s0", "s1", "s2", "s3"}


def test_pace_keeps_steps_beside_decoding_in_proportion() -> None:
    pace = Pace(512)
    assert pace.chunk_rows(0.0) == 512
    assert pace.chunk_rows(RATIO) == 2 * LEAST_CHUNK
    for _ in range(50):
        pace.observe(8, 0, 0.020)
        pace.observe(8, 64, 0.020 + 64 * 0.0005)
    rows = pace.chunk_rows(RATIO)
    assert 0.020 + rows * 0.0005 <= RATIO * 0.020 * 1.01
    assert rows >= LEAST_CHUNK


def test_pace_is_not_held_down_by_its_own_short_chunks() -> None:
    """What single rows take is not counted as the chunk's: with it a row of a short chunk looks dear for good."""
    pace = Pace(512)
    for _ in range(50):
        pace.observe(4, 0, 0.020)
        chunk = pace.chunk_rows(RATIO)
        pace.observe(4, chunk, 0.020 + chunk * 0.0005)
    assert 0.9 <= pace.chunk_rows(RATIO) * 0.0005 / ((RATIO - 1) * 0.020) <= 1.0


def test_pace_lets_a_slow_prefill_go_on() -> None:
    pace = Pace(512)
    pace.observe(1, 0, 0.001)
    pace.observe(1, 64, 10.0)
    assert pace.chunk_rows(RATIO) == LEAST_CHUNK
