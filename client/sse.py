"""Server-sent events from bytes that arrive in any cut (WHATWG HTML, 9.2.6)."""

from __future__ import annotations

from typing import NamedTuple


class Event(NamedTuple):
    id: str
    data: str


class SseParser:
    """Feed bytes, get whole events.  Comments and unknown fields are skipped."""

    def __init__(self, max_bytes: int = 16 * 1024 * 1024) -> None:
        self._rest = b""
        self._id = ""
        self._data: list[str] = []
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> list[Event]:
        """ValueError for a line longer than ``max_bytes``: no honest server sends one."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > self._max_bytes:
            raise ValueError("an event of the stream is too long")
        found = [self._line(line.removesuffix(b"\r").decode("utf-8", "replace")) for line in lines]
        return [event for event in found if event is not None]

    def _line(self, line: str) -> Event | None:
        if not line:
            event = Event(self._id, "\n".join(self._data)) if self._data else None
            self._data = []
            return event
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = value
        return None
