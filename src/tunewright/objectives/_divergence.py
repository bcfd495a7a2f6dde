"""How far two distributions of words are apart, a row of the batch at a time, so that no logits of all are held."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["forward", "reverse", "jensen_shannon"]
ROWS = 256
"""Tokens whose distributions are held at a time."""
Logits = Callable[[Tensor], Tensor]
"""Makes logits [n, V] of some rows."""


def divergences(kind: Kind, share: float, teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """Nats [N], of log-probabilities: KL(teacher ‖ student), KL(student ‖ teacher), or the generalised Jensen-Shannon
    divergence (Agarwal et al. 2024, arXiv:2306.13649, eq. 1), whose mixture has ``share`` of the teacher.
    """
    if kind == "forward":
        return _kl(teacher_NV, student_NV)
    if kind == "reverse":
        return _kl(student_NV, teacher_NV)
    parts = torch.tensor([share, 1 - share], device=teacher_NV.device).log()
    mixed_NV = torch.logaddexp(teacher_NV + parts[0], student_NV + parts[1])
    return share * _kl(teacher_NV, mixed_NV) + (1 - share) * _kl(student_NV, mixed_NV)


def _kl(one_NV: Tensor, other_NV: Tensor) -> Tensor:
    apart_NV = torch.where(one_NV.isneginf(), 0.0, one_NV - other_NV)  # what cannot be counts nothing
    return (one_NV.exp() * apart_NV).sum(-1)


def with_rest(some_NK: Tensor) -> Tensor:
    """Log-probabilities [N, K + 1] of some words, and last of all others together."""
    held_N1 = some_NK.exp().sum(-1, keepdim=True).clamp_max(1 - 1e-6)
    return torch.cat([some_NK, torch.log1p(-held_N1)], -1)
