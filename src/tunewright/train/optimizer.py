"""AdamW with fp32 masters (Loshchilov & Hutter 2017; Micikevicius et al. 2018).

A weight held in bf16 is too coarse to add small updates to. The optimizer keeps an fp32 copy, steps that,
and rounds it back. A weight already in fp32 is its own master.
"""

from typing import Any

import torch
from torch import Tensor

from tunewright.core.errors import DriftError, Problem
from tunewright.recipes import TrainConfig
from tunewright.train import guard


class MasterAdamW:
    """Optimizer over a model's trainable parameters, by name."""

    def __init__(self, model: Any, config: TrainConfig, lr: float) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters = {n: p.detach().float().requires_grad_() for n, p in self.parameters.items()}
        self.lr, self.clip = lr, config.clip
        matrices = [m for m in self.masters.values() if m.ndim > 1]
        others = [m for m in self.masters.values() if m.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=lr, betas=config.betas, fused=True
        )
        self._allocate()

    def _allocate(self) -> None:
        """Moments exist from the start: memory that runs out does so before the first step, not inside it."""
        for master in self.masters.values():
            first, second = torch.zeros_like(master.detach()), torch.zeros_like(master.detach())
            step = torch.zeros((), dtype=torch.float32, device=master.device)
            self._adamw.state[master] = {"step": step, "exp_avg": first, "exp_avg_sq": second}

    def gather(self, scale: float = 1.0) -> float:
        """Move the gradients, divided by ``scale``, to the masters; clip; return the norm before clipping.

        The norm is NaN or infinite if a gradient is: :meth:`bad_gradients` says which.
        """
        for name, parameter in self.parameters.items():
            self.masters[name].grad = None if parameter.grad is None else parameter.grad.float() / scale
        return float(torch.nn.utils.clip_grad_norm_(self.masters.values(), self.clip))

    def bad_gradients(self) -> list[str]:
        """Names of the parameters whose gradient holds a NaN or an infinity."""
        # Not the masters': clipping by a norm that is NaN has made all of those NaN.
        return guard.not_finite((n, p.grad) for n, p in self.parameters.items() if p.grad is not None)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at ``factor`` times the peak rate; gradients are dropped."""
        for group in self._adamw.param_groups:
            group["lr"] = self.lr * factor
        self._adamw.step()
        self._round_back()
        self.drop()

    def not_finite(self) -> list[str]:
        """Names of the masters and moments that hold a NaN or an infinity."""
        weights = [(f"weight {name}", master.detach()) for name, master in self.masters.items()]
        moments = [("{1} of {0}".format(*key.rsplit("|", 1)), value) for key, value in self.state().items()]
        return guard.not_finite([*weights, *moments])

    def release(self) -> None:
        """Give the memory of masters and moments back; nothing can be stepped after that."""
        self._adamw.state.clear()
        self._adamw.param_groups.clear()
        self.masters.clear()

    def drop(self) -> None:
        """Forget the gradients."""
        for name, parameter in self.parameters.items():
            parameter.grad = self.masters[name].grad = None

    @torch.no_grad()
    def _round_back(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.data_ptr() != self.masters[name].data_ptr():
                parameter.copy_(self.masters[name])

    def weights(self) -> dict[str, Tensor]:
        """The masters by name (fp32)."""
        return {n: m.detach() for n, m in self.masters.items()}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Put saved masters back, and the rounded weights with them. DriftError if they are of another model."""
        wrong = [n for n, m in self.masters.items() if n not in weights or weights[n].shape != m.shape]
        wrong += [n for n in weights if n not in self.masters]
        if wrong:
            what = f"the checkpoint holds other weights than are trained now, such as {wrong[0]}"
            raise DriftError(Problem("checkpoints", what, "start over with --fresh, or give another output"))
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self._round_back()

    def state(self) -> dict[str, Tensor]:
        """Moments and counts, as ``name|key`` tensors."""
        states = {n: self._adamw.state.get(m, {}) for n, m in self.masters.items()}
        return {f"{n}|{key}": value for n, state in states.items() for key, value in state.items()}

    def set_state(self, saved: dict[str, Tensor]) -> None:
        """Put saved moments and counts back."""
        for joined, value in saved.items():
            name, _, key = joined.rpartition("|")
            self._adamw.state[self.masters[name]][key] = value.to(self.masters[name].device)
