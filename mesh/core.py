"""The contract of a protocol core: a protocol without a world.

A core (``gossip.swim.Swim``, ``mesh.election.election.Election``, ``mesh.pipeline.session.Session``,
``mesh.pipeline.stage.StageCore``) takes messages and the time, and answers with effects.  A driver
(``node.driver`` on the real clock, ``tests.sim`` on a virtual one) performs them.

1. No clock, chance, disk, wire, log, thread or ``await`` inside.  Same state, input, ``now`` and rng: same effects.
2. Effects are performed in list order.  A ``Persist`` is durable before the next effect begins.
3. Messages may be lost, repeated, reordered or late.  ``sender`` was authenticated by the driver.
4. ``tick`` early, late or twice does no harm.
5. A hostile message never raises: the core emits ``Rejected``.  An assertion that fails is our bug and stops the node.
6. Lists and dicts are iterated, never sets of strings: their order changes from process to process.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import msgspec

from mesh.types import NodeId


class Send(msgspec.Struct, frozen=True):
    """Send ``message`` to node ``to``; delivery is not promised."""

    to: NodeId
    message: Any


class Persist(msgspec.Struct, frozen=True):
    """Make ``record`` durable (fsynced) before the next effect begins."""

    record: Any


class Emit(msgspec.Struct, frozen=True):
    """Tell the driver's owner that ``event`` happened."""

    event: Any


Effect = Send | Persist | Emit


class Rejected(msgspec.Struct, frozen=True):
    """Event: a message from ``sender`` broke the protocol and was dropped."""

    sender: NodeId
    why: str


M = TypeVar("M", contravariant=True)


class Core(Protocol[M]):
    """A protocol core; ``now`` is monotonic seconds of one clock, never wall time."""

    @property
    def deadline(self) -> float | None:
        """When to call ``tick``; ``None``: nothing to wait for."""
        ...

    def receive(self, message: M, sender: NodeId, now: float) -> list[Effect]: ...

    def tick(self, now: float) -> list[Effect]: ...
