"""Checkpoints are whole or passed over; the newest stay, and the best besides."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tunewright.core import store
from tunewright.core.errors import DamagedError
from tunewright.recipes import TrainConfig
from tunewright.train.checkpoint import Checkpoints
from tunewright.train.optimizer import MasterAdamW
from tunewright.train.state import TrainState

FILES = ["manifest.json", "optimizer.safetensors", "state.json", "trainable.safetensors"]


def optimizer(value: float) -> MasterAdamW:
    """An optimizer after one step, its weights all ``value``."""
    model = nn.Linear(3, 2)
    made = MasterAdamW(model, TrainConfig(), 0.01)
    model(torch.ones(1, 3)).sum().backward()
    made.gather()
    made.step(1.0)
    made.set_weights({name: torch.full_like(w, value) for name, w in made.weights().items()})
    return made


def value(made: MasterAdamW) -> float:
    (only,) = {float(x) for weights in made.weights().values() for x in weights.flatten()}
    return only


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    """Checkpoints of these steps, each with its step as weights."""
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(optimizer(float(step)), TrainState(step=step, tokens=10 * step))
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_an_artifact_of_weights_moments_and_state(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, 2).save(optimizer(1.0), TrainState(step=7))
    assert path == tmp_path / "step-00000007"
    assert names(path) == FILES
    assert store.is_complete(path)


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_stay(tmp_path: Path, keep: int, left: list[int]) -> None:
    saved(tmp_path, 1, 2, 3, 4, keep=keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


def test_the_newest_is_restored(tmp_path: Path) -> None:
    checkpoints, target = saved(tmp_path, 5, 100), optimizer(0.0)
    assert checkpoints.restore(target) == TrainState(step=100, tokens=1000)
    assert value(target) == 100.0


def test_moments_are_restored(tmp_path: Path) -> None:
    checkpoints, source = Checkpoints(tmp_path, 1), optimizer(1.0)
    checkpoints.save(source, TrainState(step=1))
    target = MasterAdamW(nn.Linear(3, 2), TrainConfig(), 0.01)
    checkpoints.restore(target)
    assert target.state().keys() == source.state().keys()
    assert all(torch.equal(target.state()[name], tensor) for name, tensor in source.state().items())


def test_nothing_to_restore_leaves_the_optimizer_alone(tmp_path: Path) -> None:
    target = optimizer(3.0)
    assert Checkpoints(tmp_path / "none", 2).restore(target) is None
    assert value(target) == 3.0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped"])
def test_a_damaged_newest_one_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints, target = saved(tmp_path, 1, 2), optimizer(0.0)
    file = tmp_path / "step-00000002" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    restored = checkpoints.restore(target)
    assert restored is not None
    assert (restored.step, value(target)) == (1, 1.0)


def test_if_all_are_damaged_training_begins_anew(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    for path in tmp_path.glob("step-*/state.json"):
        path.unlink()
    assert checkpoints.restore(optimizer(0.0)) is None


def test_a_half_written_one_is_not_looked_at(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.77.partial")
    restored = checkpoints.restore(optimizer(0.0))
    assert restored is not None
    assert restored.step == 1


def test_the_best_stays_besides_the_newest(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    checkpoints.save_best(optimizer(1.5), TrainState(step=1))
    saved(tmp_path, 2, 3, 4)
    assert names(tmp_path) == ["best", "step-00000003", "step-00000004"]
    target = optimizer(0.0)
    checkpoints.restore_best(target)
    assert value(target) == 1.5


def test_a_better_one_takes_the_place_of_the_best(tmp_path: Path) -> None:
    checkpoints, target = Checkpoints(tmp_path, 2), optimizer(0.0)
    for step in (3, 8):
        checkpoints.save_best(optimizer(float(step)), TrainState(step=step))
    checkpoints.restore_best(target)
    assert value(target) == 8.0
    assert store.verify(tmp_path / "best")["step"] == 8
    assert names(tmp_path) == ["best"]


def test_damaged_best_weights_are_refused(tmp_path: Path) -> None:
    checkpoints, target = Checkpoints(tmp_path, 2), optimizer(0.0)
    checkpoints.save_best(optimizer(1.0), TrainState(step=1))
    (tmp_path / "best" / "trainable.safetensors").write_bytes(b"")
    with pytest.raises(DamagedError, match="its bytes differ"):
        checkpoints.restore_best(target)
    assert value(target) == 0.0


def test_clear_removes_them_all(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "checkpoints", 1, 2)
    checkpoints.clear()
    assert names(tmp_path) == []
    checkpoints.clear()
