"""Weights in 8 bits: each output channel has its own scale, activations stay as they are.

The product is ``torch._weight_int8pack_mm``, which converts weights as it reads them: a quarter of the memory traffic
of float32 at few rows, where reading the weights is all there is to decoding.  Its rows have the same bits in any
number, with any number of threads (docs/decisions/0066).  It takes bfloat16 rows, so activations are rounded to
bfloat16 on their way in and out; sums are float32.
"""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 32
"""The kernel reads whole vectors: an input width that is no multiple of this cannot be quantized."""


def can_quantize(weight: torch.Tensor) -> bool:
    """Whether a weight [out, in] can be held in 8 bits."""
    return weight.ndim == 2 and weight.is_floating_point() and weight.shape[1] % WIDTH == 0


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] -> int8 [out, in] and scales [out].  Scales are bfloat16 numbers, so that the product uses them whole.

    Worked off in blocks of rows: the float32 copy that rounding needs is never one of the whole weight.
    """
    whole = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], dtype=torch.bfloat16)
    for first in range(0, weight.shape[0], 4096):
        rows = weight[first : first + 4096].float()
        scale = (rows.abs().amax(1) / 127).clamp_min(1e-12).bfloat16()
        whole[first : first + 4096] = (rows / scale.float()[:, None]).round_().clamp_(-127, 127)
        scales[first : first + 4096] = scale
    return whole, scales


class Int8:
    """A product with a weight [out, in] in 8 bits; rows and results in float32 or bfloat16."""

    rows = least = 1
    """Rows have the same bits in any number."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.dtype = weight.dtype
        self.whole, self.scales = quantize(weight)
        self.nbytes, self.shape = self.whole.nbytes + self.scales.nbytes, weight.shape

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        found = torch._weight_int8pack_mm(rows, self.whole, self.scales).to(x.dtype)
        if bias is not None:
            found += bias
        return found.view(*x.shape[:-1], -1)

    def dense(self) -> torch.Tensor:
        """The weight as the product sees it."""
        return (self.whole.float() * self.scales.float()[:, None]).to(self.dtype)

    def channels(self, some: torch.Tensor) -> torch.Tensor:
        """As ``dense``, of ``some`` output channels."""
        return self.whole[some].float() * self.scales[some].float()[:, None]


class Int8Embedding(nn.Module):
    """An embedding whose rows are held in 8 bits: the rows that are looked up become the weight of ``inner``."""

    def __init__(self, inner: nn.Embedding, product: Int8 | None = None) -> None:
        """``inner`` may scale what it looks up; its weight is given up.  ``product``: a tied head's, to be shared."""
        super().__init__()
        weight = inner.weight.detach()
        self.product = product or Int8(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.inner = inner
        self.inner.padding_idx = None
        self.inner.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight, made on every call: for models that look at it now and then."""
        return self.product.dense()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.product.whole[ids].float() * self.product.scales[ids].float()[..., None]
        self.inner.weight.data = rows.to(self.product.dtype).view(-1, self.embedding_dim)
        return self.inner(torch.arange(ids.numel()).view_as(ids))  # type: ignore[no-any-return]
