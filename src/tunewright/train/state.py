"""Everything that must survive a kill, besides weights and moments. Order and randomness do not: they are
functions of (seed, stream, step).
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class TrainState:
    """Where training is. ``seconds`` is time spent training, over all resumes."""

    step: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    evals_since_best: int = 0
    loss_scale: float = 65536.0
    scaled_steps: int = 0

    def rescale(self, overflowed: bool) -> None:
        """Dynamic fp16 loss scale: halved on overflow, doubled after 2,000 clean steps."""
        self.scaled_steps = 0 if overflowed else self.scaled_steps + 1
        if overflowed:
            self.loss_scale /= 2
        elif self.scaled_steps % 2000 == 0:
            self.loss_scale *= 2

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; an infinite best loss (none measured yet) is null."""
        return {**asdict(self), "best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "TrainState":
        """The state that :meth:`to_json` wrote."""
        known = {f.name: tree[f.name] for f in fields(cls)}
        return cls(**{**known, "best_loss": math.inf if tree["best_loss"] is None else tree["best_loss"]})

    def measured(self, loss: float) -> bool:
        """Take note of a held-out loss; True if it is the best so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.evals_since_best = loss, self.step, 0
            return True
        self.evals_since_best += 1
        return False
