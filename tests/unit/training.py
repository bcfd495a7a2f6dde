"""What the tests of the training loop share: what a run left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logged(tmp_path: Path, kind: str, folder: str = "run") -> list[dict[str, Any]]:
    return [event for event in events.read(tmp_path / folder / "events.jsonl") if event["kind"] == kind]


def losses(tmp_path: Path, folder: str = "run") -> list[float]:
    return [event["loss"] for event in logged(tmp_path, "step", folder)]


def learned(tmp_path: Path, folder: str = "run") -> ledger.Steps:
    return ledger.read(tmp_path / folder / "samples.jsonl")


def checkpoints(tmp_path: Path, folder: str = "run") -> list[str]:
    return sorted(path.name for path in (tmp_path / folder / "checkpoints").iterdir())
