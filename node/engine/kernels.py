"""Matrix products whose rows do not depend on their company, and are fast for few rows.

oneDNN with weights packed once gives each row the same bits for any number of rows and threads (measured on AVX2:
docs/decisions/0010), and at 2 to 16 rows it is up to twice as fast as MKL, which packs the weights on every call.  Its
call costs 20 us, so small models keep MKL, which gives rows the same bits from 4 rows on, in fours.

Experts are run one after the other over the rows that chose them, in whole fours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

EXPERTS = "murmur"
LEAST_HIDDEN = 384
"""Below this hidden size a packed product's call costs more than it saves."""
ROWS_HINT = 64
"""Rows for which oneDNN chooses the packed form; all counts run on it."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed products exist for ``dtype`` on ``device``."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> oneDNN's own form of it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


class PackedLinear(nn.Module):
    """``nn.Linear`` over a packed weight.  [..., in] -> [..., out]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = _pack(weight)
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight, unpacked on every call: for models that look at it now and then."""
        return self.packed.to_dense()

    @property
    def nbytes(self) -> int:
        return self.out_features * self.in_features * self.packed.element_size()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x, self.packed, self.bias)


class PackedExperts:
    """The packed weights of a module of experts: one [out, in] a expert and projection."""

    def __init__(self, module: Any) -> None:
        first = "gate_up_proj" if module.has_gate else "up_proj"
        self.up = self._take(module, first)
        self.down = self._take(module, "down_proj")

    @staticmethod
    def _take(module: Any, name: str) -> list[torch.Tensor]:
        stacked = getattr(module, name).detach()
        plain = stacked.transpose(1, 2) if module.is_transposed else stacked
        packed = [_pack(weight) for weight in plain]
        # The stacked weights are given up: what is left of them is their shape.
        setattr(module, name, nn.Parameter(torch.empty(stacked.shape, device="meta"), requires_grad=False))
        return packed

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in (*self.up, *self.down))


def pack_module(module: nn.Module) -> None:
    """Replace every linear layer and every module of experts below ``module`` by their packed forms, one at a time."""
    for parent in list(module.modules()):
        if hasattr(parent, "has_gate") and hasattr(parent, "is_transposed"):
            parent.packed_experts = PackedExperts(parent)  # type: ignore[assignment]
        for name, child in list(parent.named_children()):
            if (packed := pack_linear(child)) is not None:
                setattr(parent, name, packed)


def pack_linear(child: nn.Module) -> PackedLinear | None:
    """The packed form of ``nn.Linear`` or of GPT-2's transposed ``Conv1D``; ``None`` for anything else."""
    if type(child) is nn.Linear:
        return PackedLinear(child.weight.detach(), _plain(child.bias))
    if type(child).__name__ == "Conv1D" and hasattr(child, "nf"):
        return PackedLinear(child.weight.detach().t(), _plain(child.bias))
    return None


def _plain(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the weights below ``module``, packed ones included."""
    held = {id(p): p.nbytes for p in module.parameters() if p.device.type != "meta"}
    packed = sum(m.nbytes for m in module.modules() if isinstance(m, PackedLinear))
    experts = sum(m.packed_experts.nbytes for m in module.modules() if hasattr(m, "packed_experts"))
    return sum(held.values()) + packed + experts


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
    """One expert over ``rows`` [n, H], computed in whole fours."""
    n = rows.shape[0]
    rows = F.pad(rows, (0, 0, 0, -n % 4))
    packed = getattr(self, "packed_experts", None)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    inner = _project(self, name, expert, rows, packed.up if packed else None)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    found = _project(self, "down_proj", expert, inner, packed.down if packed else None)
    found = self.post_expert_norm(found) if self.has_post_expert_norm else found
    return found[:n]


def _project(self: Any, name: str, expert: int, rows: torch.Tensor, packed: list[torch.Tensor] | None) -> torch.Tensor:
    bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
    if packed is not None:
        return _product(rows, packed[expert], bias)
    weight = getattr(self, name)[expert]
    return F.linear(rows, weight.t() if self.is_transposed else weight, bias)


def register() -> None:
    """Make the experts' forward known to transformers under ``EXPERTS``."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts_forward)
