"""News: fresh first, bounded times, one piece per subject."""

from __future__ import annotations

import pytest

from gossip.broadcast import BroadcastQueue
from gossip.config import GossipConfig, memberlist


def queue(limit: int = 100) -> BroadcastQueue[str]:
    return BroadcastQueue(size=len, limit=limit)


def test_the_newest_goes_first_and_the_least_sent_before_it() -> None:
    news = queue()
    for name in ("a", "b", "c"):
        news.add(name, name * 30)
    assert news.take(60, 5) == ["c" * 30, "b" * 30]
    assert news.take(60, 5) == ["a" * 30, "c" * 30]


def test_each_is_sent_so_many_times() -> None:
    news = queue()
    news.add("a", "x" * 30)
    assert [news.take(100, 3) for _ in range(4)] == [["x" * 30]] * 3 + [[]]
    assert not news


def test_newer_news_of_a_subject_replaces_older_and_starts_again() -> None:
    news = queue()
    news.add("a", "old" * 10)
    news.take(100, 3)
    news.add("a", "new" * 10)
    assert [news.take(100, 3) for _ in range(4)] == [["new" * 10]] * 3 + [[]]


def test_a_look_is_not_counted_and_one_subject_can_be_skipped() -> None:
    news = queue()
    news.add("a", "a" * 30)
    news.add("b", "b" * 30)
    assert news.take(100, 1, skip=("b",), count=False) == ["a" * 30]
    assert news.take(100, 1) == ["b" * 30, "a" * 30]
    assert not news


def test_what_does_not_fit_lets_smaller_news_pass() -> None:
    news = queue()
    news.add("small", "s" * 20)
    news.add("big", "b" * 200)
    assert news.take(50, 3) == ["s" * 20]
    assert "big" in news


def test_a_full_queue_drops_what_was_sent_most() -> None:
    news = queue(limit=2)
    news.add("a", "a" * 30)
    news.take(100, 9)
    news.add("b", "b" * 30)
    news.add("c", "c" * 30)
    assert len(news) == 2
    assert "a" not in news


@pytest.mark.parametrize(("n", "times"), [(1, 8), (9, 8), (99, 8), (100, 9), (1000, 13)])
def test_retransmissions(n: int, times: int) -> None:
    """ceil(4 log10(n + 1)), at least 8; memberlist's has no floor."""
    assert GossipConfig().retransmissions(n) == times


@pytest.mark.parametrize(("n", "times"), [(1, 2), (2, 2), (3, 3), (9, 4), (10, 5), (99, 8), (1000, 13)])
def test_retransmissions_as_published(n: int, times: int) -> None:
    assert memberlist().retransmissions(n) == times
