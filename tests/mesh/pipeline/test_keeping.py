"""The budgets of what a node keeps: what goes to the disk, what is given up, and what the disk may forget."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mesh.core import Effect
from mesh.pipeline import keeping
from mesh.pipeline.checkpoints import Checkpoints, Segment
from mesh.pipeline.keeping import Keeper
from mesh.pipeline.work import Forget, Spill

ROW = 4


def rows(start: int, n: int) -> Segment:
    payload = b"".join(bytes([position % 256]) * ROW for position in range(start, start + n))
    return Segment(start, n, memoryview(payload))


def boundary(keeper: Keeper, *sizes: int) -> Checkpoints:
    made = Checkpoints(keeper.ledger)
    for size in sizes:
        made.append(rows(made.end, size))
    return made


def events(effects: list[Effect]) -> list[Any]:
    return [effect.event for effect in effects]  # type: ignore[union-attr]


def spilled(effects: list[Effect]) -> list[tuple[int, bytes]]:
    return [(event.number, b"".join(event.rows)) for event in events(effects) if isinstance(event, Spill)]


def held(each: Checkpoints) -> tuple[int, int, int]:
    return each.start, each.warm, each.end


def test_within_the_budget_nothing_happens() -> None:
    keeper = Keeper(8 * ROW, 100)
    assert keeper.fit([boundary(keeper, 5), boundary(keeper, 3)]) == []


def test_the_oldest_rows_of_the_largest_boundary_go_to_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.pipeline.checkpoints.REPLAY_ROWS", 3)
    keeper = Keeper(8 * ROW, 100 * ROW)
    small, large = boundary(keeper, 2), boundary(keeper, 2, 1, 2, 2)
    assert spilled(keeper.fit([small, large])) == [(1, bytes(rows(0, 3).payload))]
    assert (held(small), held(large)) == ((0, 0, 2), (0, 3, 7))
    assert (keeper.ledger.memory, keeper.ledger.disk, keeper.writing) == (6 * ROW, 3 * ROW, 3 * ROW)
    keeper.written(1)
    assert (keeper.writing, keeper.dropped_bytes) == (0, 0)


def test_past_both_budgets_the_oldest_session_gives_up_what_it_has() -> None:
    keeper = Keeper(4 * ROW, 5 * ROW)
    old, new = boundary(keeper, 5), boundary(keeper, 4)
    assert spilled(keeper.fit([old, new])) == [(1, bytes(rows(0, 5).payload))]
    new.append(rows(4, 1))
    assert events(keeper.fit([old, new])) == [Spill(2, (rows(0, 4).payload, rows(4, 1).payload)), Forget((1,))]
    assert (held(old), held(new), keeper.dropped_bytes) == ((5, 5, 5), (0, 5, 5), 5 * ROW)


@pytest.mark.parametrize("disk", [0, 1000])
def test_without_memory_or_disk_the_oldest_sessions_rows_are_given_up(disk: int) -> None:
    keeper = Keeper(0 if disk else 2 * ROW, disk)
    old, new = boundary(keeper, 2), boundary(keeper, 2)
    assert keeper.fit([old, new]) == []
    assert (held(old), held(new)) == ((2, 2, 2), (2, 2, 2) if disk else (0, 0, 2))


def test_rows_behind_a_gap_are_given_up_first() -> None:
    keeper = Keeper(5 * ROW, 100 * ROW)
    whole, gapped = boundary(keeper, 4), boundary(keeper, 3)
    gapped.drop()
    gapped.append(rows(3, 2))
    assert keeper.fit([whole, gapped]) == []
    assert (held(whole), held(gapped)) == ((0, 0, 4), (5, 5, 5))


def test_a_disk_that_does_not_keep_up_costs_rows_of_memory_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "WRITING_BYTES", 4 * ROW)
    keeper = Keeper(2 * ROW, 100 * ROW)
    written, one, other = boundary(keeper, 3), boundary(keeper), boundary(keeper)
    assert len(spilled(keeper.fit([written, one, other]))) == 1
    one.append(rows(0, 2))
    other.append(rows(0, 2))
    assert keeper.fit([written, one, other]) == []
    assert (held(written), held(one), held(other)) == ((0, 3, 3), (2, 2, 2), (0, 0, 2))
    keeper.written(1)
    other.append(rows(2, 1))
    assert [number for number, _ in spilled(keeper.fit([written, one, other]))] == [2]


def test_what_is_cut_off_on_the_disk_is_forgotten_piece_by_piece() -> None:
    keeper = Keeper(ROW, 100 * ROW)
    one = boundary(keeper)
    for start in (0, 3, 6):
        one.append(rows(start, 3))
        keeper.fit([one])
    one.cut(4)
    assert (held(one), events(keeper.fit([one]))) == ((0, 4, 4), [Forget((3,))])
    piece = one.piece_of(3)
    assert piece is not None
    assert (piece.number, piece.rows(rows(3, 3).payload, 3)) == (2, rows(3, 1))
    assert keeper.ledger.disk == 6 * ROW, "a file is not shortened"
    one.drop()
    assert events(keeper.fit([one])) == [Forget((1, 2))]
    assert keeper.ledger.disk == 0


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_verbs_keeps_budgets_and_rows(seed: int) -> None:
    """Against a plain picture: what is on the disk and in memory is, row by row, what was appended."""
    rng = random.Random(seed)
    keeper = Keeper(6 * ROW, 20 * ROW)
    held_by = [Checkpoints(keeper.ledger) for _ in range(3)]
    plain: list[bytes] = [b"", b"", b""]
    disk: dict[int, bytes] = {}
    for step in range(150):
        index = rng.randrange(3)
        one = held_by[index]
        if rng.random() < 0.7:
            added = bytes([step % 256]) * (ROW * rng.randint(1, 4))
            one.append(Segment(one.end, len(added) // ROW, memoryview(added)))
            plain[index] += added
        elif rng.random() < 0.7:
            length = rng.randint(0, one.end)
            one.cut(length)
            plain[index] = plain[index][: length * ROW]
        else:
            one.drop()
        for event in events(keeper.fit(held_by)):
            if isinstance(event, Spill):
                disk[event.number] = b"".join(event.rows)
                keeper.written(event.number)
            else:
                for number in event.numbers:
                    del disk[number]
        assert keeper.ledger.memory == sum(x.bytes for x in held_by) <= 6 * ROW
        assert keeper.ledger.disk == sum(map(len, disk.values())) <= 20 * ROW
        for each, all_rows in zip(held_by, plain, strict=True):
            at = each.start
            while at < each.warm:
                piece = each.piece_of(at)
                assert piece is not None
                found = piece.rows(memoryview(disk[piece.number]), at)
                assert bytes(found.payload) == all_rows[at * ROW : found.end * ROW]
                at = found.end
            assert b"".join(x.payload for x in each.read(each.warm)) == all_rows[each.warm * ROW :]
