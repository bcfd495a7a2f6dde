"""Everything that must survive a kill, besides weights, moments and what the objective declares. Order and
randomness do not: they are functions of (seed, stream, step).
"""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tunewright.train import guard


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
    micro_tokens: int = 0
    """Tokens in one forward pass since memory ran out; 0 while it has not."""
    eval_tokens: int = 0
    """The same for held-out batches."""
    recent: list[float] = field(default_factory=list)
    """The newest losses, for telling a spike."""
    spikes: int = 0
    """Spikes in a row until now."""
    skipped: int = 0
    """Steps passed over because of a spike."""
    rollbacks: int = 0
    untaught: list[int] = field(default_factory=list)
    """Steps that the weights learned nothing from."""

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
        """The state that :meth:`to_json` wrote; what an older version did not know is as at the start."""
        known = {f.name: tree[f.name] for f in fields(cls) if tree.get(f.name) is not None}
        return cls(**{**known, "step": tree["step"]})

    def measured(self, loss: float) -> bool:
        """Take note of a held-out loss; True if it is the best so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.evals_since_best = loss, self.step, 0
            return True
        self.evals_since_best += 1
        return False

    def learned(self, loss: float) -> None:
        """Take note of a training loss that was learned from."""
        self.recent = [*self.recent, loss][-guard.WINDOW :]
        self.spikes = 0

    def passed_over(self) -> None:
        """Take note of a step that was not learned from."""
        self.spikes += 1
        self.skipped += 1
        self.untaught.append(self.step)
