"""A device that this machine does not have: what lies on it is computed on the CPU, and no operation may mix the two.

It stands in for a GPU where only the place of tensors matters: a tensor made on the wrong side, an input that was not
moved, a result read before it was fetched.  It says nothing of a GPU's kernels, bits or speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
"""What may have tensors of both sides."""
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
"""torch itself moves the indices of a tensor on the device; transformers relies on it."""
_library: torch.library.Library | None = None


def device() -> torch.device:
    """The device; known to torch, in this process, from the first call on."""
    global _library
    if _library is None:
        _setup_privateuseone_for_python_backend(NAME)
        _library = torch.library.Library("_", "IMPL")
        _library.fallback(lambda function, *args, **kwargs: _run(function, args, kwargs), "PrivateUse1")
    return torch.device(NAME, 0)


class Mixed(Exception):
    """An operation was given tensors of both sides."""


class Pretended(torch.Tensor):
    """Says that it lies on the device; ``inside`` is on the CPU."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> Pretended:
        shape: Any = (inside.size(), inside.stride(), inside.storage_offset())
        with torch.inference_mode(False):  # else views of what was made outside are refused
            made: Any = torch.Tensor._make_wrapper_subclass(cls, *shape, dtype=inside.dtype, device=device())  # type: ignore[attr-defined]
        made.inside = inside
        return made  # type: ignore[no-any-return]

    # torch makes tensors of lists below where this device can be reached.
    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_listed(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_listed(key), value)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[torch.Tensor] = []
    _mapped((args, kwargs), lambda t: (tensors.append(t), t)[1])
    there = [t for t in tensors if isinstance(t, Pretended)]
    # As on a GPU: a single number may come from the CPU.
    others = [t for t in tensors if t.ndim and not isinstance(t, Pretended)]
    if function in _INDEXED and isinstance(args[0], Pretended):
        others = [t for t in others if not any(t is index for index in args[1])]
    if there and others and function not in _COPIES:
        raise Mixed(f"{function}: {[(t.device.type, tuple(t.shape)) for t in tensors]}")
    if function is torch.ops.aten._fused_sdp_choice.default:
        return 0  # written out: fused kernels are each of a device of their own
    asked = kwargs.get("device")
    stays = bool(there) if asked is None else torch.device(asked).type == NAME
    if function is torch.ops.aten.copy_.default:
        stays = isinstance(args[0], Pretended)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = _mapped((args, kwargs), _inside)
    found = function(*args, **kwargs)
    if not stays:
        return found
    known = {id(t.inside): t for t in there}
    return _mapped(found, lambda t: _outside(t, known))


def _mapped(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """``value``, which operations are given and give, with every tensor changed; ten times faster than torch's own."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)([_mapped(one, change) for one in value])
    return value


def _outside(tensor: torch.Tensor, known: dict[int, Pretended]) -> Pretended:
    """What was changed in place stays the tensor that it was."""
    same = tensor if isinstance(tensor, Pretended) else known.get(id(tensor))
    return Pretended(tensor) if same is None else same


def _listed(key: Any) -> Any:
    return torch.tensor(key).to(device()) if isinstance(key, list) else key


def _inside(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.inside if isinstance(tensor, Pretended) else tensor
