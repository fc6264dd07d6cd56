"""Keys and values of one sequence as bytes, for another engine to go on from: copied bit by bit, never converted.

A piece is a header that says its shapes, then for each layer the keys and the values of its positions.
"""

from __future__ import annotations

import msgspec
import torch

from node.engine.kv_cache import Place
from node.engine.page_pool import PagedPlace
from node.engine.transfer import to_host

PIECE_BYTES = 2 << 20
PIECE_POSITIONS = 512
"""At most so much in one piece: checkpointed rows of the same positions travel with it."""


class Layer(msgspec.Struct, frozen=True, array_like=True):
    """Shapes of one position's key and value: (heads, size of a head)."""

    key: tuple[int, int]
    value: tuple[int, int]


class Header(msgspec.Struct, frozen=True, array_like=True):
    n: int
    dtype: str
    layers: tuple[Layer, ...]


_decode = msgspec.msgpack.Decoder(Header).decode


def piece_positions(place: Place | PagedPlace, layers: range) -> int:
    """How many positions make a piece."""
    each = sum(part.nbytes for i in layers for part in place.read(i, 0, 1))
    return max(1, min(PIECE_POSITIONS, PIECE_BYTES // max(1, each)))


def read_pages(place: Place | PagedPlace, layers: range, start: int, n: int) -> bytes:
    """Positions [start, start + n), which are computed."""
    tensors = [part for i in layers for part in place.read(i, start, n)]
    shapes = [(t.shape[1], t.shape[2]) for t in tensors]
    kinds = tuple(Layer(key, value) for key, value in zip(shapes[::2], shapes[1::2], strict=True))
    header = msgspec.msgpack.encode(Header(n, _name(tensors[0].dtype), kinds))
    body = [memoryview(to_host(t.contiguous()).view(torch.uint8).numpy()).cast("B") for t in tensors]
    return b"".join([len(header).to_bytes(4, "big"), header, *body])


def write_pages(
    place: Place | PagedPlace,
    layers: range,
    start: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    piece: memoryview,
) -> None:
    """Write what ``read_pages`` read of the same positions, on ``device``.  ``ValueError``: it is not that."""
    length = int.from_bytes(piece[:4], "big")
    try:
        header = _decode(piece[4 : 4 + length])
    except msgspec.DecodeError as error:
        raise ValueError(f"not a piece of pages: {error}") from error
    if (header.n, header.dtype, len(header.layers)) != (n, _name(dtype), len(layers)):
        raise ValueError(f"{header.n} positions of {len(header.layers)} layers in {header.dtype}")
    body = piece[4 + length :]
    wanted = sum(
        n * heads * each * dtype.itemsize for layer in header.layers for heads, each in (layer.key, layer.value)
    )
    if len(body) != wanted or min(min(layer.key + layer.value) for layer in header.layers) < 1:
        raise ValueError(f"{len(body)} bytes of keys and values, {wanted} were announced")
    flat = torch.frombuffer(bytearray(body), dtype=dtype).to(device)
    for index, layer in zip(layers, header.layers, strict=True):
        key, flat = _first(flat, (n, *layer.key))
        value, flat = _first(flat, (n, *layer.value))
        place.write(index, start, key, value)


def _first(flat: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading tensor of ``shape``, and what follows it."""
    count = torch.Size(shape).numel()
    return flat[:count].view(shape), flat[count:]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
