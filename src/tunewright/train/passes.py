"""Forward and backward passes over one global batch, in as many parts as fit in memory."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tunewright.core.rng import derive
from tunewright.methods import Clock, Method
from tunewright.models.announce import announced
from tunewright.objectives import Objective
from tunewright.train.feed import Feed
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
    feed: Feed
    optimizer: Masters
    half: bool
    """Whether to compute under an fp16 autocast."""

    def over(self, micro_batches: Sequence[np.ndarray], clock: Clock, scale: float = 1.0) -> Pass:
        """Add the gradients of these parts, times ``scale``, to the parameters' own."""
        self.method.before_step(self.model, clock)
        self.optimizer.follow()
        batches = [self.feed.batch(indices) for indices in micro_batches]
        weights = [self.objective.weight(batch) for batch in batches]
        whole, loss = sum(weights), 0.0
        metrics: dict[str, float] = {}
        for i, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            torch.manual_seed(derive(clock.seed, f"micro-{i}", clock.step))
            with self._autocast(), announced(self.model, batch):
                part, metrics = self.objective.loss(self.model, batch)
            (part * (weight / whole * scale)).backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach()) * weight / whole
        penalty = self.method.penalty(self.model, clock)
        if penalty is not None:
            (penalty * scale).backward()  # type: ignore[no-untyped-call]
            metrics = {**metrics, "penalty": float(penalty.detach())}
        return Pass(loss, metrics, whole)

    def _autocast(self) -> AbstractContextManager[Any]:
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.float16) if self.half else nullcontext()
