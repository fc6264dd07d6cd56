"""Hidden states between the frames of the mesh, which are on the CPU, and the device that computes.

Memory of the CPU that a GPU may read and write by itself (pinned) is copied at the full speed of the bus.  torch keeps
what is given back of it for the next, and does not reuse it before the copies out of it are done.
"""

from __future__ import annotations

import torch


def host_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor on the CPU to be filled and moved to ``device``; pinned where that is a GPU."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the CPU, computed to the end; itself where it is there already."""
    if tensor.device.type == "cpu":
        return tensor
    return host_empty(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor)
