"""A forward without what transformers does around the layers, where each of them has its lean form.

Around its layers a model makes positions, rotary embeddings and masks anew, looks for hooks and asks its configuration:
in a decoding step as long as two or three tiny layers, and that at every hop of a route.  All of it follows from
positions alone.  So it is learned from passes of the model itself that skip every layer, and kept in tables.

How ids are embedded and what the head makes of the last layer's output is tried, not guessed: ``selfcheck`` holds this
forward against the ordinary one, bit by bit (docs/decisions/0102).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from node.engine.attention import MaskRule
from node.engine.batch import Batch, signed
from node.engine.lean import LeanLayer

if TYPE_CHECKING:
    from node.engine.shard import Shard

CHUNK = 1024
"""Positions that one pass adds to the tables."""
Turns = tuple[torch.Tensor, torch.Tensor]
"""Cosines and signed sines, [positions, 1, D] each."""


class Direct:
    """The forward of one shard's lean layers, on the CPU."""

    def __init__(
        self, shard: Shard, rules: list[MaskRule | None], kinds: list[int], scale: torch.Tensor | None
    ) -> None:
        """``kinds``: of each layer, by which table it turns queries and keys; ``scale``: by what embeddings are
        multiplied, ``None`` where the first layer is given something else."""
        self._shard, self._rules, self._kinds, self.scale = shard, rules, kinds, scale
        self.heads = True
        """Logits are the head's of the norm's."""
        self._tables: list[Turns] = []
        self._reach = 0
        self._ready: dict[tuple[int, int], list[LeanLayer]] = {}

    @staticmethod
    def of(shard: Shard) -> Direct | None:
        """``None``: its layers are given something that this forward does not know."""
        ids = torch.arange(8)
        given = ids if shard.part.embed else torch.zeros(8, shard.hidden_size, dtype=shard.dtype)
        passed = shard.around(ids, given)
        rules = [one.get("attention_mask") for one in passed]
        turns = [one.get("position_embeddings") for one in passed]
        if not all(rule is None or isinstance(rule, MaskRule) for rule in rules):
            return None
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in turns):
            return None
        first: dict[int, int] = {}
        kinds = [first.setdefault(id(pair[0]), len(first)) for pair in turns]
        scale = _scale(shard.embed(ids), passed[0]["hidden_states"][0]) if shard.part.embed else None
        return Direct(shard, rules, kinds, scale)

    def joined(self, other: Direct) -> Direct:
        """When this shard has adopted the other's."""
        found = Direct(self._shard, self._rules, self._kinds, self.scale if self.scale is not None else other.scale)
        found.heads = self.heads and other.heads
        return found

    def forget(self) -> None:
        """Layers have gone."""
        self._ready.clear()

    def ready(self, start: int, end: int, logits: bool) -> bool:
        """Whether layers [start, end) run here."""
        if (start == 0 and self.scale is None) or (logits and not self.heads):
            return False
        if (start, end) not in self._ready:
            found = self._shard.lean_layers(start, end)
            self._ready[start, end] = [lean for lean in found if lean is not None] if None not in found else []
        return bool(self._ready[start, end])

    def __call__(
        self, start: int, end: int, given: torch.Tensor, batch: Batch, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What it is ready for: ids [T] or hidden states [T, H] -> hidden states [T, H], logits of ``rows``."""
        while self._reach < batch.reach:
            self._extend()
        turns = [(cos[batch.positions], sin[batch.positions]) for cos, sin in self._tables]
        x = self._shard.embed(given) * self.scale if start == 0 else given
        for index, layer in enumerate(self._ready[start, end], start):
            x = layer.run(x, self._rules[index], turns[self._kinds[index]])
        return x, None if rows is None else self._shard.logits(x, rows)

    def _extend(self) -> None:
        shard = self._shard
        positions = torch.arange(self._reach, self._reach + CHUNK)
        passed = shard.around(positions, torch.zeros(CHUNK, shard.hidden_size, dtype=shard.dtype))
        tables: list[Turns] = []
        for kind in range(max(self._kinds) + 1):
            cos, sin = passed[self._kinds.index(kind)]["position_embeddings"]
            new = (cos[0, :, None], signed(sin[0])[:, None])
            if self._tables:
                old = self._tables[kind]
                new = (torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]]))
            tables.append(new)
        self._tables = tables
        self._reach += CHUNK


def _scale(stored: torch.Tensor, given: torch.Tensor) -> torch.Tensor | None:
    """By what ``stored`` embeddings [T, H] are multiplied to be the first layer's input ``given``."""
    for size in (1.0, stored.shape[-1] ** 0.5):
        scale = torch.tensor(size, dtype=stored.dtype)
        if torch.equal(stored * scale, given):
            return scale
    return None
