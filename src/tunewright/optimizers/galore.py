"""GaLore: Adam on gradients projected to a low rank, for all weights at an adapter's memory (Zhao et al. 2024)."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.models.low_rank import directions
from tunewright.optimizers import Facts, Optimizer
from tunewright.optimizers._adam import Adam, State, counter, direction, moments


class Config(BaseConfig):
    """The projection. Betas and weight decay are ``train``'s."""

    rank: int = Field(128, ge=1)
    """Rank r of the projected gradients; a matrix whose short side is not longer is stepped by AdamW."""
    period: int = Field(200, ge=1)
    """Steps between two projections, each made from the gradient of its step."""
    scale: float = Field(0.25, gt=0)
    """What an update is multiplied by, the paper's alpha; at 0.25 its rates are about 0.01, far above AdamW's."""


class GaLore(Optimizer):
    """Moments and projection take (2·long + short)·r numbers for a matrix."""

    facts = Facts(
        idea=Words(
            "Gradients are projected to a low rank that is found anew every few hundred steps; Adam works there.",
            "把梯度投影到低秩子空间（每隔数百步重新求取），Adam 的状态只在其中维护。",
        ),
        bytes_per_parameter=0.375,  # a matrix of 4096 x 4096 at rank 128
        paper="Zhao et al. 2024, arXiv:2403.03507",
    )

    def make(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer:
        """Adam in each matrix's own low-rank space."""
        return _GaLore(groups, lr, betas, self.config)

    def start(self, master: Tensor) -> State:
        """``projector`` [..., short, r] and moments [..., long, r]; AdamW's for vectors and small matrices."""
        rank = self.config.rank
        if master.ndim < 2 or min(master.shape[-2:]) <= rank:
            return {**counter(master), **moments(master)}
        projector = master.new_zeros(*master.shape[:-2], min(master.shape[-2:]), rank)
        low = master.new_zeros(*master.shape[:-2], max(master.shape[-2:]), rank)
        return {**counter(master), "projector": projector, **moments(low)}


class _GaLore(Adam):
    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], config: Config
    ) -> None:
        super().__init__(groups, lr, betas)
        self.config = config

    def along(self, gradient: Tensor, state: State, betas: tuple[float, float]) -> Tensor:
        """N·Pᵀ times the scale, where N is Adam's direction for the gradient's projection G·P (the paper's algorithm 2)."""
        if "projector" not in state:
            return direction(gradient, state, betas)
        is_wide = gradient.shape[-2] < gradient.shape[-1]
        g_LS = gradient.mT if is_wide else gradient  # L is the long side, S the short one
        if (int(state["step"]) - 1) % self.config.period == 0:
            state["projector"].copy_(directions(g_LS, self.config.rank))
        p_SR = state["projector"]
        update_LS = self.config.scale * direction(g_LS @ p_SR, state, betas) @ p_SR.mT
        return update_LS.mT if is_wide else update_LS
