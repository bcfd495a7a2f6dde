"""What one step learns from: samples as they are, or what the model itself answered to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunewright.data.batching import cut
from tunewright.data.tokens import Sample
from tunewright.objectives import Batch
from tunewright.train.feed import Feed


@dataclass(frozen=True)
class Lesson:
    """The samples of one step."""

    feed: Feed
    indices: np.ndarray
    drawn: Sequence[Sample] | None = None
    """Learned from instead of the samples themselves."""

    def batches(self, budget: int) -> list[Batch]:
        """In parts of at most ``budget`` padded tokens."""
        if self.drawn is None:
            return [self.feed.batch(part) for part in self.feed.micro_batches(self.indices, budget)]
        asked = np.array([int(np.argmax(sample["learned"])) for sample in self.drawn])  # a question's length
        parts = cut(np.argsort(asked, kind="stable"), self._lengths, budget)  # its answers stay together
        return [self.feed.objective.batch([self.drawn[i] for i in part], self.feed.device) for part in parts]

    @property
    def tokens(self) -> int:
        """Padding not counted."""
        return self.feed.tokens(self.indices) if self.drawn is None else int(self._lengths.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(self.feed.data.lengths[self.indices].max() if self.drawn is None else self._lengths.max())

    @property
    def _lengths(self) -> np.ndarray:
        return np.array([len(sample["input_ids"]) for sample in self.drawn or ()])
