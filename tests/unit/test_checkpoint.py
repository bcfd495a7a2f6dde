"""Checkpoints are whole or passed over; the newest stay, and the best besides."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tunewright.core import store
from tunewright.core.errors import DamagedError
from tunewright.recipes import TrainConfig
from tunewright.train.checkpoint import Checkpoints, Restored, step_of
from tunewright.train.optimizer import Masters
from tunewright.train.state import TrainState

FILES = ["manifest.json", "optimizer.safetensors", "state.json", "trainable.safetensors"]
DAMAGE = ["missing", "empty", "truncated", "flipped"]


def optimizer(value: float) -> Masters:
    """An optimizer after one step, its weights all ``value``."""
    model = nn.Linear(3, 2)
    made = Masters(model, TrainConfig(), 0.01)
    model(torch.ones(1, 3)).sum().backward()
    made.gather()
    made.step(1.0)
    made.set_weights({name: torch.full_like(w, value) for name, w in made.weights().items()})
    return made


def value(made: Masters) -> float:
    (only,) = {float(x) for weights in made.weights().values() for x in weights.flatten()}
    return only


def saved(folder: Path, *steps: int, keep: int = 2, keep_best: bool = False, best: int = 0) -> Checkpoints:
    """Checkpoints of these steps, each with its step as weights."""
    checkpoints = Checkpoints(folder, keep, keep_best)
    for step in steps:
        checkpoints.save(optimizer(float(step)), TrainState(step=step, tokens=10 * step, best_step=best))
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.write_bytes(content[: len(content) // 2] if how == "truncated" else b"")


def test_a_checkpoint_is_an_artifact_of_weights_moments_and_state(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, 2).save(optimizer(1.0), TrainState(step=7))
    assert path == tmp_path / "step-00000007"
    assert step_of(path) == 7
    assert names(path) == FILES
    assert store.is_complete(path)


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_stay(tmp_path: Path, keep: int, left: list[int]) -> None:
    saved(tmp_path, 1, 2, 3, 4, keep=keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


def test_the_newest_is_restored(tmp_path: Path) -> None:
    checkpoints, target = saved(tmp_path, 5, 100), optimizer(0.0)
    assert checkpoints.restore(target) == Restored(TrainState(step=100, tokens=1000))
    assert value(target) == 100.0


def test_or_the_newest_before_a_step(tmp_path: Path) -> None:
    checkpoints, target = saved(tmp_path, 5, 7, 9, keep=9), optimizer(0.0)
    assert checkpoints.restore(target, before=8).state == TrainState(step=7, tokens=70)
    assert value(target) == 7.0
    assert checkpoints.restore(target, before=7).state == TrainState(step=5, tokens=50)
    assert checkpoints.restore(target, before=5) == Restored(None)
    assert value(target) == 5.0
    assert names(tmp_path) == ["step-00000005", "step-00000007", "step-00000009"]


def test_moments_are_restored(tmp_path: Path) -> None:
    checkpoints, source = Checkpoints(tmp_path, 1), optimizer(1.0)
    checkpoints.save(source, TrainState(step=1))
    target = Masters(nn.Linear(3, 2), TrainConfig(), 0.01)
    checkpoints.restore(target)
    assert target.state().keys() == source.state().keys()
    assert all(torch.equal(target.state()[name], tensor) for name, tensor in source.state().items())


def test_what_the_objective_declares_is_restored(tmp_path: Path) -> None:
    declared = {"baseline": torch.tensor([0.25, 3.0])}
    checkpoints = Checkpoints(tmp_path, 1)
    path = checkpoints.save(optimizer(1.0), TrainState(step=1), {"objective": declared, "method": {}})
    assert names(path) == sorted([*FILES, "objective.safetensors"])
    restored = checkpoints.restore(optimizer(0.0))
    assert restored.declared["objective"].keys() == declared.keys()
    assert torch.equal(restored.declared["objective"]["baseline"], declared["baseline"])


def test_nothing_to_restore_leaves_the_optimizer_alone(tmp_path: Path) -> None:
    target = optimizer(3.0)
    assert Checkpoints(tmp_path / "none", 2).restore(target) == Restored(None)
    assert value(target) == 3.0


# Damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_one_is_passed_over_and_told(tmp_path: Path, name: str, how: str) -> None:
    checkpoints, target = saved(tmp_path, 1, 2), optimizer(0.0)
    damage(tmp_path / "step-00000002" / name, how)
    restored = checkpoints.restore(target)
    assert restored.state is not None
    assert (restored.state.step, value(target)) == (1, 1.0)
    (told,) = restored.damaged
    assert "step-00000002" in told
    assert name in told


def test_damaged_ones_are_put_aside_and_not_counted_among_those_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3, keep=3)
    for step in (2, 3):
        damage(tmp_path / f"step-0000000{step}" / "state.json", "flipped")
    assert len(checkpoints.restore(optimizer(0.0)).damaged) == 2
    aside = ["damaged-step-00000002", "damaged-step-00000003"]
    assert names(tmp_path) == [*aside, "step-00000001"]
    saved(tmp_path, 2, 3, keep=2)
    assert names(tmp_path) == [*aside, "step-00000002", "step-00000003"]


def test_a_step_that_is_damaged_again_takes_the_place_of_the_one_put_aside(tmp_path: Path) -> None:
    for byte in b"ab":
        checkpoints = saved(tmp_path, 2)
        (tmp_path / "step-00000002" / "state.json").write_bytes(bytes([byte]))
        assert checkpoints.restore(optimizer(0.0)).state is None
    assert names(tmp_path) == ["damaged-step-00000002"]
    assert (tmp_path / "damaged-step-00000002" / "state.json").read_bytes() == b"b"


def test_if_all_are_damaged_training_begins_anew(tmp_path: Path) -> None:
    checkpoints, target = saved(tmp_path, 1, 2), optimizer(3.0)
    for path in tmp_path.glob("step-*/state.json"):
        path.unlink()
    restored = checkpoints.restore(target)
    assert restored.state is None
    assert len(restored.damaged) == 2
    assert value(target) == 3.0


def test_a_half_written_one_is_not_looked_at(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.77.partial")
    restored = checkpoints.restore(optimizer(0.0))
    assert restored.state is not None
    assert restored.state.step == 1
    assert restored.damaged == ()


# The best


def test_the_best_stays_besides_the_newest(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, keep_best=True)
    checkpoints.save_best(optimizer(1.5), TrainState(step=1))
    saved(tmp_path, 2, 3, 4, keep_best=True, best=1)
    assert names(tmp_path) == ["best-00000001", "step-00000003", "step-00000004"]
    target = optimizer(0.0)
    checkpoints.restore_best(target, 1)
    assert value(target) == 1.5


def test_the_best_before_stays_until_a_checkpoint_knows_of_a_better_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1, keep_best=True)
    checkpoints.save_best(optimizer(3.0), TrainState(step=3))
    saved(tmp_path, 4, keep=1, keep_best=True, best=3)
    checkpoints.save_best(optimizer(8.0), TrainState(step=8))
    assert names(tmp_path) == ["best-00000003", "best-00000008", "step-00000004"]
    target = optimizer(0.0)
    restored = checkpoints.restore(target)  # killed before the next checkpoint
    assert restored == Restored(TrainState(step=4, tokens=40, best_step=3))
    checkpoints.restore_best(target, 3)
    assert value(target) == 3.0


def test_a_better_one_takes_the_place_of_the_best(tmp_path: Path) -> None:
    checkpoints, target = Checkpoints(tmp_path, 1, keep_best=True), optimizer(0.0)
    for step in (3, 8):
        checkpoints.save_best(optimizer(float(step)), TrainState(step=step))
        saved(tmp_path, step, keep=1, keep_best=True, best=step)
    checkpoints.restore_best(target, 8)
    assert value(target) == 8.0
    assert store.verify(tmp_path / "best-00000008")["step"] == 8
    assert names(tmp_path) == ["best-00000008", "step-00000008"]


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_best_weights_are_refused(tmp_path: Path, how: str) -> None:
    checkpoints, target = Checkpoints(tmp_path, 2), optimizer(0.0)
    checkpoints.save_best(optimizer(1.0), TrainState(step=1))
    damage(tmp_path / "best-00000001" / "trainable.safetensors", how)
    with pytest.raises(DamagedError, match="missing" if how == "missing" else "its bytes differ"):
        checkpoints.restore_best(target, 1)
    assert value(target) == 0.0


@pytest.mark.parametrize("how", DAMAGE)
def test_a_checkpoint_whose_best_weights_are_damaged_is_passed_over(tmp_path: Path, how: str) -> None:
    checkpoints = saved(tmp_path, 1, keep_best=True)
    checkpoints.save_best(optimizer(2.0), TrainState(step=2))
    saved(tmp_path, 2, keep_best=True, best=2)
    damage(tmp_path / "best-00000002" / "trainable.safetensors", how)
    restored = checkpoints.restore(optimizer(0.0))
    assert restored.state is not None
    assert restored.state.step == 1
    assert "best-00000002" in restored.damaged[0]


def test_every_checkpoint_that_is_kept_can_be_gone_on_from(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, keep_best=True)
    for step in (2, 4):
        checkpoints.save_best(optimizer(step - 1.0), TrainState(step=step - 1))
        saved(tmp_path, step, keep_best=True, best=step - 1)
    damage(tmp_path / "step-00000004" / "optimizer.safetensors", "flipped")
    target = optimizer(0.0)
    restored = checkpoints.restore(target)
    assert restored.state == TrainState(step=2, tokens=20, best_step=1)
    checkpoints.restore_best(target, 1)
    assert value(target) == 1.0


def test_where_no_best_is_kept_none_is_missed(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 4, best=3)
    assert checkpoints.restore(optimizer(0.0)) == Restored(TrainState(step=4, tokens=40, best_step=3))
