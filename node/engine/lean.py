"""The block that most decoders are made of, with fewer calls: norm, attention, residual; norm, gated MLP, residual.

A layer, an attention or an MLP is matched by its structure: the names of its children, and every name that its forward
mentions.  One that mentions anything else (a clip, a multiplier, a dropout) does other things and runs as transformers
wrote it.  What matches is still only a guess: ``selfcheck`` holds the packed forward with it against the model's own.

A lean block owns nothing: it calls the products and reads the weights of the layer that it was made from.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from node.engine import attention
from node.engine.products import Joined, PackedLinear

LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
_ATTENTION_MENTIONS = {
    *ATTENTION,
    *HEAD_NORMS,
    *("shape", "head_dim", "view", "transpose", "reshape", "contiguous"),
    *("apply_rotary_pos_emb", "update", "layer_idx", "scaling"),
    *("ALL_ATTENTION_FUNCTIONS", "get_interface", "config", "_attn_implementation", "eager_attention_forward"),
    *("training", "attention_dropout", "getattr", "sliding_window"),
}


def lean_form(layer: nn.Module) -> LeanLayer | None:
    """The lean form of a decoder layer; ``None`` where its structure is another one."""
    if not _matches(layer, LAYER, LAYER):
        return None
    norms = [RmsNorm.of(layer.get_submodule(name)) for name in ("input_layernorm", "post_attention_layernorm")]
    attend = LeanAttention.of(layer.get_submodule("self_attn"))
    if attend is None or norms[0] is None or norms[1] is None:
        return None
    mlp = layer.get_submodule("mlp")
    return LeanLayer(norms[0], attend, norms[1], LeanMlp(mlp) if LeanMlp.fits(mlp) else mlp)


def _matches(module: nn.Module, children: set[str], mentions: set[str]) -> bool:
    found = {name for name, _ in module.named_children()}
    return found == children and _mentioned(module) <= mentions and not dict(module.named_parameters(recurse=False))


def _mentioned(module: nn.Module) -> set[str]:
    """Every name that the module's forward mentions, besides its own variables."""
    return set(inspect.unwrap(type(module).forward).__code__.co_names)


class RmsNorm:
    """Root mean square norm over the last dimension, in few and cheap calls.

    In float32: x / sqrt(mean(x^2) + eps) = x * sqrt(n) / hypot(|x|, sqrt(n * eps)); the root of n is multiplied into
    the weight.  Each row's length is summed by itself, so that it has the same bits in any number of rows.

    In half precision it is the models' own computation, in float32 and rounded where they round: before the weight or
    behind it.  Then all bits are theirs.
    """

    def __init__(self, weight: torch.Tensor, eps: float, twice: bool = False) -> None:
        """``weight``: in float32, or, to round ``twice``, in the dtype of what is given."""
        self.weight, self.eps, self.twice = weight, eps, twice
        self.shape = tuple(weight.shape)
        self._scaled = weight * self.shape[0] ** 0.5
        self._least = torch.tensor((eps * self.shape[0]) ** 0.5).to(weight.device)

    @staticmethod
    def of(module: nn.Module) -> RmsNorm | None:
        """Found by trying: some families keep the weight less one."""
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or not isinstance(eps, float):
            return None
        if weight.device.type == "meta" or len(dict(module.named_parameters())) != 1:
            return None
        x = torch.linspace(-3, 5, 2 * weight.shape[0], dtype=weight.dtype, device=weight.device).view(2, -1)
        x[1] *= eps**0.5  # where eps matters
        expected, wide = module(x), weight.detach().float()
        half = x.dtype != torch.float32
        for found in (
            *([RmsNorm(weight.detach(), eps, twice=True)] if half else []),
            RmsNorm(wide, eps),
            RmsNorm(1.0 + wide, eps),
        ):
            given = found(x)
            if torch.equal(given, expected) if half else torch.allclose(given, expected, rtol=1e-6, atol=0.0):
                return found
        return None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            length = torch.linalg.vector_norm(x, 2, -1, True).hypot_(self._least)
            return torch.div(x, length).mul_(self._scaled)
        wide = x.float()
        wide.mul_(wide.square().mean(-1, True).add_(self.eps).rsqrt_())
        return wide.to(x.dtype).mul_(self.weight) if self.twice else wide.mul_(self.weight).to(x.dtype)


