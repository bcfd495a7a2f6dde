"""The held-out loss: before, during and after training."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tunewright.data.batching import cut
from tunewright.data.tokens import Sample, take
from tunewright.models.announce import announced
from tunewright.objectives import Objective
from tunewright.train import guard


class HeldOut:
    """Held-out samples and the largest batch, in tokens, that memory has allowed so far."""

    def __init__(self, objective: Objective, samples: Sequence[Sample], budget: int) -> None:
        self.objective, self.samples, self.budget = objective, samples, budget
        lengths = np.array([len(s["input_ids"]) for s in samples], np.int64)
        self._order, self._lengths = np.argsort(lengths, kind="stable"), lengths

    def __len__(self) -> int:
        return len(self.samples)

    def loss(self, model: Any, tell: Callable[[int], None] = lambda budget: None) -> float:
        """Mean loss over all samples, in nats per supervised token. ``tell`` hears of a smaller budget."""
        return self._fitted(model, self._batches, tell)

    def rehearse(self, model: Any, tell: Callable[[int], None] = lambda budget: None) -> None:
        """Measure the batch that takes the most memory, so that memory for it is known to be there."""
        self._fitted(model, lambda budget: [max(self._batches(budget), key=self._padded)], tell)

    def _fitted(
        self, model: Any, batches: Callable[[int], list[np.ndarray]], tell: Callable[[int], None]
    ) -> float:
        def smaller(budget: int) -> None:
            self.budget = budget
            tell(budget)

        with guard.one_sample_fits("data.valid", int(self._lengths.max())):
            return guard.fitting(self.budget, 1, lambda budget: self._mean(model, batches(budget)), smaller)

    def _batches(self, budget: int) -> list[np.ndarray]:
        return cut(self._order, self._lengths, budget)

    def _padded(self, indices: np.ndarray) -> int:
        return len(indices) * int(self._lengths[indices].max())

    def _mean(self, model: Any, batches: Sequence[np.ndarray]) -> float:
        was_training = model.training
        model.eval()
        try:
            return self._summed(model, batches)
        finally:
            model.train(was_training)

    @torch.no_grad()
    def _summed(self, model: Any, batches: Sequence[np.ndarray]) -> float:
        device = next(model.parameters()).device
        total = weights = 0.0
        for indices in batches:
            batch = self.objective.batch(list(take(self.samples, indices)), device)
            weight = self.objective.weight(batch)
            with announced(model, batch):
                total += float(self.objective.loss(model, batch)[0]) * weight
            weights += weight
        return total / weights
