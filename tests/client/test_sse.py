"""Events from bytes, however they are cut."""

from __future__ import annotations

import pytest

from client.sse import Event, SseParser

STREAM = (
    ': hello\n\nid: 0:1:2\ndata: {"a": "é"}\n\ndata: x\r\ndata: y\r\n\r\n'
    "id: 9\nevent: odd\nretry: 5\n\ndata: [DONE]\n\n"
)
EVENTS = [Event("0:1:2", '{"a": "é"}'), Event("0:1:2", "x\ny"), Event("9", "[DONE]")]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_however_the_bytes_are_cut(size: int) -> None:
    data, parser = STREAM.encode(), SseParser()
    found = [event for at in range(0, len(data), size) for event in parser.feed(data[at : at + size])]
    assert found == EVENTS


def test_an_endless_line_is_refused() -> None:
    parser = SseParser(max_bytes=100)
    assert parser.feed(b"x" * 60) == []
    with pytest.raises(ValueError, match="too long"):
        parser.feed(b"x" * 60)


def test_a_field_without_a_value_or_space() -> None:
    assert SseParser().feed(b"data\n\ndata:x\n\n") == [Event("", ""), Event("", "x")]
