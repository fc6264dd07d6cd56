"""Matrix products with weights laid out once: few rows are fast, and a row's bits do not depend on its company.

Three forms of a weight, chosen by what it holds and by this machine (measured on AVX2: docs/decisions/0010, 0012):

* ``Half``: FBGEMM's, 16-bit numbers multiplied and summed in float32.  For weights that half precision holds, which
  those of a bfloat16 or float16 checkpoint are.  Half the memory traffic; rows have the same bits in whole threes, with
  AVX-512 in any number.
* ``Float``: oneDNN's, for all others.  Rows have the same bits in any number, with AVX-512 in any from two.
* ``Plain``: MKL's, for small models, where a call of the others costs more than the product.

* ``Int8`` (``node/engine/int8.py``): 8 bits, where the model is served quantized.

Layers that are given the same input (queries, keys and values; gate and up) are one product.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from mesh.errors import ConfigError
from node.engine.int8 import Int8, Int8Embedding, can_quantize

LEAST_HIDDEN = 384
"""Below this hidden size the call of a packed product costs more than it saves."""
ROWS_HINT = 64
"""Rows for which oneDNN chooses the packed form; all counts run on it."""
LEAST = (1, 4, 8, 16)
"""Rows that forwards may be filled up to, for each to have the same bits in any company."""
TRIED = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 23, 24, 31, 32, 33, 48, 63, 64, 65, 96, 128, 256, 512)
"""Numbers of rows, up to those of a step."""
WIDEST = 2048
"""Channels of a weight at most with which that is tried."""
LARGE = 32.0
"""By this numbers near one are multiplied, so that in float16 what rounding leaves of sums is not nothing."""
CHANNELS = 64
"""Of a weight at most, on which its product is tried."""
MOST_ROUTES = 1024
"""Rows of a weight at most that is kept beside its packed form."""
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that are given the same input.  Were they not, the result would still be right."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed products exist for ``dtype`` on ``device``."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def can_halve(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether float32 products over weights in half precision exist here."""
    return dtype == torch.float32 and device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


