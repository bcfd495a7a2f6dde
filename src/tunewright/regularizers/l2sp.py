"""L2-SP: weights are held near where they began (Li, Grandvalet & Davoine 2018)."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.regularizers import Facts, Old, Regularizer, Start


class Config(BaseConfig):
    """How strongly."""

    weight: float = Field(0.01, gt=0)
    """Of half the squared distance."""


class L2sp(Regularizer):
    """Adds half the weighted squared distance of all trained parameters from their start."""

    facts = Facts(
        idea=Words("Trained weights are held near where they began.", "使被训练的权重不远离初始值。"),
        formula="λ/2 · Σ (θ − θ₀)²",
        when=Words("Nothing of the old data is at hand.", "手头没有旧数据时。"),
        paper="Li, Grandvalet & Davoine 2018, arXiv:1802.01483",
    )

    def begin(self, start: Start, old: Old | None) -> None:
        """Keep the start."""
        self._start = start

    def penalty(self, model: Any) -> Tensor | None:
        """Over all trained parameters."""
        distances = [torch.square(moved).sum() for _, moved in self._start.moved(model)]
        found: Tensor = 0.5 * self.config.weight * torch.stack(distances).sum()
        return found
