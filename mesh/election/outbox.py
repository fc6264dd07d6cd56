"""Durable state and effects in order: what changed is persisted before anything that may depend on it goes out."""

from __future__ import annotations

from typing import Any

import msgspec

from mesh.core import Effect, Emit, Persist, Send
from mesh.election.durable import Durable
from mesh.election.messages import Message
from mesh.types import NodeId


class Outbox:
    """Collects the effects of one call of the core.  Changes are persisted once, just before the next effect."""

    def __init__(self, durable: Durable) -> None:
        self.durable = durable
        self._effects: list[Effect] = []
        self._dirty = False

    def save(self, **changes: Any) -> None:
        """Change fields of the durable state."""
        self.durable = msgspec.structs.replace(self.durable, **changes)
        self._dirty = True

    def send(self, to: NodeId, message: Message) -> None:
        self._persist()
        self._effects.append(Send(to, message))

    def emit(self, event: Any) -> None:
        self._persist()
        self._effects.append(Emit(event))

    def flush(self) -> list[Effect]:
        """The effects since the last flush."""
        self._persist()
        effects, self._effects = self._effects, []
        return effects

    def _persist(self) -> None:
        if self._dirty:
            self._effects.append(Persist(self.durable))
            self._dirty = False