class LeanLayer:
    """One layer."""

    def __init__(self, before: RmsNorm, attend: LeanAttention, between: RmsNorm, mlp: Any) -> None:
        self.before, self.attend, self.between, self.mlp = before, attend, between, mlp

    def __call__(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, position_embeddings: Any = None, **_: Any
    ) -> torch.Tensor:
        """As transformers calls its layers, [1, T, H] -> [1, T, H]."""
        return self.run(hidden_states[0], attention_mask, attention.current().turning(*position_embeddings))[None]

    def run(self, x: torch.Tensor, mask: Any, turns: Sequence[torch.Tensor]) -> torch.Tensor:
        """``turns``: cosines and signed sines, [T, 1, D] each.  [T, H] -> [T, H]."""
        x = self.attend(self.before(x), mask, turns).add_(x)
        inner = self.between(x)
        found = self.mlp(inner) if isinstance(self.mlp, LeanMlp) else self.mlp(inner[None])[0]
        return found.add_(x)


class LeanMlp:
    """Gate and up in one product, then down.  [T, H] -> [T, H]."""

    def __init__(self, module: nn.Module) -> None:
        gate = module.get_submodule("gate_proj")
        assert isinstance(gate, PackedLinear)
        self.gate_up, self.down = gate.joined, _last(module.get_submodule("down_proj"))
        act = module.get_submodule("act_fn")
        self.act: Any = F.silu if type(act).__name__ in ("SiLU", "SiLUActivation") else act

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return _matches(module, MLP, MLP) and _joined(module, "gate_proj", 2) is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.act(gate).mul_(up))


class LeanAttention:
    """Queries, keys and values in one product, queries and keys turned together.  [T, H] -> [T, H]."""

    def __init__(self, module: Any, joined: Joined, norms: tuple[RmsNorm, RmsNorm] | None) -> None:
        self.layer, self.scale = int(module.layer_idx), float(module.scaling)
        self.qkv, self.out = joined, _last(module.o_proj)
        self.size = int(module.head_dim)
        heads, key_heads, _ = (size // self.size for size in joined.sizes)
        total = heads + key_heads
        self.parts = ((0, total), (0, heads), (heads, key_heads), (total, key_heads))
        """Queries and keys, queries, keys, values: first head and count."""
        self.norms = norms

    @staticmethod
    def of(module: nn.Module) -> LeanAttention | None:
        normed = hasattr(module, "q_norm")
        if not _matches(module, ATTENTION | HEAD_NORMS if normed else ATTENTION, _ATTENTION_MENTIONS):
            return None
        joined = _joined(module, "q_proj", 3)
        if joined is None or joined.sizes[1] != joined.sizes[2]:
            return None
        if not normed:
            return LeanAttention(module, joined, None)
        q, k = (RmsNorm.of(module.get_submodule(name)) for name in ("q_norm", "k_norm"))
        if q is None or k is None or {q.shape, k.shape} != {(module.head_dim,)}:
            return None
        return LeanAttention(module, joined, (q, k))

    def __call__(self, x: torch.Tensor, mask: Any, turns: Sequence[torch.Tensor]) -> torch.Tensor:
        batch = attention.current()
        cos, sin = turns
        fused = self.qkv(x).view(x.shape[0], -1, self.size)
        both, query, key, value = (fused.narrow(1, *part) for part in self.parts)
        if self.norms is not None:
            query.copy_(self.norms[0](query))
            key.copy_(self.norms[1](key))
        turned = both.roll(self.size // 2, -1).mul_(sin)
        both.mul_(cos).add_(turned)
        found = batch.attend(self.layer, query, key, value, mask, self.scale)
        return self.out(found.reshape(x.shape[0], -1))


def _joined(module: nn.Module, first: str, count: int) -> Joined | None:
    child = getattr(module, first)
    return child.joined if isinstance(child, PackedLinear) and len(child.joined.sizes) == count else None


def _last(module: nn.Module) -> Any:
    """A linear layer as a plain call."""
    return module.joined if isinstance(module, PackedLinear) else module.forward
