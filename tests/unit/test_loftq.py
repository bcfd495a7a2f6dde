"""LoftQ's start, against the paper's algorithm written out in float64."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tunewright.methods._loftq import Start, loftq
from tunewright.models.load import BUILTIN
from tunewright.models.low_rank import directions
from tunewright.models.quantized import Scheme, dequantize, quantize

NF4 = Scheme("nf4", double=False)


def weight(outputs: int = 128, inputs: int = 192) -> Tensor:
    """Not quite random: real weights have directions that matter more."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(outputs, inputs, generator=generator)
    spread = torch.logspace(0, -1, outputs)[:, None]
    return 0.02 * spread * random


def error(start: Start, w: Tensor) -> float:
    return float((start.quantized + start.b @ start.a - w).norm() / w.norm())


def reference(w: Tensor, rank: int, scheme: Scheme, iterations: int) -> tuple[Tensor, Tensor]:
    """The quantized weight and the product of the factors, by full SVDs in float64 as PEFT's loftq_init has them."""
    product = torch.zeros_like(w, dtype=torch.float64)
    for _ in range(iterations):
        q = dequantize(quantize((w.double() - product).float(), scheme), scheme, *w.shape, torch.float32)
        u, s, vh = torch.linalg.svd(w.double() - q.double(), full_matrices=False)
        left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * vh[:rank]
        product = left @ right
    return q, product


@pytest.mark.parametrize("shape", [(128, 192), (192, 128), (96, 96)])
@pytest.mark.parametrize("scheme", [NF4, Scheme("nf4"), Scheme("int8")], ids=str)
def test_one_iteration_is_the_quantized_weight_and_the_best_term_of_what_it_lost(
    shape: tuple[int, int], scheme: Scheme
) -> None:
    w = weight(*shape)
    start, (q, product) = loftq(w, 8, scheme), reference(w, 8, scheme, 1)
    assert torch.equal(start.quantized, q)
    assert start.a.shape == (8, shape[1])
    assert start.b.shape == (shape[0], 8)
    torch.testing.assert_close((start.b @ start.a).double(), product, atol=1e-6, rtol=0)


def test_the_singular_values_are_divided_evenly() -> None:
    start = loftq(weight(), 8, NF4)
    torch.testing.assert_close(start.a @ start.a.T, start.b.T @ start.b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("iterations", [2, 5])
def test_more_iterations_are_the_papers(iterations: int) -> None:
    w = weight()
    q, product = reference(w, 8, NF4, iterations)
    expected = float((q.double() + product - w).norm() / w.norm())
    assert error(loftq(w, 8, NF4, iterations), w) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scheme", [NF4, Scheme("nf4"), Scheme("int8")], ids=str)
def test_the_error_falls_with_each_iteration_and_with_the_rank(scheme: Scheme) -> None:
    weights = load_file(Path(BUILTIN["pico"]) / "model.safetensors")
    w = weights["model.layers.2.mlp.up_proj.weight"].float()
    bare = float((dequantize(quantize(w, scheme), scheme, *w.shape, torch.float32) - w).norm() / w.norm())
    errors = [error(loftq(w, 32, scheme, iterations), w) for iterations in (1, 2, 3, 4)]
    assert errors[0] < 0.95 * bare
    assert all(later < earlier for earlier, later in pairwise(errors)), errors
    assert error(loftq(w, 64, scheme), w) < errors[0]


def test_a_rank_beyond_the_matrix_leaves_nothing_to_be_desired() -> None:
    w = weight(24, 16)
    start = loftq(w, 20, NF4)
    assert start.a.shape == (20, 16)
    assert error(start, w) < 1e-5


def test_a_weight_that_quantizes_without_loss_has_no_term() -> None:
    start = loftq(torch.zeros(16, 64), 4, NF4)
    assert not (start.b @ start.a).any()
    assert torch.isfinite(start.a).all()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 40, 24)])
def test_directions_are_the_right_singular_vectors(shape: tuple[int, ...]) -> None:
    x = 1e-25 * torch.randn(
        *shape, generator=torch.Generator().manual_seed(0)
    )  # whose squares are no float32
    found = directions(x, 5)
    expected = torch.linalg.svd(x.double() * 1e25, full_matrices=False).Vh[..., :5, :].mT
    cosines = (found.double() * expected).sum(-2).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-4, rtol=0)
