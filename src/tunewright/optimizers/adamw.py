"""AdamW: momentum and per-weight rates, with decoupled weight decay (Loshchilov & Hutter 2017)."""

from typing import Any

import torch
from torch import Tensor

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.optimizers import Facts, Optimizer


class Config(BaseConfig):
    """AdamW's betas and weight decay are ``train``'s."""


class AdamW(Optimizer):
    """torch's own fused AdamW."""

    facts = Facts(
        idea=Words("Two running means for every weight.", "每个权重维护两个滑动平均。"),
        bytes_per_parameter=8,
        paper="Loshchilov & Hutter 2017, arXiv:1711.05101",
    )

    def make(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer:
        """Fused: one pass over each tensor."""
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)

    def start(self, master: Tensor) -> dict[str, Tensor]:
        """Both moments at zero, fp32 of the master's shape."""
        first, second = torch.zeros_like(master), torch.zeros_like(master)
        return {"step": torch.zeros((), device=master.device), "exp_avg": first, "exp_avg_sq": second}
