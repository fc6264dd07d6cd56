"""Which node is asked next."""

from __future__ import annotations

import random

import pytest

from client.nodes import DOWN_MAX_S, Nodes, clean_url

A, B, C = "http://a:1", "http://b:1", "http://c:1"


def nodes(*urls: str) -> Nodes:
    return Nodes(urls or (A, B, C), random.Random(1))


def test_the_least_busy_is_asked_and_equals_at_random() -> None:
    known = nodes()
    assert {known.pick(0.0) for _ in range(50)} == {A, B, C}
    known.began(A)
    known.began(B)
    assert {known.pick(0.0) for _ in range(20)} == {C}
    known.ended(B)
    assert {known.pick(0.0) for _ in range(50)} == {B, C}


def test_a_failed_node_rests_ever_longer_and_recovers() -> None:
    known = nodes(A, B)
    rest = 0.0
    for _ in range(10):
        known.failed(A, 0.0)
        (down,) = [until for until in (1, 2, 4, 8, 16, DOWN_MAX_S) if known._nodes[A].down_until == until]
        assert down >= rest
        rest = down
    assert rest == DOWN_MAX_S
    assert {known.pick(DOWN_MAX_S - 1) for _ in range(20)} == {B}
    assert {known.pick(DOWN_MAX_S) for _ in range(50)} == {A, B}
    known.worked(A)
    assert {known.pick(0.0) for _ in range(50)} == {A, B}


def test_when_all_are_down_the_one_that_rests_least_is_asked() -> None:
    known = nodes(A, B)
    known.failed(A, 0.0)
    known.failed(B, 0.0)
    known.failed(B, 0.0)
    assert known.pick(0.1) == A
    assert known.pick(0.1, {A}) == B
    assert known.pick(0.1, {A, B}) is None


def test_learning() -> None:
    known = nodes(A)
    known.learn([B, C, "nonsense", "ftp://x"], A)
    assert known.urls() == [A, B, C]
    known.began(B)
    known.learn([], A)
    assert known.urls() == [A, B], "given nodes and busy ones stay"


def test_what_is_not_believed() -> None:
    known = nodes(A, "https://s:1")
    known.learn(["http://127.0.0.1:9000", "http://localhost:1", "http://[::1]:5"], A)
    known.learn(["http://d:1"], "https://s:1")
    assert known.urls() == [A, "https://s:1"]
    local = nodes("http://127.0.0.1:1")
    local.learn(["http://127.0.0.1:2", "http://d:1"], "http://127.0.0.1:1")
    assert len(local.urls()) == 3


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("http://a:1/", A),
        ("a:1", A),
        ("http://a:1/v1", A),
        ("http://a:1/v1/", A),
        ("https://h/mesh/", "https://h/mesh"),
    ],
)
def test_urls(url: str, clean: str) -> None:
    assert clean_url(url) == clean


@pytest.mark.parametrize("url", ["", "ftp://a", "http://", "://"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ValueError, match="not a URL"):
        clean_url(url)


def test_none_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Nodes([], random.Random())
