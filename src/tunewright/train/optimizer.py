"""fp32 masters of what is trained (Micikevicius et al. 2018), stepped by any of the optimizers.

A weight held in bf16 is too coarse to add small updates to. The masters are fp32 copies; they are stepped and
rounded back. A weight already in fp32 is its own master.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tunewright.core.errors import DriftError, Problem
from tunewright.models.memory import storage
from tunewright.optimizers import Optimizer
from tunewright.optimizers.adamw import AdamW
from tunewright.optimizers.adamw import Config as AdamWConfig
from tunewright.recipes import TrainConfig
from tunewright.train import guard

_AT_ONCE = 1 << 24
"""Numbers whose gradients are in fp32 together: 64 MB."""
_PIECE = 1 << 18
_AGAINST_ZERO = 1e-6
"""As torch's clip_grad_norm_ has it."""


class Masters:
    """A model's trainable parameters by name, their masters and the optimizer's state.

    ``parameters`` are all that require gradients at the start; ``masters`` are of those that do now. ``choose``
    may take gradients away from some for the first step.
    """

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        lr: float,
        optimizer: Optimizer | None = None,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
        choose: Callable[[], None] = lambda: None,
    ) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        choose()  # before masters of all of them take memory
        self.lr, self.config, self.lr_scale = lr, config, lr_scale
        self.optimizer = optimizer or AdamW(AdamWConfig())
        self.masters: dict[str, Tensor] = {}
        self._scale = self._shrunk = 1.0
        self._states: dict[str, dict[str, Tensor]] = {}
        self.follow()

    def follow(self) -> None:
        """Masters and state for what requires gradients now, and for nothing else.

        State exists from the start: memory that runs out does so before the first step, not inside it.
        """
        wanted = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        if wanted == list(self.masters):
            return
        kept = self.masters
        self.masters = {n: kept[n] if n in kept else _master(self.parameters[n]) for n in wanted}
        self._states = {
            n: self._states.get(n) or self.optimizer.start(m.detach()) for n, m in self.masters.items()
        }
        self._torch = self.optimizer.make(self._groups(), self.lr, self.config.betas)
        for name, master in self.masters.items():
            self._torch.state[master] = self._states[name]

    def _groups(self) -> list[dict[str, Any]]:
        """Matrices decay, vectors do not; each rate is its own group."""
        groups: dict[tuple[bool, float], list[Tensor]] = {}
        for name, master in self.masters.items():
            groups.setdefault((master.ndim > 1, self.lr_scale(name)), []).append(master)
        return [
            {"params": some, "weight_decay": self.config.weight_decay if decays else 0.0, "scale": scale}
            for (decays, scale), some in sorted(groups.items(), key=lambda item: (not item[0][0], item[0][1]))
        ]

    def gather(self, scale: float = 1.0) -> float:
        """The norm of all gradients, divided by ``scale``; :meth:`step` clips by it.

        It is NaN or infinite if a gradient is: :meth:`bad_gradients` says which.
        """
        gradients = [self.parameters[name].grad for name in self.masters]
        norms = [_norm(gradient) for gradient in gradients if gradient is not None]
        norm = torch.linalg.vector_norm(torch.stack(norms)) / scale if norms else torch.zeros(())
        self._scale, self._shrunk = scale, float((self.config.clip / (norm + _AGAINST_ZERO)).clamp(max=1.0))
        return float(norm)

    def bad_gradients(self) -> list[str]:
        """Names of the parameters whose gradient, or that of their master, holds a NaN or an infinity."""
        found = {
            n: p.grad for n, p in (*self.masters.items(), *self.parameters.items()) if p.grad is not None
        }
        return guard.not_finite(found.items())

    @torch.no_grad()
    def step(
        self, factor: float, and_then: Callable[[], None] | None = None, keep_gradients: bool = False
    ) -> None:
        """One update at ``factor`` times the peak rate, by the gradients whose norm was gathered; they are dropped.

        ``and_then`` may change the masters: while it runs, the model's parameters are their masters, with gradients
        if those are kept. Else fp32 gradients exist of a few masters at a time only.
        """
        for group in self._torch.param_groups:
            group["lr"] = self.lr * factor * group["scale"]
        for names in self._portions(math.inf if keep_gradients else _AT_ONCE):
            for name in names:
                self._take_gradient(name)
            self._torch.step()  # passes over masters without a gradient
            if not keep_gradients:
                for name in names:
                    self.masters[name].grad = None
        if and_then:
            with self._in_place():
                and_then()
        self._round_back()
        self.drop()

    def _portions(self, most: float) -> Iterator[list[str]]:
        """Names of masters of so many numbers together, or of one that is larger."""
        names: list[str] = []
        room = most
        for name, master in self.masters.items():
            if names and master.numel() > room:
                yield names
                names, room = [], most
            names.append(name)
            room -= master.numel()
        yield names

    def _take_gradient(self, name: str) -> None:
        """Move a parameter's gradient to its master, without the loss's scale, and clipped."""
        master, gradient = self.masters[name], self.parameters[name].grad
        self.parameters[name].grad = None  # before the next one is copied: never all of them twice
        if gradient is not None:
            master.grad = gradient.to(torch.float32)
            if self._scale != 1.0:
                master.grad.div_(self._scale)
            if self._shrunk != 1.0:
                master.grad.mul_(self._shrunk)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The masters' values and gradients in place of the parameters' own."""
        rounded = {name: (self.parameters[name].data, self.parameters[name].grad) for name in self.masters}
        for name in self.masters:
            self.parameters[name].grad = None
        for name, master in self.masters.items():
            self.parameters[name].data = master.data
            self.parameters[name].grad = master.grad
        try:
            yield
        finally:
            for name, (data, gradient) in rounded.items():
                self.parameters[name].grad = None
                self.parameters[name].data = data
                self.parameters[name].grad = gradient

    def not_finite(self) -> list[str]:
        """Names of the masters and state that hold a NaN or an infinity."""
        weights = [(f"weight {name}", master.detach()) for name, master in self.masters.items()]
        moments = [("{1} of {0}".format(*key.rsplit("|", 1)), value) for key, value in self.state().items()]
        return guard.not_finite([*weights, *moments])

    def release(self) -> None:
        """Give the memory of masters and state back; nothing can be stepped after that."""
        self._torch.state.clear()
        self._torch.param_groups.clear()
        self._states.clear()
        self.masters.clear()

    def drop(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None
        for master in self.masters.values():
            master.grad = None

    @torch.no_grad()
    def _round_back(self) -> None:
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if storage(parameter) != storage(master):
                parameter.copy_(master)

    def weights(self) -> dict[str, Tensor]:
        """What is trained, by name: the masters (fp32), and the parameters that have none now."""
        return {n: self.masters.get(n, p).detach() for n, p in self.parameters.items()}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Put saved weights back, and the rounded ones with them. DriftError if they are of another model."""
        self._check(weights)
        for name, parameter in self.parameters.items():
            self.masters.get(name, parameter).copy_(weights[name])
        self._round_back()

    def _check(self, weights: dict[str, Tensor]) -> None:
        own = self.parameters
        wrong = [n for n, p in own.items() if n not in weights or weights[n].shape != p.shape]
        wrong += [n for n in weights if n not in own]
        if wrong:
            what = f"the checkpoint holds other weights than are trained now, such as {wrong[0]}"
            raise DriftError(Problem("checkpoints", what, "start over with --fresh, or give another output"))

    def restore(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Put saved weights and state back; DriftError if they are of another model."""
        self._check(weights)
        self.set_state(state)  # first: masters made now would be those of rounded weights
        self.set_weights(weights)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state, as ``name|key`` tensors."""
        return {f"{n}|{key}": value for n, state in self._states.items() for key, value in state.items()}

    def set_state(self, saved: dict[str, Tensor]) -> None:
        """Put saved state back: what has some requires gradients now, and nothing else."""
        active = {joined.rpartition("|")[0] for joined in saved}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in active)
        self.follow()
        for joined, value in saved.items():
            name, _, key = joined.rpartition("|")
            device = self.masters[name].device
            self._states[name][key] = value.to(device)


def _norm(gradient: Tensor) -> Tensor:
    """Euclidean, fp32. Piece by piece where it has to be converted: in one that takes five times as long on a CPU."""
    pieces = (gradient,) if gradient.dtype == torch.float32 else torch.split(gradient.flatten(), _PIECE)
    norms = [torch.linalg.vector_norm(piece.float()) for piece in pieces]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    return norm


def _master(parameter: Tensor) -> Tensor:
    return parameter.detach().float().requires_grad_()
