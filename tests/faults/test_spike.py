"""Row 9: a batch of noise is caught at its step and passed over; clean training raises no alarm."""

import random
from typing import Any

import pytest
import torch
from lab import Lab, learns_labels

from tunewright.core import plugins
from tunewright.core.events import Event
from tunewright.objectives import kind
from tunewright.train import guard
from tunewright.train.loop import Trainer

LEARN_LABELS = [name for name in plugins.names("objectives") if learns_labels(kind(name))]
"""Of others noise in the labels is no spike in the loss."""
STEPS = 120
"""Enough for the loss of the small model to be low, so that noise stands out."""


class Noise:
    """From one step on, so many batches have labels that mean nothing."""

    def __init__(self, trainer: Trainer, step: int, batches: int, seed: int) -> None:
        self.trainer, self.steps = trainer, range(step, step + batches)
        self.rng = torch.Generator().manual_seed(seed)
        self._batch = trainer.feed.batch
        trainer.feed.batch = self.batch  # type: ignore[method-assign]

    def batch(self, indices: Any) -> dict[str, torch.Tensor]:
        """The batch, its labels drawn at random if its step is one of ours."""
        batch = self._batch(indices)
        if self.trainer.state.step + 1 in self.steps:
            noise = torch.randint(
                self.trainer.model.config.vocab_size, batch["labels"].shape, generator=self.rng
            )
            batch["labels"] = torch.where(batch["labels"] >= 0, noise, batch["labels"])
        return batch


class Kept:
    """The weights before and after a step."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.trainer, self.steps = trainer, (step - 1, step)
        self.weights: list[dict[str, torch.Tensor]] = []
        trainer.log.readers.append(self._watch)

    def _watch(self, event: Event) -> None:
        if event["kind"] in ("step", "spike") and event["step"] in self.steps:
            now = self.trainer.optimizer.weights()
            self.weights.append({name: tensor.clone() for name, tensor in now.items()})

    def are_equal(self) -> bool:
        """Whether the step changed none."""
        before, after = self.weights
        return all(torch.equal(before[name], after[name]) for name in after)


@pytest.mark.row(9)
@pytest.mark.parametrize("objective", LEARN_LABELS)
def test_a_batch_of_noise_is_passed_over(lab: Lab, tally, times, objective):
    count = -(-times(2, 20) // len(LEARN_LABELS))
    for trial in range(count):
        rng = random.Random(trial)
        bad = rng.randrange(guard.WINDOW, STEPS)
        events: list[Event] = []
        trainer = lab.trainer(
            f"noise-{trial}", events.append, objective=objective, method="full",
            train={"max_steps": STEPS, "lr": 3e-3, "eval_every": 0, "save_every": 0, "seed": trial},
        )  # fmt: skip
        Noise(trainer, bad, 1, seed=trial)
        kept = Kept(trainer, bad)
        trainer.run()
        spikes = [e["step"] for e in events if e["kind"] == "spike"]
        tally.add(
            spikes == [bad] and kept.are_equal(),
            f"{objective}, seed {trial}: noise at {bad}, spikes at {spikes}",
        )


@pytest.mark.row(9)
def test_clean_training_raises_no_alarm(lab: Lab, tally, times):
    steps = times(200, 10_000)
    events: list[Event] = []
    trainer = lab.trainer(
        "clean", events.append, method="full", data={"train": "builtin:demo-train", "valid_share": 0},
        train={"max_steps": steps, "lr": 3e-3, "tokens_per_batch": 96, "eval_every": 0, "save_every": 0},
    )  # fmt: skip
    trainer.run()
    alarms = [e["step"] for e in events if e["kind"] == "spike"]
    tally.note("clean steps", steps)
    tally.note("false alarms", len(alarms))
    tally.add(len(alarms) * 10_000 <= steps, f"false alarms at steps {alarms} of {steps}")
