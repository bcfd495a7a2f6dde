"""Checkpoints: weights, moments and state of one step, complete or absent."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from tunewright.core import store
from tunewright.core.errors import DamagedError
from tunewright.train.optimizer import Masters
from tunewright.train.state import TrainState

_STEP = "step-{:08d}"
_BEST = "best-{:08d}"
_DAMAGED = "damaged-{}"
_OWNERS = ("objective", "method")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Restored:
    """What was found: the state of the newest whole checkpoint, if any, and what the newer ones suffered."""

    state: TrainState | None
    declared: dict[str, Tensors] = field(default_factory=dict)
    """What objective and method keep besides weights, by their rooms' names."""
    damaged: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one stage; the newest ``keep`` stay, and the best weights besides if those are wanted."""

    def __init__(self, folder: Path, keep: int, keep_best: bool = False) -> None:
        self.folder, self.keep, self.keep_best = folder, keep, keep_best

    def save(self, optimizer: Masters, state: TrainState, declared: dict[str, Tensors] | None = None) -> Path:
        """Write this step's checkpoint, then remove what it makes needless."""
        path = self.folder / _STEP.format(state.step)
        with store.artifact(path, step=state.step, best=state.best_step if self.keep_best else 0) as partial:
            _save(optimizer.weights(), partial / "trainable.safetensors")
            _save(optimizer.state(), partial / "optimizer.safetensors")
            for owner, tensors in (declared or {}).items():
                if tensors:
                    _save(tensors, partial / f"{owner}.safetensors")
            store.write_json(partial / "state.json", state.to_json())
        self._prune()
        return path

    def save_best(self, optimizer: Masters, state: TrainState) -> None:
        """Keep these weights as the best so far. The best before stays until a checkpoint knows of these."""
        with store.artifact(self.folder / _BEST.format(state.step), step=state.step) as partial:
            _save(optimizer.weights(), partial / "trainable.safetensors")

    def _prune(self) -> None:
        for old in self.steps()[: -self.keep]:
            store.remove(old)
        counted_on = {best_of(path) for path in self.steps()}
        for best in sorted(self.folder.glob("best-*")):
            if best not in counted_on:
                store.remove(best)

    def restore(self, optimizer: Masters, before: int | None = None) -> Restored:
        """Load the newest checkpoint (of a step below ``before``) whose every byte is as written.

        Newer ones that are damaged are put aside under another name, so that they are not counted among those
        that are kept.
        """
        damaged: list[str] = []
        for path in reversed(self.steps()):
            if before is not None and step_of(path) >= before:
                continue
            try:
                state = self._verified(path)
            except DamagedError as error:
                damaged.append(str(error))
                self._put_aside(path)
                continue
            return self._load(path, state, optimizer, tuple(damaged))
        return Restored(None, damaged=tuple(damaged))

    def _verified(self, path: Path) -> TrainState:
        """A checkpoint's state, if its bytes and those of the best weights it counts on are as written."""
        store.verify(path)
        state = TrainState.from_json(store.read_json(path / "state.json"))
        if self.keep_best and state.best_step:
            store.verify(self.folder / _BEST.format(state.best_step))
        return state

    def _load(self, path: Path, state: TrainState, optimizer: Masters, damaged: tuple[str, ...]) -> Restored:
        weights, moments = (
            load_file(path / name) for name in ("trainable.safetensors", "optimizer.safetensors")
        )
        optimizer.restore(weights, moments)
        files = {owner: path / f"{owner}.safetensors" for owner in _OWNERS}
        declared = {owner: load_file(file) for owner, file in files.items() if file.exists()}
        return Restored(state, declared, damaged)

    def _put_aside(self, path: Path) -> None:
        aside = path.with_name(_DAMAGED.format(path.name))
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)

    def restore_best(self, optimizer: Masters, step: int) -> None:
        """Load the best weights, those of ``step``; DamagedError if they are not as written."""
        store.verify(self.folder / _BEST.format(step))
        optimizer.set_weights(load_file(self.folder / _BEST.format(step) / "trainable.safetensors"))

    def steps(self) -> list[Path]:
        """The checkpoints' folders, oldest first."""
        return sorted(self.folder.glob("step-*"))


def step_of(path: Path) -> int:
    """The step a checkpoint's folder names."""
    return int(path.name.partition("-")[2])


def best_of(path: Path) -> Path | None:
    """The best weights that a checkpoint counts on, if any."""
    try:
        step = store.facts(path).get("best", 0)
    except DamagedError:
        return None
    return path.with_name(_BEST.format(step)) if step else None


def _save(tensors: Tensors, path: Path) -> None:
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
