"""Forward and backward passes over one global batch, in as many parts as fit in memory."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tunewright.core.rng import sow
from tunewright.methods import Clock, Method
from tunewright.models.announce import announced
from tunewright.objectives import Batch, Objective
from tunewright.regularizers import Regularizer
from tunewright.train.optimizer import Masters


@dataclass(frozen=True)
class Pass:
    """A global batch seen: its mean loss, the objective's figures, how much of it was supervised."""

    loss: float
    metrics: dict[str, float]
    weight: float


@dataclass(frozen=True)
class Accumulator:
    """Makes gradients of the mean over a whole global batch: each part counts by its weight."""

    model: Any
    method: Method
    objective: Objective
    optimizer: Masters
    regularizers: Sequence[Regularizer]
    half: bool
    """Whether to compute under an fp16 autocast."""

    def over(self, batches: Sequence[Batch], clock: Clock, scale: float = 1.0) -> Pass:
        """Add the gradients of a global batch's parts, times ``scale``, to the parameters' own."""
        self.method.before_step(self.model, clock)
        self.optimizer.follow()
        weights = [self.objective.weight(batch) for batch in batches]
        sow(clock.seed, "look", clock.step)
        self.objective.look(self.model, batches)
        for one in self.regularizers:
            one.look(self.model, batches, clock.step / clock.steps)
        whole, loss = sum(weights), 0.0
        metrics: dict[str, float] = {}
        for i, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            sow(clock.seed, f"micro-{i}", clock.step)
            with self._autocast(), announced(self.model, batch):
                part, figures = self.objective.loss(self.model, batch)
                for one in self.regularizers:
                    added = one.loss(self.model, batch)
                    part = part if added is None else part + added
                    figures = {**figures, **one.figures()}
            share = weight / whole
            (part * (share * scale)).backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach()) * share
            for name, value in figures.items():
                metrics[name] = metrics.get(name, 0.0) + value * share
        metrics = self.objective.told({"loss": loss, **metrics})
        loss = metrics.pop("loss")
        penalties = [
            self.method.penalty(self.model, clock),
            *(one.penalty(self.model) for one in self.regularizers),
        ]
        for penalty in penalties:
            if penalty is not None:
                (penalty * scale).backward()  # type: ignore[no-untyped-call]
                metrics["penalty"] = metrics.get("penalty", 0.0) + float(penalty.detach())
        return Pass(loss, metrics, whole)

    def _autocast(self) -> AbstractContextManager[Any]:
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.float16) if self.half else nullcontext()
