"""A graph without a GPU: the operations of one forward, written down and done again on the very same tensors.

As a graph of CUDA does, a replay knows no Python of the forward: plain numbers stay what they were, and only
what lies in the recorded tensors can change.  And as with a capture, what reads from the device, or brings there what
lies on the CPU, is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from node.engine.graphs import Outcome
from tests.pretend_device import NAME

_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
_recording: list[Recorder] = []


class Recorder(TorchDispatchMode):
    """Writes down what is done while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Callable[..., Any], Any, Any, list[torch.Tensor]]] = []

    def __enter__(self) -> Any:
        _recording.append(self)
        return super().__enter__()

    def __exit__(self, *why: Any) -> None:
        super().__exit__(*why)
        _recording.remove(self)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.note(function, args, kwargs or {})

    def note(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Do it, and know how to do it again."""
        found = function(*args, **kwargs)
        sides = {t.device.type for t in _tensors((args, kwargs, found)) if t.ndim}
        if function in _READS or len(sides) > 1:
            raise RuntimeError(f"{function} waits for the device, or for the CPU: {sorted(sides)}")
        self._steps.append((function, args, kwargs, _tensors(found)))
        return found

    def replay(self) -> None:
        for function, args, kwargs, results in self._steps:
            for result, again in zip(results, _tensors(function(*args, **kwargs)), strict=True):
                if not _same_place(result, again):  # a view, or changed in place: it is there already
                    result.copy_(again)


def as_one(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``kernel`` as a single operation of a graph, whatever it does inside."""

    def called(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not _recording:
            return kernel(*args, **kwargs)
        recorder = _recording[-1]
        with torch.utils._python_dispatch._disable_current_modes():
            return recorder.note(kernel, args, kwargs)  # type: ignore[no-any-return]

    return called


def capture(forward: Callable[[], Outcome]) -> tuple[Callable[[], object], Outcome]:
    """Stands where ``graphs.CudaCapture`` stands."""
    with Recorder() as recorder:
        outcome = forward()
    return recorder.replay, outcome


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    each = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [t for one in each for t in _tensors(one)]


def _same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    inside = [t.inside if t.device.type == NAME else t for t in (a, b)]  # type: ignore[attr-defined]
    return inside[0].data_ptr() == inside[1].data_ptr()
