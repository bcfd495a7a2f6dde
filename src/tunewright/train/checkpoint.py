"""Checkpoints: weights, moments and state of one step, complete or absent."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from tunewright.core import store
from tunewright.train.optimizer import MasterAdamW
from tunewright.train.state import TrainState

_STEP = "step-{:08d}"
_BEST = "best"


class Checkpoints:
    """The checkpoints of one stage; the newest ``keep`` stay, and the best weights besides."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, optimizer: MasterAdamW, state: TrainState) -> Path:
        """Write this step's checkpoint, then remove the oldest beyond ``keep``."""
        path = self.folder / _STEP.format(state.step)
        with store.artifact(path) as partial:
            _save(optimizer.weights(), partial / "trainable.safetensors")
            _save(optimizer.state(), partial / "optimizer.safetensors")
            store.write_json(partial / "state.json", state.to_json())
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old)
        return path

    def save_best(self, optimizer: MasterAdamW, state: TrainState) -> None:
        """Keep these weights as the best so far."""
        with store.artifact(self.folder / _BEST, step=state.step) as partial:
            _save(optimizer.weights(), partial / "trainable.safetensors")

    def restore(self, optimizer: MasterAdamW) -> TrainState | None:
        """Load the newest checkpoint whose every byte is as written; None if there is none."""
        whole = next((p for p in reversed(self._steps()) if store.is_complete(p)), None)
        if whole is None:
            return None
        optimizer.set_weights(load_file(whole / "trainable.safetensors"))
        optimizer.set_state(load_file(whole / "optimizer.safetensors"))
        return TrainState.from_json(store.read_json(whole / "state.json"))

    def restore_best(self, optimizer: MasterAdamW) -> None:
        """Load the best weights; DamagedError if they are not as written."""
        store.verify(self.folder / _BEST)
        optimizer.set_weights(load_file(self.folder / _BEST / "trainable.safetensors"))

    def clear(self) -> None:
        """Remove all of them: the stage is finished and its result is saved."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
