"""Who is at fault for a number that is not finite: tensors that hold such numbers, or else samples that make them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunewright.core.errors import few
from tunewright.train import guard
from tunewright.train.feed import Feed
from tunewright.train.optimizer import Masters
from tunewright.train.passes import Pass


def bad_weights(model: Any) -> list[str]:
    """Names of a model's weights that hold a NaN or an infinity."""
    return guard.not_finite((f"weight {name}", p.detach()) for name, p in model.named_parameters())


@dataclass(frozen=True)
class Blame:
    """Of one step, whose gradients are still there."""

    model: Any
    optimizer: Masters
    feed: Feed
    learn: Callable[[np.ndarray], Pass]
    """Makes the gradients of these samples alone."""

    def named(self, what: str, indices: np.ndarray) -> str:
        """Who made ``what`` of these samples not finite, in a few words; gradients are not kept."""
        if bad := self.optimizer.not_finite() or bad_weights(self.model):
            return few(bad)
        gradients = [f"gradient of {name}" for name in self.optimizer.bad_gradients()]
        return f"{few(gradients) or what}; samples: {self.feed.names(self._samples(indices))}"

    def _samples(self, indices: np.ndarray) -> np.ndarray:
        """Those that alone give a loss or gradient that is not finite; all of them if none does."""
        found = [index for index in indices if self._is_bad(index)]
        self.optimizer.drop()
        return np.array(found) if found else indices

    def _is_bad(self, index: int) -> bool:
        self.optimizer.drop()
        seen = self.learn(np.array([index]))
        return not math.isfinite(seen.loss) or bool(self.optimizer.bad_gradients())
