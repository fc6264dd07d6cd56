"""Shared pages at a hop: names, hits, what is kept, and what goes first."""

from __future__ import annotations

from mesh.pipeline.checkpoints import Checkpoints, Segment
from mesh.pipeline.prefix import Pages, Prefix, chain_of
from mesh.pipeline.work import DropPages, KeepPages, TakePages
from mesh.types import LayerSpan, ModelId

SPAN = LayerSpan(ModelId("toy"), 2, 4)
TOKENS = tuple(range(100, 113))
CHAIN = chain_of(TOKENS, 4, "toy", "caller")


def rows(start: int, n: int) -> memoryview:
    return memoryview(b"".join(bytes([position]) * 2 for position in range(start, start + n)))


def computed(pages: Pages, key: str, done: int, chain: tuple[bytes, ...] = CHAIN) -> tuple[Prefix, Checkpoints]:
    """A session that computed ``done`` positions in one go."""
    checkpoints = Checkpoints()
    prefix = Prefix(pages, SPAN, key, 8, checkpoints)
    prefix.chain = chain
    checkpoints.append(Segment(0, done, rows(0, done)))
    return prefix, checkpoints


def test_a_name_tells_all_tokens_before_it_and_who_shares() -> None:
    assert len(CHAIN) == 3  # whole pages only
    assert chain_of(TOKENS[:8], 4, "toy", "caller") == CHAIN[:2]
    other = chain_of((99, *TOKENS[1:]), 4, "toy", "caller")
    assert all(a != b for a, b in zip(CHAIN, other, strict=True))
    for sharers in (("toy", "other"), ("toycaller", ""), ("", "toycaller"), ("toy",)):
        assert not {*chain_of(TOKENS, 4, *sharers)} & {*CHAIN}
    assert chain_of((1, 23, 4, 5), 4) != chain_of((12, 3, 4, 5), 4)


def test_pages_are_kept_as_they_are_computed_and_taken_with_their_rows() -> None:
    pages = Pages(4)
    first, _ = computed(pages, "a", 13)
    assert [e.event for e in first.keep(7)] == [KeepPages("a", 4, ((0, 1),))]
    assert first.keep(7) == []
    assert [e.event for e in first.keep(13)] == [KeepPages("a", 4, ((4, 2), (8, 3)))]
    assert (len(pages), pages.row_bytes) == (3, 24)
    checkpoints = Checkpoints()
    second = Prefix(pages, SPAN, "b", 8, checkpoints)
    second.chain = CHAIN
    assert [e.event for e in second.take(11)] == [TakePages("b", 4, (1, 2))]
    assert (second.length, pages.looked_up, pages.found) == (8, 12, 8)
    assert b"".join(s.payload for s in checkpoints.read(0)) == bytes(rows(0, 8))
    checkpoints.append(Segment(8, 5, rows(8, 5)))
    assert second.keep(13) == []  # held already


def test_other_spans_and_engines_without_pages_share_nothing() -> None:
    pages = Pages(4)
    first, _ = computed(pages, "a", 13)
    first.keep(13)
    for span, page_bytes in ((LayerSpan(ModelId("toy"), 2, 3), 8), (SPAN, 0)):
        other = Prefix(pages, span, "b", page_bytes, Checkpoints())
        other.chain = CHAIN
        assert (other.take(13), other.length) == ([], 0)
    none, _ = computed(pages, "c", 13, chain_of(TOKENS[::-1], 4))
    none._page_bytes = 0
    assert none.keep(13) == []


def test_a_page_is_not_kept_without_its_rows() -> None:
    pages = Pages(4)
    prefix, checkpoints = computed(pages, "a", 6)
    checkpoints.drop()  # the budget took them
    checkpoints.append(Segment(6, 7, rows(6, 7)))
    assert [e.event for e in prefix.keep(13)] == [KeepPages("a", 4, ((8, 1),))]
    assert bytes(pages.find(SPAN, CHAIN[2:], 1)[0].rows or b"") == bytes(rows(8, 4))


def test_what_was_rolled_back_is_kept_when_it_is_computed_again() -> None:
    pages = Pages(4)
    prefix, checkpoints = computed(pages, "a", 13)
    prefix.chain = ()
    prefix.keep(13)
    prefix.cut(5)
    checkpoints.cut(5)
    prefix.chain = CHAIN
    checkpoints.append(Segment(5, 4, rows(5, 4)))
    assert [e.event for e in prefix.keep(9)] == [KeepPages("a", 4, ((0, 1), (4, 2)))]


def test_the_least_recently_used_goes_first_and_of_a_prefix_its_end() -> None:
    pages = Pages(4)
    other_chain = chain_of(TOKENS, 4, "toy", "other")
    old, _ = computed(pages, "a", 13)
    old.keep(13)
    new, _ = computed(pages, "b", 13, other_chain)
    new.keep(13)
    assert [e.event for e in pages.evict(bytes_=9)] == [DropPages((3, 2))]
    assert pages.find(SPAN, CHAIN, 3)[0].number == 1  # used: now the others are older
    assert [e.event for e in pages.evict(row_bytes=1)] == [DropPages((6,))]
    assert pages.evict() == []
    assert [e.event for e in pages.evict(bytes_=1 << 40)] == [DropPages((5, 4, 1))]
    assert (len(pages), pages.row_bytes) == (0, 0)


def test_pages_of_a_span_that_is_given_up_go() -> None:
    pages = Pages(4)
    first, _ = computed(pages, "a", 13)
    first.keep(13)
    assert pages.keep_only(lambda span: span == SPAN) == []
    assert [e.event for e in pages.keep_only(lambda span: False)] == [DropPages((3, 2, 1))]
