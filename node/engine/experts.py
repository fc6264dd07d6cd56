"""Modules of experts: their weights packed, and run one expert after the other over the rows that chose it.

Rows go in whole fours where products are plain, else in what the packed ones ask for (``Product.rows``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from node.engine.products import Form, Product, product_of

EXPERTS = "murmur"


class PackedExperts:
    """The products of a module of experts: one an expert and projection."""

    def __init__(self, module: Any, form: Form) -> None:
        first = "gate_up_proj" if module.has_gate else "up_proj"
        self.up = self._take(module, first, form)
        self.down = self._take(module, "down_proj", form)
        self.rows = math.lcm(*(product.rows for product in (*self.up, *self.down)))

    @staticmethod
    def _take(module: Any, name: str, form: Form) -> list[Product]:
        stacked = getattr(module, name).detach()
        plain = stacked.transpose(1, 2) if module.is_transposed else stacked
        packed = [product_of(weight.contiguous(), form) for weight in plain]
        # The stacked weights are given up: what is left of them is their shape.
        setattr(module, name, nn.Parameter(torch.empty(stacked.shape, device="meta"), requires_grad=False))
        return packed


def pack_experts(module: nn.Module, form: Form) -> None:
    """Pack every module of experts below ``module``."""
    for child in module.modules():
        if hasattr(child, "has_gate") and hasattr(child, "is_transposed"):
            child.packed_experts = PackedExperts(child, form)  # type: ignore[assignment]


def products_of(module: nn.Module) -> list[Product]:
    """Every expert's products below ``module``."""
    packed: list[Any] = [m.packed_experts for m in module.modules() if hasattr(m, "packed_experts")]
    return [product for each in packed for product in (*each.up, *each.down)]


def packed_bytes(module: nn.Module) -> int:
    return sum(product.nbytes for product in products_of(module))


def _experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """``hidden_states`` [T, H], ``top_k_index`` and ``top_k_weights`` [T, K] -> [T, H]."""
    total, top_k = top_k_index.shape
    chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
    rows = hidden_states[order // top_k]
    out = torch.empty_like(rows)
    first = 0
    for expert, count in enumerate(torch.bincount(chosen, minlength=self.num_experts).tolist()):
        if count and expert < self.num_experts:
            out[first : first + count] = _expert(self, expert, rows[first : first + count])
        first += count
    weighted = out * top_k_weights.reshape(-1)[order, None].to(out.dtype)
    back = torch.empty_like(weighted)
    back[order] = weighted
    return back.view(total, top_k, -1).sum(1)


def _expert(self: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """One expert over ``rows`` [n, H], filled up to whole fours, or threes where its products ask for them."""
    n = rows.shape[0]
    packed: PackedExperts | None = getattr(self, "packed_experts", None)
    rows = F.pad(rows, (0, 0, 0, -n % (packed.rows if packed else 4)))
    name = "gate_up_proj" if self.has_gate else "up_proj"
    inner = _project(self, name, expert, rows, packed.up if packed else None)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    found = _project(self, "down_proj", expert, inner, packed.down if packed else None)
    found = self.post_expert_norm(found) if self.has_post_expert_norm else found
    return found[:n]


def _project(self: Any, name: str, expert: int, rows: torch.Tensor, packed: list[Product] | None) -> torch.Tensor:
    bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
    if packed is not None:
        return packed[expert](rows, bias)
    weight = getattr(self, name)[expert]
    return F.linear(rows, weight.t() if self.is_transposed else weight, bias)


def register() -> None:
    """Make the experts' forward known to transformers under ``EXPERTS``."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts_forward)
