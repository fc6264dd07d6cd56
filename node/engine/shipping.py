"""Keys and values of one sequence as bytes, for another engine to go on from: copied bit by bit, never converted.

A piece is a header that says its shapes, then for each layer the keys and the values of its positions.  Layers with a
window lack those that have left it; the last pieces have all that the next position sees.
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
    lacking: int = 0
    """So many of the first positions are not in the piece."""


class Header(msgspec.Struct, frozen=True, array_like=True):
    n: int
    dtype: str
    layers: tuple[Layer, ...]


_decode = msgspec.msgpack.Decoder(Header).decode


def piece_positions(place: Place | PagedPlace, layers: range) -> int:
    """How many positions make a piece."""
    each = sum(part.nbytes for i in layers for part in place.read(i, place.base(i), 1))
    return max(1, min(PIECE_POSITIONS, PIECE_BYTES // max(1, each)))


def read_pages(place: Place | PagedPlace, layers: range, start: int, n: int) -> bytes:
    """Positions [start, start + n), which are computed."""
    lacking = [min(n, max(0, place.base(i) - start)) for i in layers]
    parts = [place.read(i, start + skip, n - skip) for i, skip in zip(layers, lacking, strict=True)]
    shapes = [((k.shape[1], k.shape[2]), (v.shape[1], v.shape[2])) for k, v in parts]
    kinds = tuple(Layer(key, value, skip) for (key, value), skip in zip(shapes, lacking, strict=True))
    header = msgspec.msgpack.encode(Header(n, _name(parts[0][0].dtype), kinds))
    tensors = [t for both in parts for t in both if t.numel()]
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
    if not all(0 <= layer.lacking <= n for layer in header.layers):
        raise ValueError(f"layers lack {[layer.lacking for layer in header.layers]} of {n} positions")
    body = piece[4 + length :]
    wanted = sum(
        (n - layer.lacking) * heads * each * dtype.itemsize
        for layer in header.layers
        for heads, each in (layer.key, layer.value)
    )
    if len(body) != wanted or min(min(layer.key + layer.value) for layer in header.layers) < 1:
        raise ValueError(f"{len(body)} bytes of keys and values, {wanted} were announced")
    place.extend(start, n, {index: layer.lacking for index, layer in zip(layers, header.layers, strict=True)})
    flat = (torch.frombuffer(bytearray(body), dtype=dtype) if wanted else torch.empty(0, dtype=dtype)).to(device)
    for index, layer in zip(layers, header.layers, strict=True):
        given = n - layer.lacking
        key, flat = _first(flat, (given, *layer.key))
        value, flat = _first(flat, (given, *layer.value))
        if given:
            place.write(index, start + layer.lacking, key, value)


def _first(flat: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading tensor of ``shape``, and what follows it."""
    count = torch.Size(shape).numel()
    return flat[:count].view(shape), flat[count:]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