@functools.cache
def least_rows(packed: bool, out: int, size: int, dtype: torch.dtype) -> int:
    """Of how many rows at least products with a weight [out, size] on the CPU, ``Float`` or ``Plain``, give each the
    same bits in any company, on this machine and with any threads; 0: no number is known to do.

    With AVX-512 the libraries sum the products of a single row in an order of their own for many sizes, and oneDNN
    takes longer over it than over four (docs/decisions/0105).  All sums are made to cancel: what is left is what
    rounding left of them.  In half precision all but one in thousands would look the same otherwise.
    """
    generator = torch.Generator().manual_seed(0)
    halves = (torch.randn(rows, size // 2, generator=generator) for rows in (TRIED[-1], min(out, WIDEST)))
    x, weight = (LARGE * half.to(dtype) for half in halves)
    mixed = torch.randperm(size // 2, generator=generator)
    x, weight = torch.cat([x, -x[:, mixed]], 1), torch.cat([weight, weight[:, mixed]], 1)
    x, weight = F.pad(x, (0, size % 2)), F.pad(weight, (0, size % 2))
    product = functools.partial(_times, _laid_out(weight)) if packed else lambda rows: F.linear(rows, weight)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = product(x)
    torch.set_num_threads(threads)
    most = max((n for n in TRIED if not torch.equal(product(x[:n]), whole[:n])), default=0)
    return next((least for least in LEAST if least > most), 0)


def _laid_out(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` in oneDNN's own form."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)  # type: ignore[no-any-return]


def _times(laid_out: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(rows, laid_out, bias, "none", [], "")  # type: ignore[no-any-return]


class Plain:
    """Any weight [out, in] as it is."""

    rows = 1

    def __init__(self, weight: torch.Tensor) -> None:
        self.least = _least_plain(weight)
        self._weight = weight
        self.nbytes, self.shape = weight.nbytes, weight.shape

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self._weight, bias)

    def dense(self) -> torch.Tensor:
        return self._weight


class Float:
    """A weight [out, in] of float32 or bfloat16 in oneDNN's own form."""

    rows = 1

    def __init__(self, weight: torch.Tensor) -> None:
        self.least = least_rows(True, *weight.shape, weight.dtype)
        self._packed = _laid_out(weight)
        self.nbytes, self.shape = weight.nbytes, weight.shape

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        count = x.numel() // x.shape[-1]
        if count < self.least:
            filled = x.new_zeros(self.least, x.shape[-1])
            filled[:count] = x.reshape(count, x.shape[-1])
            return self(filled, bias)[:count].view(*x.shape[:-1], self.shape[0])
        return _times(self._packed, x, bias)

    def dense(self) -> torch.Tensor:
        return self._packed.to_dense()


class Half:
    """A float32 weight [out, in] held in half precision; float32 in, float32 sums, float32 out."""

    least = 1

    def __init__(self, weight: torch.Tensor) -> None:
        self.rows = half_rows()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), None)
        self.nbytes, self.shape = weight.numel() * 2, weight.shape

    @staticmethod
    def holds(weight: torch.Tensor) -> bool:
        """The weight loses less than float32's own rounding of it would cost: 2^-24 of its norm."""
        lost = weight.half().float().sub_(weight).norm()
        return bool(lost <= weight.norm() * 2.0**-24)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        found = torch.ops.quantized.linear_dynamic_fp16.default(x, self._packed)
        return found if bias is None else found.add_(bias)

    def dense(self) -> torch.Tensor:
        return torch.ops.quantized.linear_unpack_fp16(self._packed)[0].float()


@functools.cache
def half_rows() -> int:
    """Of how many rows ``Half`` gives the same bits in any company, on this machine.

    With AVX2 its kernels take one and two rows another way, and three to six the same: whole threes never leave one or
    two.  With AVX-512 any number was seen to do.
    """
    generator = torch.Generator().manual_seed(0)
    for inner, out in ((200, 96), (768, 512)):
        x = torch.randn(24, inner, generator=generator)
        packed = torch.ops.quantized.linear_prepack_fp16(torch.randn(out, inner, generator=generator), None)
        whole = torch.ops.quantized.linear_dynamic_fp16(x, packed)
        parts = (torch.ops.quantized.linear_dynamic_fp16(x[:n], packed) for n in range(1, 15))
        if not all(torch.equal(part, whole[: len(part)]) for part in parts):
            return 3
    return 1


Product = Plain | Float | Half | Int8
Form = Literal["plain", "packed", "int8"]
"""How a shard's weights are laid out."""


def forms_of(hidden_size: int, dtype: torch.dtype, device: torch.device, quantize: str = "") -> tuple[Form, ...]:
    """The forms for a model of this size and serving dtype: one that is not exact gives way to the next.

    How many rows MKL needs to give them the same bits grows with the size of the product, with AVX-512 (0103).
    """
    if quantize:
        return ("int8",)
    if not can_pack(dtype, device):
        return ("plain",)
    return ("packed",) if hidden_size >= LEAST_HIDDEN else ("plain", "packed")


def product_of(weight: torch.Tensor, form: Form) -> Product:
    """``weight`` [out, in] in the best form there is; the same on all machines of one hardware class.

    Raises ``ConfigError`` where the 8-bit product is wrong on this machine.
    """
    if form == "int8" and can_quantize(weight):
        small = Int8(weight)
        if not _agrees(small, small.channels, weight):
            raise ConfigError(
                f"8-bit products of {tuple(weight.shape)} are wrong on this machine: serve it unquantized"
            )
        return small
    if form == "plain" or not can_pack(weight.dtype, weight.device):
        return Plain(weight)
    halved = can_halve(weight.dtype, weight.device) and Half.holds(weight)
    packed = Half(weight) if halved else Float(weight)
    return packed if _agrees(packed, weight.__getitem__, weight) else Plain(weight)


def _agrees(product: Product, channels: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor) -> bool:
    """Whether ``product`` computes what ``channels`` say, for some of them.

    The check of a loaded span (selfcheck.py) is one of packed layers against each other: it says nothing of a kernel
    that is wrong on a shape.
    """
    some = torch.linspace(0, weight.shape[0] - 1, min(weight.shape[0], CHANNELS)).long()
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    expected = F.linear(x.float(), channels(some).float())
    rough = weight.dtype != torch.float32 or isinstance(product, Int8)
    most = (2e-2 if rough else 1e-4) * expected.abs().amax()
    return not bool(((product(x, None)[:, some].float() - expected).abs() > most).any())  # NaN agrees with NaN


class Joined:
    """One product for ``n`` layers side by side.  They are called one by one: the first computes for all."""

    def __init__(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]], form: Form) -> None:
        self.sizes = [weight.shape[0] for weight, _ in layers]
        self.product = product_of(torch.cat([weight for weight, _ in layers]), form)
        biases = [bias for _, bias in layers if bias is not None]
        assert len(biases) in (0, len(layers))
        self.bias = torch.cat(biases) if biases else None
        self._x: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., all outs]."""
        return self.product(x, self.bias)

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of layer ``index``; kept for no longer than until each layer has taken its own."""
        if self._x is not x or self._parts[index] is None:
            self._x, self._parts = x, list(self(x).split(self.sizes, -1))
        found, self._parts[index] = self._parts[index], None
        if not any(part is not None for part in self._parts):
            self._x = None
        assert found is not None
        return found


class PackedLinear(nn.Module):
    """``nn.Linear`` over a weight laid out once, perhaps joined with its siblings'.  [..., in] -> [..., out]."""

    def __init__(self, joined: Joined, index: int = 0) -> None:
        super().__init__()
        self.joined, self.index = joined, index
        self.alone = len(joined.sizes) == 1
        self.out_features = joined.sizes[index]

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight, made on every call: for models that look at it now and then."""
        return self.joined.product.dense().split(self.joined.sizes)[self.index]

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.joined.bias is None else self.joined.bias.split(self.joined.sizes)[self.index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.joined(x) if self.alone else self.joined.part(self.index, x)


class PackedWeight(nn.Parameter):
    """A weight [out, in] that its module multiplies by itself, as routers of experts do: by a packed product."""

    product: Product

    @classmethod
    def of(cls, weight: torch.Tensor) -> PackedWeight:
        found: PackedWeight = torch.Tensor._make_subclass(cls, weight.detach(), False)
        found.product = product_of(weight.detach(), "packed")  # never in 8 bits
        return found

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear and isinstance(args[1], cls):
            return args[1].product(args[0], args[2] if len(args) > 2 else (kwargs or {}).get("bias"))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def pack_module(module: nn.Module, form: Form) -> None:
    """Join siblings below ``module`` and, unless they stay plain, lay out every linear layer, one at a time."""
    for parent in list(module.modules()):
        for names in SIBLINGS:
            children = [getattr(parent, name, None) for name in names]
            if all(type(child) is nn.Linear for child in children) and _alike(children):
                joined = Joined([_taken(child) for child in children], form)
                for index, name in enumerate(names):
                    setattr(parent, name, PackedLinear(joined, index))
        if form != "plain":
            for name, child in list(parent.named_children()):
                if (packed := pack_linear(child, form)) is not None:
                    setattr(parent, name, packed)
    if form != "plain":
        _pack_routes(module)


def _pack_routes(module: nn.Module) -> None:
    for child in module.modules():
        for name, weight in list(child.named_parameters(recurse=False)):
            if weight.ndim == 2 and weight.shape[0] <= MOST_ROUTES and can_pack(weight.dtype, weight.device):
                setattr(child, name, PackedWeight.of(weight))


def _alike(linears: Sequence[Any]) -> bool:
    return len({(linear.in_features, linear.bias is None) for linear in linears}) == 1


def pack_linear(child: nn.Module, form: Form) -> PackedLinear | None:
    """The packed form of ``nn.Linear`` or of GPT-2's transposed ``Conv1D``; ``None`` for anything else."""
    if type(child) is nn.Linear:
        return PackedLinear(Joined([_taken(child)], form))
    if type(child).__name__ == "Conv1D" and hasattr(child, "nf"):
        weight, bias = _taken(child)
        return PackedLinear(Joined([(weight.t(), bias)], form))
    return None


def _taken(linear: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


def pack_embedding(child: nn.Module, head: PackedLinear | None) -> Int8Embedding | None:
    """The 8-bit form of an embedding; one that is tied to ``head`` shares its weight.  ``None``: it stays as it is."""
    product = head.joined.product if head is not None else None
    if not isinstance(child, nn.Embedding) or not can_quantize(child.weight) or not isinstance(product, Int8 | None):
        return None
    return Int8Embedding(child, product)


def products_below(module: nn.Module) -> list[Product]:
    """Every product below ``module``; one that is shared is there as often."""
    linears = [m.joined.product for m in module.modules() if isinstance(m, PackedLinear)]
    return linears + [m.product for m in module.modules() if isinstance(m, Int8Embedding)]


def least_below(module: nn.Module) -> int:
    """Of how many rows at least a forward must be for the sake of what is multiplied below ``module``; 0: no number
    would do.

    Of what is not packed in float32 this says nothing: there the self-test sees what differs (exact.py).
    """
    least = {product.least for product in products_below(module)}
    for own in module.modules():
        if _multiplies(own):
            least |= {_least_plain(p) for p in own.parameters(recurse=False) if p.ndim == 2}
    return 0 if 0 in least else max(least, default=1)


def _least_plain(weight: torch.Tensor) -> int:
    half = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
    return least_rows(False, *weight.shape, weight.dtype) if half else 1


def rows_below(module: nn.Module) -> int:
    """Forwards whose rows are a multiple of this many give the products below ``module`` bits that do not differ; 0: no
    number is known to.

    What is not packed beside what is needs whole fours, if they do here, and a self-test may not show it: where the
    packed ones round their rows, most of the bits that differ are lost, and not all.
    """
    packed = products_below(module)
    beside = any(_multiplies(m) for m in module.modules()) and any(not isinstance(p, Plain) for p in packed)
    return math.lcm(*(product.rows for product in packed), plain_rows() if beside else 1)


@functools.cache
def plain_rows() -> int:
    """Four, where MKL gives rows in whole fours the same bits in any company (AVX2); 0 where it does not (AVX-512)."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 1024, generator=generator) for rows in (64, 64))
    whole = F.linear(x, weight)
    return 4 if all(torch.equal(F.linear(x[:n], weight), whole[:n]) for n in range(4, 64, 4)) else 0


def _multiplies(module: nn.Module) -> bool:
    """Whether it has weights of its own that are no table to look up."""
    if isinstance(module, nn.Embedding | Int8Embedding):
        return False
    own = module.parameters(recurse=False)
    return any(p.ndim >= 2 and p.device.type != "meta" and not isinstance(p, PackedWeight) for p in own)
