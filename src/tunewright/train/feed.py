"""What a step learns from: the batches of every step, cut into what fits in memory."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch

from tunewright.core.errors import few
from tunewright.data.batching import BatchPlan, cut, padding_share
from tunewright.data.tokens import LENGTH, SAMPLE, Mixture, take
from tunewright.objectives import Batch, Objective
from tunewright.recipes import TrainConfig

_TOLD = 5
"""Samples that a message names."""


class Feed:
    """The samples of each step, as tensors on the device."""

    def __init__(
        self, data: Mixture, objective: Objective, config: TrainConfig, device: torch.device
    ) -> None:
        self.data, self.objective, self.config, self.device = data, objective, config, device
        sizes = objective.sizes(data.lengths)
        self._plan = BatchPlan(data.epoch, sizes, config.tokens_per_batch, config.seed)
        self.steps = config.max_steps or self._plan.steps(config.epochs) * objective.reuse
        self._shared = 0

    @property
    def epochs(self) -> float:
        """Passes over the data in all steps."""
        return self.steps / self.objective.reuse / len(self._plan.batches(0))

    def _first(self) -> list[np.ndarray]:
        """The batches of the first epoch that are learned from."""
        return self._plan.batches(0)[: -(-self.steps // self.objective.reuse)]

    def from_step(self, step: int) -> Iterator[np.ndarray]:
        """The sample indices of each step, from ``step`` (0-based) on, without end."""
        first, times = divmod(step, self.objective.reuse)
        repeated = (batch for batch in self._plan.start_at(first) for _ in range(self.objective.reuse))
        return islice(repeated, times, None)

    def micro_batches(self, indices: np.ndarray, budget: int) -> list[np.ndarray]:
        """A step's samples in parts of at most ``budget`` padded tokens."""
        return cut(indices, self.data.lengths - self._shared, max(1, budget - self._shared))

    def share(self, on: bool) -> None:
        """Whether tokens that all samples begin with count once in each part, from now on: a part has more samples then."""
        self._shared = self._alike() if on else 0

    def _alike(self) -> int:
        """How many tokens all that is learned from begins with, of which none is learned itself."""
        seen = self._seen()
        if self.objective.rows > 1 or self.objective.explores or "learned" not in self.data[seen[0]]:
            return 0
        first = self.data[seen[0]]["input_ids"]
        alike = len(first)
        for sample in take(self.data, seen):
            learned = int(np.argmax(sample["learned"])) - 1  # a label stands one before its word
            own = sample["input_ids"][: max(0, min(alike, learned))]
            differ = np.flatnonzero(own != first[: len(own)])
            alike = int(differ[0]) if len(differ) else len(own)
            if not alike:
                break
        return alike

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Samples as one padded batch. Which rows they are, and their lengths, stay on the CPU, where they are looked up."""
        which_B = np.array(indices, np.int64)
        lengths_B = self.data.lengths[which_B].astype(np.int64)
        batch = self.objective.batch(list(take(self.data, which_B)), self.device)
        rows = self.objective.rows
        which_R = np.concatenate([which_B * rows + row for row in range(rows)])
        return {SAMPLE: torch.from_numpy(which_R), LENGTH: torch.from_numpy(lengths_B), **batch}

    def in_order(self, budget: int) -> list[np.ndarray]:
        """All samples that are learned from, once, by length, in parts of at most ``budget`` padded tokens: the same
        whenever it is asked.
        """
        seen = self._seen()
        return cut(seen[np.argsort(self.data.lengths[seen], kind="stable")], self.data.lengths, budget)

    def _seen(self) -> np.ndarray:
        """All, or those of the steps where these end within an epoch."""
        if self.epochs >= 1:
            return np.arange(len(self.data.lengths))
        return np.unique(np.concatenate(self._first()))

    def tokens(self, indices: np.ndarray) -> int:
        """Tokens in these samples, padding not counted."""
        return int(self.data.lengths[indices].sum())

    def padding_share(self, budget: int) -> float:
        """Padded positions of the first epoch, or of the steps where they are fewer, as a share of all."""
        return padding_share(self._first_epoch(budget), self.data.lengths)

    def typical(self) -> np.ndarray:
        """The first epoch's batch whose longest sample is neither long nor short: what a step costs hangs on that."""
        batches = sorted(self._first(), key=lambda batch: int(self.data.lengths[batch].max()))
        return batches[len(batches) // 2]

    def widest(self, budget: int) -> np.ndarray:
        """The micro-batch of the first epoch that takes the most memory."""
        return max(self._first_epoch(budget), key=self._padded)

    def _first_epoch(self, budget: int) -> list[np.ndarray]:
        return [m for batch in self._first() for m in self.micro_batches(batch, budget)]

    def _padded(self, indices: np.ndarray) -> int:
        return len(indices) * (int(self.data.lengths[indices].max()) - self._shared) + self._shared

    def names(self, indices: Sequence[int] | np.ndarray) -> str:
        """Where samples stand, for a message: ``my.jsonl:3, my.jsonl:8 and 4 more``."""
        return few([self.data.where(int(i)) for i in indices], _TOLD)
