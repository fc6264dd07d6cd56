"""Products with weights laid out once: the same results, and for a row the same bits in any company."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mesh.errors import ConfigError
from node.engine.int8 import Int8
from node.engine.products import (
    Float,
    Form,
    Half,
    Joined,
    PackedLinear,
    Plain,
    can_halve,
    can_pack,
    pack_module,
    plain_rows,
    product_of,
    rows_below,
)

CPU = torch.device("cpu")
needs_half = pytest.mark.skipif(not can_halve(torch.float32, CPU), reason="no FBGEMM on this machine")


def _weight(out: int, size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out + size)
    return (torch.randn(out, size, generator=generator) * 0.02).to(dtype).float()


def _rows(n: int, size: int) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(n))


@needs_half
@pytest.mark.parametrize(
    ("weight", "held"),
    [
        (_weight(96, 448), True),
        (_weight(96, 448, torch.float16), True),
        (_weight(96, 448, torch.float32), False),
        (_weight(96, 448) * 2.0**25, False),  # past half precision's range
        (_weight(96, 448) * 2.0**-16, False),  # below its least steps
        (torch.full((96, 448), float("nan")), False),
    ],
    ids=["bfloat16", "float16", "float32", "large", "tiny", "nan"],
)
def test_half_precision_is_taken_where_it_loses_nothing(weight: torch.Tensor, held: bool) -> None:
    assert isinstance(product_of(weight, form="packed"), Half if held else Float)
    assert isinstance(product_of(weight, form="plain"), Plain)


@needs_half
def test_a_held_weight_comes_back() -> None:
    weight = _weight(100, 448, torch.float16)
    assert torch.equal(Half(weight).dense(), weight)
    assert Half(weight).nbytes == 100 * 448 * 2


@pytest.mark.parametrize("form", [pytest.param(Half, marks=needs_half), Float, Plain])
def test_products_equal_a_plain_linear_layer(form: type[Half | Float | Plain]) -> None:
    weight, bias, x = _weight(200, 448), torch.linspace(-1, 1, 200), _rows(7, 448)
    torch.testing.assert_close(form(weight)(x, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert form(weight)(x[None], None).shape == (1, 7, 200)


@pytest.mark.parametrize("form", [pytest.param(Half, marks=needs_half), Float])
@pytest.mark.parametrize("size", [448, 5632])
def test_a_row_has_the_same_bits_in_any_company(form: type[Half | Float], size: int) -> None:
    """For every number of rows that the form promises it for; a row alone is another kernel's where it is wide."""
    product, x = form(_weight(200, size)), _rows(600, size)
    whole = product(x, None)
    for n in range(product.rows, 600, product.rows):
        assert torch.equal(product(x[:n], None), whole[:n]), n
        assert torch.equal(product(x[600 - n :], None), whole[600 - n :]), n


