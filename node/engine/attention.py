"""How a model's own attention layers reach the packed batch: transformers' two registries.

The mask registry hands the layers the mask's *rule* (a function of query and key position) instead of a tensor; it is
evaluated on the real positions of the packed rows, which makes causal, sliding, chunked and alternating layers one
case.  The attention registry calls the batch that the running thread has set.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from node.lazy import transformers

if TYPE_CHECKING:
    from node.engine.batch import Packed

NAME = "murmur"
_running = threading.local()


class NotPacked(Exception):
    """The model asks of attention what the packed mode does not do; the message says what."""


class MaskRule:
    """Which keys a query sees: ``visible(0, 0, query positions, key positions)`` -> bool tensor."""

    __slots__ = ("visible",)

    def __init__(self, visible: Callable[..., Any]) -> None:
        self.visible = visible


@contextmanager
def running(batch: Packed) -> Iterator[None]:
    """Attention in this thread works on ``batch``."""
    _running.batch = batch
    try:
        yield
    finally:
        del _running.batch


def current() -> Any:
    """The batch that this thread's attention works on."""
    return _running.batch


def _mask_rule(*_args: Any, mask_function: Callable[..., Any], **_kwargs: Any) -> MaskRule:
    return MaskRule(mask_function)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` [1, Hq, T, D], ``key`` [1, Hk, T, D], ``value`` [1, Hk, T, Dv] -> [1, T, Hq, Dv]."""
    if attention_mask is not None and not isinstance(attention_mask, MaskRule):
        raise NotPacked("its attention mask is a tensor")
    for name in ("position_bias", "indices", "cu_seq_lens_q"):
        if options.get(name) is not None:
            raise NotPacked(f"its attention takes {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return current().attend(module.layer_idx, *rows, attention_mask, scale, softcap, s_aux)[None], None


def register() -> None:
    """Make the packed attention known to transformers under ``NAME``."""
    transformers().AttentionInterface.register(NAME, _attention)
    from transformers.masking_utils import AttentionMaskInterface

    AttentionMaskInterface.register(NAME, _mask_rule)
