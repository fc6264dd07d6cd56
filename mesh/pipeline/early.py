"""Frames that came before the Open of their epoch: they wait, in bounds."""

from __future__ import annotations

from mesh.pipeline import messages as m
from mesh.types import NodeId

Frame = tuple[float, NodeId, m.PipelineMessage]
"""(when it came, sender, message)."""


class EarlyFrames:
    """At most so many frames and bytes; what is dropped is asked for again by Gap."""

    def __init__(self, max_frames: int, max_bytes: int) -> None:
        self.frames = self.bytes = 0
        self._max_frames, self._max_bytes = max_frames, max_bytes
        self._waiting: dict[m.SessionId, list[Frame]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def hold(self, message: m.PipelineMessage, sender: NodeId, now: float) -> None:
        size = size_of(message)
        if self.frames >= self._max_frames or self.bytes + size > self._max_bytes:
            return
        self._waiting.setdefault(message.session, []).append((now, sender, message))
        self.frames += 1
        self.bytes += size

    def take(self, session: m.SessionId) -> list[Frame]:
        """Those of ``session``, in the order in which they came."""
        found = self._waiting.pop(session, [])
        self.frames -= len(found)
        self.bytes -= sum(size_of(message) for _, _, message in found)
        return found

    def forget(self, before: float) -> None:
        """Sessions of which nothing came since ``before``."""
        for session, frames in list(self._waiting.items()):
            if frames[-1][0] < before:
                self.take(session)


def size_of(message: m.PipelineMessage) -> int:
    """About what a held message takes in memory."""
    if isinstance(message, m.Forward):
        return 64 + len(message.payload)
    return 64 + (8 * len(message.tokens) if isinstance(message, m.Feed) else 0)
