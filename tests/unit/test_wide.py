"""Products of bf16 in fp32: nearer to the truth than PyTorch's own, in all the ways that they are asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn

from tunewright import fast
from tunewright.fast.wide_products import WideProducts
from tunewright.models import wide

BF16 = torch.bfloat16
ROUNDED = 2**-8
"""Half the distance of neighbours in bf16, as a share of a number."""


@pytest.fixture(autouse=True)
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors that would not gain, too; for other tests of the process it is held back there."""
    if wide.why_not() and not wide._held:
        wide._held.append(None)
    wide.install()
    monkeypatch.setattr(wide, "_held", [])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "_MOST", 1000)


@pytest.fixture
def wide_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all results that were made in parts."""
    found, filled = [], wide._filled

    def counted(a: Tensor, b: Tensor, *others: object) -> Tensor:
        found.append((*a.shape[:-1], b.shape[-1]))
        return filled(a, b, *others)

    monkeypatch.setattr(wide, "_filled", counted)
    return found


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


def out(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=BF16)


WEIGHT, ROWS, START, BIAS = numbers(53, 40), numbers(61, 40), numbers(61, 53), numbers(53)
LEFT, RIGHT, ADDED = numbers(3, 20, 40), numbers(3, 30, 40), numbers(3, 20, 30)
WAYS: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "by a weight": lambda to: to(ROWS) @ to(WEIGHT).T,
    "by its transpose": lambda to: to(START) @ to(WEIGHT),
    "of a transpose": lambda to: to(START).T @ to(ROWS),
    "of few rows": lambda to: to(ROWS)[:2] @ to(WEIGHT).T,
    "with a bias": lambda to: torch.addmm(to(BIAS), to(ROWS), to(WEIGHT).T),
    "added": lambda to: torch.addmm(to(START), to(ROWS), to(WEIGHT).T, beta=0.5, alpha=2.0),
    "in place": lambda to: to(START).clone().addmm_(to(ROWS), to(WEIGHT).T),
    "of batches": lambda to: to(LEFT) @ to(RIGHT).mT,
    "of batches, added": lambda to: torch.baddbmm(to(ADDED), to(LEFT), to(RIGHT).mT, alpha=0.5),
    "of batches, in place": lambda to: to(ADDED).clone().baddbmm_(to(LEFT), to(RIGHT).mT),
    "a linear layer": lambda to: nn.functional.linear(to(LEFT), to(WEIGHT), to(BIAS)),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_only_the_result_is_rounded(way, wide_calls):
    found = WAYS[way](lambda x: x)
    exact = WAYS[way](torch.Tensor.double)
    assert wide_calls
    assert found.dtype == BF16
    assert bool(((found - exact).abs() <= ROUNDED * exact.abs() + 1e-5).all())


@pytest.mark.parametrize("into", [
    lambda place: torch.mm(ROWS, WEIGHT.T, out=place),
    lambda place: torch.addmm(BIAS, ROWS, WEIGHT.T, out=place),
])  # fmt: skip
def test_into_a_given_tensor(into, wide_calls):
    place = out(61, 53)
    assert into(place) is place
    assert wide_calls
    assert bool(place.isfinite().all())


def test_batches_into_a_given_tensor(wide_calls):
    place = out(3, 20, 30)
    torch.bmm(LEFT, RIGHT.mT, out=place)
    assert torch.equal(place, LEFT @ RIGHT.mT)
    torch.baddbmm(ADDED, LEFT, RIGHT.mT, out=place)
    assert torch.equal(place, torch.baddbmm(ADDED, LEFT, RIGHT.mT))


def test_nothing_else_is_touched(wide_calls):
    torch.randn(9, 4) @ torch.randn(4, 9)
    numbers(0, 4) @ numbers(4, 3)
    numbers(9, 0) @ numbers(0, 3)
    with wide.plain():
        numbers(9, 4) @ numbers(4, 9)
    assert not wide_calls


def test_attention_backwards_is_that_of_fp32():
    found = [numbers(2, 2, 24, 8).requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in found]
    for tensors in (found, exact):
        nn.functional.scaled_dot_product_attention(*tensors, is_causal=True).sum().backward()
    for x, y in zip(found, exact, strict=True):
        assert torch.allclose(x.grad.double(), y.grad, rtol=2e-2, atol=2e-2)


@contextmanager
def lacking(monkeypatch: pytest.MonkeyPatch, reason: str = "") -> Iterator[None]:
    """On a processor as the reason says."""
    with monkeypatch.context() as patch:
        patch.setattr(wide, "why_not", lambda: reason)
        yield


def test_a_training_has_a_switch_for_it(monkeypatch, wide_calls, tmp_path: Path):
    model = ARCHITECTURES["llama"](vocab_size=200).to(BF16)
    portion = fast.Portion(64, 64, lambda tokens: 0.0, lambda tokens: None)
    work = fast.Work(model, 10, 640, 1.0, lambda: iter(()), tmp_path, portion)
    with lacking(monkeypatch):
        for chosen in (True, False):
            switches = {name: chosen and name == "wide_products" for name in fast.names()}
            wide_calls.clear()
            with fast.using(switches, work, lambda told: None):
                model(torch.arange(16)[None])
            assert bool(wide_calls) is chosen
        assert "bf16" in WideProducts().why_not(fast.Work(**{**vars(work), "model": model.float()}))
    with lacking(monkeypatch, "it has them"):
        assert WideProducts().why_not(work) == "it has them"
