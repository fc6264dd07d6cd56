"""What a boundary keeps: positions without gap, cut, dropped, and read back in frames of a bounded size."""

from __future__ import annotations

import random

import pytest

from mesh.pipeline.checkpoints import REPLAY_ROWS, Checkpoints, Segment

ROW = 3


def rows(start: int, n: int, salt: int = 0) -> Segment:
    """``n`` rows of ``ROW`` bytes, each saying its position."""
    payload = b"".join(bytes((position % 256, position >> 8, salt)) for position in range(start, start + n))
    return Segment(start, n, memoryview(payload))


def held(*lengths: int) -> Checkpoints:
    made = Checkpoints()
    for n in lengths:
        made.append(rows(made.end, n))
    return made


def contents(kept: Checkpoints, first: int) -> bytes:
    return b"".join(piece.payload for piece in kept.read(first))


@pytest.mark.parametrize(("first", "end"), [(10, 14), (10, 12), (12, 14), (11, 13), (13, 13)])
def test_a_slice_holds_the_rows_of_its_positions(first: int, end: int) -> None:
    piece = rows(10, 4).slice(first, end)
    assert (piece.start, piece.n, piece.end) == (first, end - first, end)
    assert bytes(piece.payload) == bytes(rows(first, end - first).payload)


def test_a_slice_copies_nothing() -> None:
    whole = rows(0, 4)
    assert whole.slice(1, 3).payload.obj is whole.payload.obj
    assert whole.slice(0, 4) is whole


@pytest.mark.parametrize("first", range(8))
def test_reading_gives_what_was_appended_from_there_on(first: int) -> None:
    assert contents(held(3, 1, 3), first) == bytes(rows(first, 7 - first).payload)


@pytest.mark.parametrize("start", [2, 4])
def test_a_gap_or_an_overlap_is_our_bug(start: int) -> None:
    with pytest.raises(AssertionError):
        held(3).append(rows(start, 1))


@pytest.mark.parametrize("first", [-1, 8])
def test_reading_what_is_not_held_is_our_bug(first: int) -> None:
    with pytest.raises(AssertionError):
        held(3, 4).read(first)


def test_what_was_dropped_cannot_be_read() -> None:
    kept = held(3, 4)
    kept.drop()
    assert kept.read(7) == []
    with pytest.raises(AssertionError):
        kept.read(6)


@pytest.mark.parametrize(("length", "left"), [(9, 7), (7, 7), (5, 5), (4, 4), (3, 3), (1, 1), (0, 0)])
def test_a_cut_forgets_from_its_length_on(length: int, left: int) -> None:
    kept = held(3, 1, 3)
    kept.cut(length)
    assert (kept.start, kept.end, kept.bytes) == (0, left, left * ROW)
    assert contents(kept, 0) == bytes(rows(0, left).payload)
    kept.append(rows(left, 2, salt=1))
    assert kept.end == left + 2


def test_a_drop_says_what_it_freed_and_keeps_the_place() -> None:
    kept = held(3, 4)
    assert kept.drop() == 7 * ROW
    assert (kept.start, kept.end, kept.bytes) == (7, 7, 0)
    kept.append(rows(7, 2))
    assert contents(kept, 7) == bytes(rows(7, 2).payload)


@pytest.mark.parametrize(("length", "start"), [(9, 7), (8, 7), (7, 7), (4, 4), (0, 0)])
def test_a_cut_below_what_was_dropped_moves_the_start(length: int, start: int) -> None:
    kept = held(3, 4)
    kept.drop()
    kept.append(rows(7, 2))
    kept.cut(length)
    assert (kept.start, kept.end) == (start, length)
    kept.append(rows(length, 1))


def test_short_segments_are_read_in_frames_of_a_bounded_size() -> None:
    kept = held(*[1] * (2 * REPLAY_ROWS + 100))
    pieces = kept.read(50)
    assert [piece.n for piece in pieces] == [REPLAY_ROWS, REPLAY_ROWS, 50]
    assert [piece.start for piece in pieces] == [50, 50 + REPLAY_ROWS, 50 + 2 * REPLAY_ROWS]
    assert contents(kept, 50) == bytes(rows(50, 2 * REPLAY_ROWS + 50).payload)


def test_a_live_session_reads_its_last_segment_without_a_copy() -> None:
    kept = held(*[1] * 100)
    last = rows(100, 1)
    kept.append(last)
    assert kept.read(100) == [last]
    assert kept.read(100)[0].payload.obj is last.payload.obj


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_verbs_agrees_with_a_plain_list(seed: int) -> None:
    rng, kept = random.Random(seed), Checkpoints()
    plain: dict[int, bytes] = {}
    start = end = 0
    for step in range(60):
        verb = rng.choice(["append", "append", "cut", "drop", "read"])
        if verb == "append":
            piece = rows(end, rng.randint(1, 9), salt=step)
            kept.append(piece)
            plain |= {piece.start + i: bytes(piece.payload[i * ROW : (i + 1) * ROW]) for i in range(piece.n)}
            end = piece.end
        elif verb == "cut":
            end = min(end, rng.randint(0, end + 1))
            start = min(start, end)
            kept.cut(end)
            plain = {position: row for position, row in plain.items() if position < end}
        elif verb == "drop" and rng.random() < 0.3:
            assert kept.drop() == len(plain) * ROW
            start, plain = end, {}
        assert (kept.start, kept.end, kept.bytes) == (start, end, len(plain) * ROW)
        first = rng.randint(start, end)
        assert contents(kept, first) == b"".join(plain[position] for position in range(first, end))
