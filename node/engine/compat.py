"""The compat mode: one transformers cache per sequence, sequences one after the other.

For models whose attention does not go through transformers' registries, or that keep another state than keys and
values.  Right, not fast; never advertised as exact.
"""

from __future__ import annotations

from typing import Any

import torch

from node.engine.shard import Shard


class CompatState:
    """A sequence's cache for layers [start, end)."""

    def __init__(self, shard: Shard, start: int, end: int) -> None:
        from transformers import DynamicCache

        self.shard, self.start, self.end = shard, start, end
        self.length = 0
        self.cache: Any = DynamicCache(config=shard.config)

    @torch.inference_mode()
    def forward(self, given: torch.Tensor, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``given`` [T] ids or [T, H] hidden states -> hidden states [T, H], logits of ``rows``."""
        n = given.shape[0]
        self._pretend()
        for table in self.shard.tables_by_length:
            table.inv_freq.copy_(table.original_inv_freq)  # of no other sequence's length
            table.max_seq_len_cached = table.original_max_seq_len
        options = {
            "position_ids": torch.arange(self.length, self.length + n)[None],
            # Recurrent layers multiply their input by the mask, so it has the rows of this forward or none.
            "attention_mask": torch.ones(1, self.length + n, dtype=torch.long) if self.shard.masked else None,
            "past_key_values": self.cache,
            "cache_params": self.cache,  # as state space models call it
            "use_cache": True,
        }
        hidden, logits = self.shard.run(self.start, self.end, given[None], options, rows)
        self.length += n
        return hidden[0], logits

    def _pretend(self) -> None:
        """Layers that are not run here look as long as the others: masks are sized by the first layer of a kind."""
        for index, layer in enumerate(self.cache.layers):
            if self.start <= index < self.end or not hasattr(layer, "get_seq_length"):
                continue
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = self.length
            if self.length and hasattr(layer, "keys"):
                layer.keys = layer.values = torch.zeros(1, device=self.shard.device).expand(1, 1, self.length, 1)
                layer.is_initialized = True

    def cut(self, length: int) -> bool:
        """Drop positions from ``length`` on; ``False`` where the state cannot go back (windows, recurrences)."""
        if length >= self.length:
            return True
        held = [layer for i, layer in enumerate(self.cache.layers) if self.start <= i < self.end]
        if not length:
            self.__init__(self.shard, self.start, self.end)  # type: ignore[misc]
            return True
        if any(type(layer).__name__ != "DynamicLayer" for layer in held):
            return False
        for layer in held:
            layer.crop(length - self.length)
        self.length = length
        return True

    @property
    def bytes(self) -> int:
        """Of tensors held by the layers that are run here."""
        held = (layer for i, layer in enumerate(self.cache.layers) if self.start <= i < self.end)
        return sum(v.nbytes for layer in held for v in vars(layer).values() if isinstance(v, torch.Tensor))
