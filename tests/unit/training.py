"""What the tests of the training loop share: what a run left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunewright.core import events
from tunewright.train import ledger
from tunewright.train.loop import Trainer

MakeTrainer = Callable[..., Trainer]
LORA = {"name": "lora", "rank": 4, "dropout": 0.1}
OTHERS = (("How are you?", "I am well, thank you."), ("Where is it?", "It is on the table."))
Poison = Callable[[torch.Tensor], torch.Tensor]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal to the last bit, NaN too."""
    return one.keys() == other.keys() and all(
        np.array_equal(one[n].float().numpy(), other[n].float().numpy(), equal_nan=True) for n in one
    )


def logged(tmp_path: Path, kind: str, folder: str = "run") -> list[dict[str, Any]]:
    return [event for event in events.read(tmp_path / folder / "events.jsonl") if event["kind"] == kind]


def losses(tmp_path: Path, folder: str = "run") -> list[float]:
    return [event["loss"] for event in logged(tmp_path, "step", folder)]


def learned(tmp_path: Path, folder: str = "run") -> ledger.Steps:
    return ledger.read(tmp_path / folder / "samples.jsonl")


def checkpoints(tmp_path: Path, folder: str = "run") -> list[str]:
    return sorted(path.name for path in (tmp_path / folder / "checkpoints").iterdir())


def kill_at(step: int) -> Callable[[events.Event], None]:
    """A reader of events that ends the run at a step."""

    def reader(event: events.Event) -> None:
        if event["kind"] == "step" and event["step"] == step:
            raise KeyboardInterrupt

    return reader


def killed_and_whole(
    make_trainer: MakeTrainer, tmp_path: Path, killed_at: int, **settings: Any
) -> tuple[Trainer, Trainer]:
    """A run killed at a step and started again, and one that was let alone: both ended with the same bits."""
    whole = make_trainer(folder="whole", **settings)
    whole_state = whole.run()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(folder="killed", readers=[kill_at(killed_at)], **settings).run()
    resumed = make_trainer(folder="killed", **settings)
    resumed_state = resumed.run()
    saved_at = (killed_at - 1) // settings["save_every"] * settings["save_every"]
    assert [event["step"] for event in logged(tmp_path, "resume", "killed")] == [saved_at] * (saved_at > 0)
    assert same(weights(resumed), weights(whole))
    assert same(resumed.optimizer.weights(), whole.optimizer.weights())
    assert same(resumed.optimizer.state(), whole.optimizer.state())
    resumed_state.seconds = whole_state.seconds
    assert resumed_state == whole_state
    expected = losses(tmp_path, "whole")
    assert losses(tmp_path, "killed") == expected[:killed_at] + expected[saved_at:]
    return resumed, whole