@pytest.mark.parametrize(("out", "size"), [(64, 64), (96, 256), (64, 2048), (33, 112)])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (Plain, torch.bfloat16),
        (Plain, torch.float16),
        pytest.param(
            Float,
            torch.bfloat16,
            marks=pytest.mark.skipif(not can_pack(torch.bfloat16, CPU), reason="no such product here"),
        ),
        (Int8, torch.bfloat16),
    ],
)
def test_rounding_to_half_precision_hides_no_difference(
    out: int, size: int, form: type[Plain | Float | Int8], dtype: torch.dtype
) -> None:
    """Where sums cancel, all that is left is how they were rounded on the way."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (32 * torch.randn(rows, size, generator=generator).to(dtype) for rows in (70, out))
    mixed = torch.randperm(size, generator=generator)
    product, x = form(torch.cat([weight, weight[:, mixed]], 1)), torch.cat([x, -x[:, mixed]], 1)
    whole = product(x, None)
    assert product.least
    assert whole.count_nonzero() > whole.numel() / 4
    for n in range(1 if form is Float else product.least, 70):  # Float fills up by itself
        assert torch.equal(product(x[:n], None), whole[:n]), n


def test_few_rows_keep_their_shape() -> None:
    product, x = Float(_weight(96, 5632)), _rows(2, 5632)
    assert torch.equal(product(x[None], None)[0], product(x, None))
    assert product(x[:0], None).shape == (0, 96)
    assert product(x[0], None).shape == (96,)


def test_a_kernel_that_is_wrong_on_a_shape_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(200, 448, generator=torch.Generator().manual_seed(0))
    for kind in (Float, Int8):
        right = kind.__call__
        wrong = lambda self, x, bias, right=right: 1.05 * right(self, x, bias)  # noqa: E731
        monkeypatch.setattr(kind, "__call__", wrong)
    assert isinstance(product_of(weight, form="packed"), Plain)
    with pytest.raises(ConfigError, match=r"8-bit products of \(200, 448\) are wrong"):
        product_of(weight, form="int8")


class _Mlp(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96, bias=bias), nn.Linear(64, 80, bias=bias)
        self.down_proj = nn.Linear(80, 64)


@pytest.mark.parametrize("form", ["packed", "plain"])
@pytest.mark.parametrize("bias", [True, False])
def test_siblings_are_one_product_and_answer_for_themselves(form: Form, bias: bool) -> None:
    mlp, x = _Mlp(bias).requires_grad_(False), _rows(5, 64)
    expected = mlp.gate_proj(x), mlp.up_proj(x)
    weights = [mlp.gate_proj.weight.clone(), mlp.up_proj.weight.clone()]
    pack_module(mlp, form)
    gate, up = mlp.get_submodule("gate_proj"), mlp.get_submodule("up_proj")
    assert isinstance(gate, PackedLinear)
    assert isinstance(up, PackedLinear)
    assert gate.joined is up.joined
    assert isinstance(mlp.down_proj, PackedLinear) is (form == "packed")
    torch.testing.assert_close((gate(x), up(x)), expected)
    assert torch.equal(gate.weight, weights[0])
    assert torch.equal(up.weight, weights[1])
    assert gate.joined._x is None  # both took theirs: nothing is kept


def test_siblings_that_are_given_different_inputs_are_right_all_the_same() -> None:
    layers = [(_weight(8, 64), None), (_weight(4, 64), None)]
    joined, x, y = Joined(layers, form="plain"), _rows(3, 64), _rows(2, 64)
    torch.testing.assert_close(joined.part(0, x), F.linear(x, layers[0][0]))
    torch.testing.assert_close(joined.part(1, y), F.linear(y, layers[1][0]))
    torch.testing.assert_close(joined.part(0, x), F.linear(x, layers[0][0]))
    torch.testing.assert_close(joined.part(0, x), F.linear(x, layers[0][0]))


def test_layers_that_differ_in_bias_stay_apart() -> None:
    mlp = _Mlp().requires_grad_(False)
    mlp.up_proj = nn.Linear(64, 80).requires_grad_(False)
    pack_module(mlp, form="plain")
    assert type(mlp.gate_proj) is nn.Linear


def test_what_is_not_packed_beside_what_is_asks_for_whole_fours() -> None:
    """A router of experts: its rows differ with their number, and rounding behind it hides that from most tests."""
    layer = nn.Module()
    layer.gate, layer.down = nn.Module(), nn.Linear(64, 64)
    pack_module(layer, "int8")
    assert rows_below(layer) == 1
    layer.gate.weight = nn.Parameter(torch.randn(4, 64))
    assert rows_below(layer) == plain_rows()


def test_a_weight_that_its_module_multiplies_itself_is_packed_too() -> None:
    layer, x = nn.Module(), _rows(90, 448)
    layer.gate = nn.Module()
    layer.gate.weight = nn.Parameter(_weight(8, 448), requires_grad=False)
    pack_module(layer, "packed")
    assert rows_below(layer) == layer.gate.weight.product.rows
    whole = F.linear(x, layer.gate.weight)
    torch.testing.assert_close(whole, F.linear(x, _weight(8, 448)))
    for n in range(layer.gate.weight.product.rows, 90, layer.gate.weight.product.rows):
        assert torch.equal(F.linear(x[:n], layer.gate.weight), whole[:n])
    assert torch.equal(layer.gate.weight[3] * 2, _weight(8, 448)[3] * 2), "anything else is done with the weight itself"
    torch.testing.assert_close(F.linear(x, layer.gate.weight, bias=torch.ones(8)), whole + 1)
