"""What optimizers of Adam's kind share: the walk over the masters, and the mathematics of a step."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
EPSILON = 1e-8


def moments(like: Tensor) -> State:
    """Both moments at zero, fp32, of this shape."""
    return {"exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}


def counter(master: Tensor) -> State:
    """The steps that were taken."""
    return {"step": torch.zeros((), device=master.device)}


def direction(gradient: Tensor, state: State, betas: tuple[float, float]) -> Tensor:
    """Add a gradient to its moments; what Adam steps along, not yet times the rate (Kingma & Ba 2014, algorithm 1)."""
    (first, second), steps = betas, float(state["step"])
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = state["exp_avg_sq"].sqrt().div_((1 - second**steps) ** 0.5).add_(EPSILON)
    return state["exp_avg"] / root.mul_(1 - first**steps)


class Adam(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter 2017), then a subclass's step for each master."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every master that has a gradient."""
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    state = self.state[master]
                    state["step"] += 1
                    master.mul_(1 - group["lr"] * group["weight_decay"])
                    master.sub_(self.along(master.grad, state, group["betas"]), alpha=group["lr"])

    @abstractmethod
    def along(self, gradient: Tensor, state: State, betas: tuple[float, float]) -> Tensor:
        """What the master is moved against, times the rate; the state takes the gradient in."""
