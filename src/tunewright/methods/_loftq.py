"""LoftQ: a quantized weight and an adapter that begins with what quantizing lost (Li et al. 2023, arXiv:2310.08659)."""

from typing import NamedTuple

import torch
from torch import Tensor

from tunewright.models.low_rank import directions
from tunewright.models.quantized import Scheme, Tensors, dequantize, quantize


class Start(NamedTuple):
    """What lies close to a weight: quantized + b·a."""

    held: Tensors
    """The quantized weight as :func:`tunewright.models.quantized.quantize` gives it."""
    quantized: Tensor
    """[O, I], fp32, what it stands for."""
    a: Tensor
    """[rank, I]."""
    b: Tensor
    """[O, rank]."""


@torch.no_grad()
def loftq(weight_OI: Tensor, rank: int, scheme: Scheme, iterations: int = 1) -> Start:
    """Quantizing and the best term of a rank in turn, each of what the other leaves (the paper's algorithm 1).

    The first iteration's Q is the weight quantized as ever; the singular values are divided evenly between A and B.
    """
    w_OI = weight_OI.float()
    a_RI, b_OR = w_OI.new_zeros(rank, w_OI.shape[1]), w_OI.new_zeros(w_OI.shape[0], rank)
    for _ in range(iterations):
        held = quantize(w_OI - b_OR @ a_RI, scheme)
        q_OI = dequantize(held, scheme, w_OI.shape[0], w_OI.shape[1], torch.float32)
        a_RI, b_OR = _factors(w_OI - q_OI, rank)
    return Start(held, q_OI, a_RI, b_OR)


def _factors(x_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, I] and B [O, rank] whose product is the closest to x of this rank; zeros where the rank is higher."""
    if x_OI.shape[0] < x_OI.shape[1]:  # the short side decides the work
        b_RO, a_IR = _factors(x_OI.T, rank)
        return a_IR.T.contiguous(), b_RO.T.contiguous()
    v_IR = directions(x_OI, rank)
    us_OR = x_OI @ v_IR
    s_R = us_OR.norm(dim=0)
    root_R = s_R.clamp_min(torch.finfo(s_R.dtype).tiny).sqrt()
    missing = (0, rank - v_IR.shape[1])
    a_RI = torch.nn.functional.pad(v_IR * root_R, missing).T
    return a_RI.contiguous(), torch.nn.functional.pad(us_OR / root_R, missing).contiguous()
