"""What is kept of a training, and the ways back to it: checkpoints, and the ledger of what each step learned from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tunewright.core.errors import DivergedError, few
from tunewright.core.events import EventLog
from tunewright.recipes import TrainConfig
from tunewright.train import guard, ledger
from tunewright.train.checkpoint import Checkpoints, Restored
from tunewright.train.feed import Feed
from tunewright.train.optimizer import Masters
from tunewright.train.state import TrainState


class Owner(Protocol):
    """Who has tensors that must survive a kill, besides weights and moments."""

    def state(self) -> dict[str, Tensor]:
        """Those tensors, by name."""

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Take them back; none if there were none."""


@dataclass
class Record:
    """Of one stage, in its ``folder``: ``checkpoints/`` and ``samples.jsonl``."""

    folder: Path
    config: TrainConfig
    feed: Feed
    optimizer: Masters
    owners: Mapping[str, Owner]
    """By the names of their files in a checkpoint."""
    log: EventLog

    def __post_init__(self) -> None:
        keep_best = self.config.restore_best and self.config.eval_every > 0
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.config.keep, keep_best)
        self.ledger = ledger.Ledger(self.folder / "samples.jsonl")
        self._saved = 0

    def resume(self, start: TrainState) -> TrainState:
        """Where training is: all as it was at the newest whole checkpoint, or at the start if there is none."""
        restored = self._restored().state
        state = restored or start
        if restored:
            self._saved = state.step
            self.log.emit("resume", step=state.step)
        self._check_ledger(state)
        return state

    def save(self, state: TrainState) -> None:
        """A checkpoint of this step, if there is none; DivergedError if nothing could go on from its numbers."""
        if self._saved == state.step:
            return
        if bad := self.optimizer.not_finite():
            raise DivergedError(f"step {state.step}: not finite: {few(bad)}; no checkpoint of it is kept")
        self.ledger.settle()
        declared = {name: owner.state() for name, owner in self.owners.items()}
        path = self.checkpoints.save(self.optimizer, state, declared)
        self._saved = state.step
        self.log.emit("checkpoint", step=state.step, path=path.name)

    def roll_back(self, state: TrainState) -> None:
        """Go back to the weights before the spikes that ``state`` has come to, and past the batches that led there.

        Raises:
            DivergedError: there is nothing to go back to, or it did not help before.
        """
        restored = None
        if state.rollbacks < guard.ROLLBACKS:
            restored = self._restored(before=state.step - state.spikes)  # the update of that one is undone
        if restored is None or restored.state is None:
            raise DivergedError(
                f"step {state.step}: {state.spikes} losses in a row stand far out and "
                f"{state.rollbacks} rollbacks were made; lower train.lr, or train.save_every to have a "
                "checkpoint to go back to; train.on_spike: learn takes them as they are"
            )
        state.recent, state.spikes = restored.state.recent, 0
        state.rollbacks += 1
        state.untaught += range(restored.state.step + 1, state.step + 1)
        self.ledger.rolled_back(state.step, restored.state.step)
        self.log.emit("rollback", step=state.step, to=restored.state.step)
        self.save(state)

    def save_best(self, state: TrainState) -> None:
        """Keep these weights as the best so far, if those are wanted."""
        if self.config.restore_best:
            self.checkpoints.save_best(self.optimizer, state)

    def restore_best(self, state: TrainState) -> None:
        """Load the best weights, if they are wanted. Without ``eval_every`` none were measured: the last are it."""
        if self.config.restore_best and 0 < state.best_step < state.step:
            self.checkpoints.restore_best(self.optimizer, state.best_step)
            self.log.emit("restore", step=state.best_step, loss=state.best_loss)

    def _restored(self, before: int | None = None) -> Restored:
        """Weights, moments and what owners declared are those of the newest whole checkpoint; damage is told."""
        restored = self.checkpoints.restore(self.optimizer, before)
        for damage in restored.damaged:
            self.log.emit("damaged", what=damage)
        if restored.state:
            for name, owner in self.owners.items():
                owner.set_state(restored.declared.get(name, {}))
        return restored

    def _check_ledger(self, state: TrainState) -> None:
        """Steps that the ledger lost follow from the seed: written again, and told."""
        known = ledger.read(self.ledger.path)
        lost = set(range(1, state.step + 1)) - known.keys()
        if not lost:
            return
        steps: ledger.Steps = {}
        for step, indices in zip(range(1, state.step + 1), self.feed.from_step(0), strict=False):
            samples = [] if step in state.untaught else [int(i) for i in indices]
            steps[step] = known.get(step, samples)
        self.ledger.mend(steps)
        self.log.emit("damaged", what=f"{self.ledger.path}: {len(lost)} steps were lost; written again")
