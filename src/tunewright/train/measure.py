"""The held-out loss: before, during and after training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from tunewright.data.batching import cut
from tunewright.data.tokens import Sample, take
from tunewright.models import likelihood
from tunewright.models.announce import announced
from tunewright.models.memory import fitting
from tunewright.objectives import Batch, Objective
from tunewright.train import guard

Figures = dict[str, float]


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
        return self.figures(model, tell)["loss"]

    def figures(self, model: Any, tell: Callable[[int], None] = lambda budget: None) -> Figures:
        """The loss, and the means of what else the objective tells."""
        return self._fitted(model, self._batches, tell)

    def batches(self, device: torch.device, budget: int) -> Iterator[Batch]:
        """All samples once, so many tokens at a time."""
        parts = self._batches(min(budget, self.budget)) if len(self) else []
        return (self._batch(indices, device) for indices in parts)

    def rehearse(self, model: Any, tell: Callable[[int], None] = lambda budget: None) -> None:
        """Measure the batch that takes the most memory, so that memory for it is known to be there."""
        self._fitted(model, lambda budget: [max(self._batches(budget), key=self._padded)], tell)

    def _fitted(
        self, model: Any, batches: Callable[[int], list[np.ndarray]], tell: Callable[[int], None]
    ) -> Figures:
        def smaller(budget: int) -> None:
            self.budget = budget
            tell(budget)

        with guard.one_sample_fits("data.valid", int(self._lengths.max())):
            return fitting(self.budget, 1, lambda budget: self._mean(model, batches(budget)), smaller)

    def _batches(self, budget: int) -> list[np.ndarray]:
        return cut(self._order, self._lengths, budget)

    def _padded(self, indices: np.ndarray) -> int:
        return len(indices) * int(self._lengths[indices].max())

    def _mean(self, model: Any, batches: Sequence[np.ndarray]) -> Figures:
        was_training = model.training
        model.eval()
        try:
            return self._summed(model, batches)
        finally:
            model.train(was_training)

    @torch.no_grad()
    def _summed(self, model: Any, batches: Sequence[np.ndarray]) -> Figures:
        if self.objective.explores:
            return self._judged(model, batches)
        device = next(model.parameters()).device
        together = [self._batch(indices, device) for indices in batches]
        with (
            likelihood.computed_by(model, likelihood.in_parts)
            if likelihood.is_plain(model)
            else nullcontext()
        ):
            return self._added(model, together)

    def _added(self, model: Any, together: Sequence[Batch]) -> Figures:
        sums: Figures = {}
        weights = 0.0
        self.objective.look(model, together)
        for batch in together:
            weight = self.objective.weight(batch)
            with announced(model, batch):
                loss, more = self.objective.loss(model, batch)
            for name, value in {"loss": float(loss), **more}.items():
                sums[name] = sums.get(name, 0.0) + value * weight
            weights += weight
        return self.objective.told({name: value / weights for name, value in sums.items()})

    def _judged(self, model: Any, batches: Sequence[np.ndarray]) -> Figures:
        parts = [(len(indices), list(take(self.samples, indices))) for indices in batches]
        figures = [(count, self.objective.judged(model, samples)) for count, samples in parts]
        whole = sum(count for count, _ in figures)
        return {name: sum(count * told[name] for count, told in figures) / whole for name in figures[0][1]}

    def _batch(self, indices: np.ndarray, device: torch.device) -> Batch:
        return self.objective.batch(list(take(self.samples, indices)), device)
