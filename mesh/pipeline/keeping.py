"""How much a node keeps of what it sent: in memory, past that on the disk, past that no more.

Where memory is short the oldest rows of the boundary that holds most of it go to the disk, a piece at a time, so that
pieces are large and few.  Where the disk is short too the oldest session gives up its rows: its recovery starts further
upstream.  Rows behind such a gap rebuild nobody and are given up first.

The core decides and counts; the node around it writes (``Spill``) and says what became of it, in the order in which it
was asked.  What is being written is bounded too: a disk that does not keep up costs copies, not memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.core import Effect, Emit
from mesh.pipeline.checkpoints import Checkpoints, Ledger
from mesh.pipeline.work import Forget, Spill

WRITING_BYTES = 64 << 20
"""At most so much is on its way to the disk."""


class Keeper:
    """The budgets of one node's boundaries."""

    def __init__(self, memory: int, disk: int) -> None:
        """``memory``, ``disk``: bytes; without memory nothing is kept at all."""
        self.ledger = Ledger()
        self.memory, self.disk = memory, disk if memory else 0
        self.dropped_bytes = 0
        """Given up to the budgets or by a disk that failed, all in all."""
        self._writing: dict[int, int] = {}
        self._serial = 0

    @property
    def writing(self) -> int:
        """Bytes that are on their way to the disk, and still in memory."""
        return sum(self._writing.values())

    def fit(self, boundaries: Iterable[Checkpoints]) -> list[Effect]:
        """Bring ``boundaries``, the oldest session's first, within the budgets; the disk forgets what they gave up."""
        held = list(boundaries) if self.ledger.memory > self.memory else []
        effects: list[Effect] = []
        while self.ledger.memory > self.memory:
            effects += self._relieve(held)
        gone, self.ledger.gone = tuple(self.ledger.gone), []
        return [*effects, Emit(Forget(gone))] if gone else effects

    def written(self, number: int) -> None:
        """The disk has answered for a piece, whatever it said."""
        self._writing.pop(number, None)

    def drop(self, boundary: Checkpoints) -> None:
        self.dropped_bytes += boundary.drop()

    def _relieve(self, held: list[Checkpoints]) -> list[Effect]:
        """One step: memory is left by one piece, or a boundary is given up."""
        useless = next((each for each in held if each.start and each.bytes), None)
        if useless is not None:
            self.drop(useless)
            return []
        largest = max(held, key=lambda each: each.bytes)
        size = sum(len(segment.payload) for segment in largest.next_spill())
        full = self.ledger.disk + size > self.disk
        if full or self.writing + size > WRITING_BYTES:
            self.drop(next(each for each in held if each.bytes or (full and each.end > each.start)))
            return []
        self._serial += 1
        self._writing[self._serial] = size
        return [Emit(Spill(self._serial, largest.spill(self._serial)))]
