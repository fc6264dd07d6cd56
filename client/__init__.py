"""The SDK: ask a mesh through any of its nodes.

>>> from client import MeshClient
>>> mesh = MeshClient(["http://127.0.0.1:9000"])
>>> for piece in mesh.chat([{"role": "user", "content": "Hello"}], stream=True):
...     print(piece.text, end="")

Imports nothing of the mesh's own code: HTTP is the contract.  Names are loaded on first use, so that
``python -m client --help`` does not pay for an HTTP library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.aio import AsyncMeshClient
    from client.errors import (
        ApiError,
        BadRequest,
        Busy,
        ClientError,
        NoNodeReachable,
        NotAllowed,
        NotFound,
        StreamFailed,
        StreamInterrupted,
        Unavailable,
    )
    from client.sync import MeshClient
    from client.values import Answer, Choice, Piece, Usage

_HOMES = {
    "AsyncMeshClient": "client.aio",
    "MeshClient": "client.sync",
    "Answer": "client.values",
    "Choice": "client.values",
    "Piece": "client.values",
    "Usage": "client.values",
    "ApiError": "client.errors",
    "BadRequest": "client.errors",
    "Busy": "client.errors",
    "ClientError": "client.errors",
    "NoNodeReachable": "client.errors",
    "NotAllowed": "client.errors",
    "NotFound": "client.errors",
    "StreamFailed": "client.errors",
    "StreamInterrupted": "client.errors",
    "Unavailable": "client.errors",
}

__all__ = [
    "Answer",
    "ApiError",
    "AsyncMeshClient",
    "BadRequest",
    "Busy",
    "Choice",
    "ClientError",
    "MeshClient",
    "NoNodeReachable",
    "NotAllowed",
    "NotFound",
    "Piece",
    "StreamFailed",
    "StreamInterrupted",
    "Unavailable",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'client' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
