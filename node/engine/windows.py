"""Which masks are windows: found by asking the mask's rule, so that no model has to be known by name."""

from __future__ import annotations

from typing import Any

import torch

from node.engine.attention import MaskRule

PROBED = tuple(sorted({p for k in range(16) for p in ((1 << k) - 1, 1 << k, (1 << k) + 1, 3 << k, (5 << k) - 3)} - {0}))
"""Positions at which a mask is looked at, past every window and chunk in use."""


def window_of(rule: MaskRule | None, device: torch.device) -> int | None:
    """How many keys before itself a query sees (-1: all); ``None``: it is no such window."""
    if rule is None:
        return -1
    try:
        return _window_of(rule, device)
    except Exception:  # a model's code is its authors': a rule of the rows of one forward cannot be asked far ahead
        return None


def _window_of(rule: MaskRule, device: torch.device) -> int | None:
    counts = []
    for position in PROBED:
        seen = visible(rule, torch.full((1,), position, device=device), 0, position + 2)[0]
        count = int(seen.sum())
        if not count or not bool(seen[position + 1 - count : position + 1].all()):
            return None  # not the last ones up to itself
        counts.append(count)
    window = max(counts)
    if any(count != min(position + 1, window) for position, count in zip(PROBED, counts, strict=True)):
        return None
    return -1 if window == PROBED[-1] + 1 else window - 1


def visible(rule: MaskRule | None, positions: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Whether queries at ``positions`` [n] see the keys of ``count`` positions from ``first`` on: [n, count]."""
    columns = torch.arange(first, first + count, device=positions.device)
    found: Any = columns <= positions[:, None] if rule is None else rule.visible(0, 0, positions[:, None], columns)
    return torch.as_tensor(found).broadcast_to(positions.shape[0], count)


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a key is seen, -inf elsewhere."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))
