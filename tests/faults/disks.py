"""Runs on a disk that records what is done to it, or on any other.

A run has a workspace: ``run/`` is its output, ``cache/`` its token tables. Paths in records are relative to it.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from lab import Lab, outcome

from tunewright import pipeline
from tunewright.core import events, store
from tunewright.core.disk import Disk

Tree = dict[str, bytes | None]
"""A folder's content: path -> bytes, None for a folder."""
_OTHER_PROCESS = ".999999."
SHORT = {"max_steps": 6, "save_every": 2, "eval_every": 3, "keep": 2}
"""What a recipe's ``train`` is here: three checkpoints, the oldest removed, the best weights changed once."""
Item = TypeVar("Item")


def go(recipe: Path, workspace: Path, used: Disk | None = None) -> None:
    """Run the recipe in this process, as it is run in one of its own: on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TUNEWRIGHT_CACHE", str(workspace / "cache"))
            patch.setattr(store, "disk", used or Disk())
            pipeline.run(pipeline.load(recipe, [f"output={workspace / 'run'}"]), quiet=True)
    finally:
        torch.set_num_threads(threads)


def clear(workspace: Path) -> None:
    """Remove what is done with; there are hundreds."""
    shutil.rmtree(workspace)


def told(workspace: Path, since: int = 0) -> list[events.Event]:
    """The run's events after the first ``since`` bytes of their file."""
    path = workspace / "run" / "events.jsonl"
    lines = path.read_bytes()[since:].splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]


def newest_checkpoint(tree: Iterable[str]) -> int | None:
    """The step of the newest checkpoint among a workspace's paths."""
    parts = [path.split("/") for path in tree if path.endswith("/manifest.json")]
    steps = [part[4] for part in parts if part[:2] == ["run", "stages"] and part[3] == "checkpoints"]
    return max((int(name[5:]) for name in steps if name.startswith("step-")), default=None)


def is_finished(tree: Iterable[str]) -> bool:
    """Whether a workspace's run has nothing left to train."""
    return any(path.endswith("/metrics.json") for path in tree)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """So many of the items, evenly spaced, the first and the last among them."""
    if count >= len(items):
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def content(folder: Path) -> Tree:
    """All that is in a folder."""
    found = sorted(folder.rglob("*"))
    return {p.relative_to(folder).as_posix(): None if p.is_dir() else p.read_bytes() for p in found}


def lay_out(tree: Tree, folder: Path) -> Path:
    """The tree as a new folder."""
    for name, data in tree.items():
        path = folder / name
        (path if data is None else path.parent).mkdir(parents=True, exist_ok=True)
        if data is not None:
            path.write_bytes(data)
    return folder


@dataclass(frozen=True)
class Operation:
    """One change. ``data`` is what was written, or the flushed bytes of a file that a library wrote; ``holds``
    what was at ``path`` when it was renamed.
    """

    kind: str
    path: str
    target: str = ""
    data: bytes | None = None
    holds: Tree = field(default_factory=dict)


class RecordingDisk(Disk):
    """Does everything and keeps a list of it. Names of this process become those of another, as after a kill."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operations: list[Operation] = []

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix().replace(f".{os.getpid()}.", _OTHER_PROCESS)

    def _note(self, kind: str, path: Path, data: bytes | None = None) -> None:
        self.operations.append(Operation(kind, self._name(path), data=data))

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self._note("make_folder", path)

    def write(self, path: Path, pieces: Iterable[bytes]) -> None:
        data = b"".join(pieces)
        super().write(path, [data])
        self._note("write", path, data)

    def append(self, path: Path, data: bytes) -> None:
        super().append(path, data)
        self._note("append", path, data)

    def settle(self, path: Path) -> None:
        super().settle(path)
        self._note("settle", path, path.read_bytes() if path.is_file() else None)

    def rename(self, path: Path, target: Path) -> None:
        holds: Tree = content(path) if path.is_dir() else {"": path.read_bytes()}
        super().rename(path, target)
        self.operations.append(Operation("rename", self._name(path), self._name(target), holds=holds))

    def remove(self, path: Path) -> None:
        super().remove(path)
        self._note("remove", path)

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self._note("remove_folder", path)


def recorded(recipe: Path, workspace: Path) -> list[Operation]:
    """Run the recipe; all that this did to the disk."""
    disk = RecordingDisk(workspace)
    go(recipe, workspace, disk)
    return disk.operations


@dataclass(frozen=True)
class Whole:
    """A recipe, what came of it where nothing failed, and what that did to the disk."""

    lab: Lab
    recipe: Path
    outcome: dict[str, Any]
    tree: Tree
    operations: list[Operation]


def whole(folder: Path, model: Path, **choices: Any) -> Whole:
    """Run a recipe without any fault."""
    lab, workspace = Lab(folder, model), folder / "whole"
    recipe = lab.recipe(train=SHORT, **choices)
    operations = recorded(recipe, workspace)
    return Whole(lab, recipe, outcome(workspace / "run"), content(workspace), operations)
