"""Products on matrix units: as near to float64 as PyTorch's own, in any order and of any size; weights' gradients by them."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from techniques import work
from torch import Tensor, nn

from tunewright.fast import _amx_products, _native
from tunewright.fast.weight_gradients import WeightGradients

LACKING = _amx_products.prepare()
needs_units = pytest.mark.skipif(bool(LACKING), reason=LACKING)
UNITS = "the processor has no amx_bf16"


def laid(x: Tensor, transposed: bool) -> Tensor:
    """The same numbers, with the first side along memory instead of the last."""
    return x.t().contiguous().t() if transposed else x


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_amx_products, "fits", lambda a, b: True)


@needs_units
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1),
        (16, 40, 300),
        (33, 31, 257),
        (512, 96, 5000),  # threads share the sum
        (70, 50, 20_000),
        (1100, 700, 577),  # several parts of rows, and sums
        (40, 5000, 64),
        (2000, 33, 1000),
    ],
)
def test_a_product_is_as_near_to_float64_as_pytorchs(sizes: tuple[int, int, int], transposed: Any) -> None:
    torch.manual_seed(0)
    rows, columns, depth = sizes
    a, b = torch.randn(rows, depth).bfloat16(), torch.randn(depth, columns).bfloat16()
    own = _amx_products.multiply(laid(a, transposed[0]), laid(b, transposed[1]))
    exact = a.double() @ b.double()
    error, allowed = ((x.double() - exact).norm() for x in (own, a @ b))
    assert error <= 1.01 * allowed


@needs_units
@pytest.mark.usefixtures("always")
def test_parts_of_a_larger_matrix_are_read_and_written_in_their_place() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(400, 90).bfloat16(), torch.randn(400, 120).bfloat16()
    whole = torch.full((50, 100), 7.0).bfloat16()
    _amx_products.multiply(a[:, 10:50].t(), b[:, 20:90], whole[5:45, 10:80])
    assert torch.allclose(whole[5:45, 10:80], a[:, 10:50].t() @ b[:, 20:90], rtol=1e-2, atol=0.1)
    inside = torch.zeros(50, 100, dtype=torch.bool)
    inside[5:45, 10:80] = True
    assert (whole[~inside] == 7).all()


@needs_units
@pytest.mark.usefixtures("always")
def test_the_same_product_has_the_same_bits() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(40, 20_000).bfloat16(), torch.randn(20_000, 70).bfloat16()
    assert torch.equal(_amx_products.multiply(a, b), _amx_products.multiply(a, b))


@needs_units
def test_it_is_for_what_lies_across_and_long_sums_in_bf16() -> None:
    def bf16(*shape: int) -> Tensor:
        return torch.zeros(shape).bfloat16()

    assert _amx_products.fits(bf16(300, 64).t(), bf16(300, 64))
    assert not _amx_products.fits(bf16(64, 300), bf16(300, 64))
    assert not _amx_products.fits(bf16(200, 64).t(), bf16(200, 64))
    assert not _amx_products.fits(torch.zeros(300, 64).t(), torch.zeros(300, 64))
    assert _amx_products.fits(bf16(64, 5000), bf16(5000, 64))
    assert not _amx_products.fits(bf16(64, 5000), bf16(5000, 700))
    assert not _amx_products.fits(bf16(300, 0).t(), bf16(300, 64))
    assert not _amx_products.fits(bf16(300, 64).t(), bf16(300, 0))


@needs_units
@pytest.mark.usefixtures("always")
def test_without_memory_for_it_the_product_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "library", lambda name: SimpleNamespace(multiply=lambda *given: 1))
    a, b = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16()
    assert torch.equal(_amx_products.multiply(a, b), a @ b)


def test_what_does_not_fit_is_pytorchs_own() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    out = torch.empty(3, 5)
    assert torch.equal(_amx_products.multiply(a, b), a @ b)
    assert torch.equal(_amx_products.multiply(a, b, out), a @ b)
    assert torch.equal(out, a @ b)


class Two(nn.Module):
    """One layer with a bias and one without, the second after a bend."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(48, 80), nn.Linear(80, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(torch.tanh(self.one(x)))
        return y


def learned(model: Two, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    (model(x).float() ** 2).sum().backward()
    return [model(x), *(g for g in (x.grad, *(p.grad for p in model.parameters())) if g is not None)]


@needs_units
@pytest.mark.filterwarnings("ignore:.*(script_method|should not be instantiated)")
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_within_the_plain_paths_noise(compiled: bool) -> None:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(4, 160, 48)
    exact = learned(copy.deepcopy(model).double(), x.double())
    model, x = model.bfloat16(), x.bfloat16()
    plain = learned(model, x)
    with WeightGradients().on(work(model)):
        way: Any = torch.compile(model, dynamic=True) if compiled else model
        model.zero_grad()
        given = x.clone().requires_grad_()
        out = way(given)
        (out.float() ** 2).sum().backward()
        own = [out, *(g for g in (given.grad, *(p.grad for p in model.parameters())) if g is not None)]
    assert len(own) == len(plain) == len(exact) == 5
    for ours, theirs, expected in zip(own, plain, exact, strict=True):
        error, allowed = ((found.double() - expected).norm() for found in (ours, theirs))
        assert error <= 1.1 * allowed


def test_a_frozen_layer_and_one_in_fp32_are_left_alone_and_nothing_stays() -> None:
    model = Two().bfloat16()
    model.other.weight.requires_grad_(False)
    with WeightGradients().on(work(model)):
        assert "forward" in vars(model.one)
        assert "forward" not in vars(model.other)
    assert "forward" not in vars(model.one)
    assert WeightGradients().why_not(work(Two())) == "no linear layer learns in bf16"
    assert WeightGradients().why_not(work(model)) == LACKING


def test_without_the_units_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "why_not", lambda name: UNITS)
    assert WeightGradients().why_not(work(Two().bfloat16())) == UNITS
