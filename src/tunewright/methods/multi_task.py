"""Multi-task LoRA: one frozen base, one adapter for each task, all trained in one run."""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from safetensors.torch import load_file
from torch import Tensor

from tunewright.core.errors import ModelError, Problem, nearest
from tunewright.core.words import Words
from tunewright.data.rows import task_id
from tunewright.data.tokens import TASK
from tunewright.methods import Facts, _adapter
from tunewright.methods._mixture import Groups, MixtureConfig, MixtureMethod, Name, Router, one_each, save_one
from tunewright.methods._own import Tensors
from tunewright.recipes import DataConfig


class Config(MixtureConfig):
    """The tasks and the shape of each one's adapter."""

    tasks: tuple[Name, ...] = Field(("default",), min_length=1)
    """The tasks; each file of data.train names its own with `task`. Rows of no task belong to the first."""

    @field_validator("tasks")
    @classmethod
    def _apart(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len({task.casefold() for task in tasks}) < len(tasks):
            raise ValueError("a task is named twice, and each has a folder of its own")
        return tasks


class TaskRouter(Router):
    """Goes by the task that a batch announces for its rows."""

    def groups(self, model: Any, ids_BT: Tensor, real_BT: Tensor) -> Groups:
        """One adapter a row; the first for rows of no task."""
        tasks_B = self.batch.get(TASK, torch.zeros(len(ids_BT), dtype=torch.int64)).to(ids_BT.device)
        if len(tasks_B) != len(ids_BT):
            raise ValueError(f"{len(ids_BT)} rows, and the tasks of {len(tasks_B)}")
        known_K = torch.tensor([task_id(name) for name in self.names], device=ids_BT.device)
        hit_BK = tasks_B[:, None] == known_K
        if not (hit_BK.any(1) | (tasks_B == 0)).all():
            what = "a row is of a task that the adapter was not trained on"
            raise ModelError(Problem("data.task", what, f"one of {', '.join(self.names)}"))
        return one_each(hit_BK.int().argmax(1), len(self.names))


class MultiTask(MixtureMethod):
    """Rows train the adapter of their task only; batches may hold rows of many."""

    default_lr = 2e-4
    facts = Facts(
        idea=Words(
            "Each task has a LoRA of its own over one frozen base; a row trains and uses its task's only.",
            "每个任务在同一个冻结基座上有自己的 LoRA；每行数据只训练、只使用本任务的适配器。",
        ),
        formula="h = W·x + (α/r)·B_t·A_t·x for rows of task t",
        count="Σ K·r·(in + out) over adapted layers, for K tasks",
        inference=Words(
            "one low-rank product in each adapted layer; none once a task's folder is merged",
            "每个被适配的层多一次低秩乘法；把某个任务的文件夹合并后无额外开销",
        ),
        when=Words(
            "Tasks that would disturb one another in a single adapter; each is saved as an ordinary LoRA.",
            "任务放在同一个适配器里会互相干扰时；每个任务都存成普通的 LoRA。",
        ),
        paper="Hu et al. 2021, arXiv:2106.09685",
        keeps_apart=Words(
            "the tasks share a base and each changes it in its own way; export the folder of one task instead",
            "各任务共用一个基座，改法各不相同；请改为导出某一个任务的文件夹",
        ),
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks."""
        return tuple(self.config.tasks)

    def router(self, model: Any) -> Router:
        """By the announced tasks."""
        return TaskRouter(self.names, self.config)

    def data_problems(self, data: DataConfig) -> list[Problem]:
        """Files of tasks that there are not, or of none among several; tasks without a file."""
        found: list[Problem] = []
        for split, files in (("train", data.train), ("valid", data.valid)):
            for i, file in enumerate(files):
                if file.task not in self.names and (file.task or len(self.names) > 1):
                    what = f"there is no task {file.task!r} in method.tasks" if file.task else "names no task"
                    fix = f"{nearest(file.task, self.names)}, or add it to method.tasks"
                    found.append(Problem(f"data.{split}.{i}.task", what, fix))
        learned = {file.task or self.names[0] for file in data.train}
        what, fix = "no file of data.train is of the task {!r}", "give a file that task, or drop it"
        unlearned = [name for name in self.names if name not in learned]
        return found + [Problem("method.tasks", what.format(name), fix) for name in unlearned]

    def export(self, model: Any, folder: Path) -> None:
        """For each task a folder that PEFT loads; and which tasks there are."""
        for k, task in enumerate(self.names):
            (folder / task).mkdir()
            save_one(model, k, folder / task)
        self.describe(model, folder)

    def header(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Of all tasks' files."""
        found = ((k, _adapter.header(folder / task)) for k, task in enumerate(self.names))
        return {_own(name, k): entry for k, header in found for name, entry in header.items()}

    def read(self, folder: Path) -> Tensors:
        """All tasks' weights."""
        found = ((k, load_file(folder / task / _adapter.WEIGHTS)) for k, task in enumerate(self.names))
        return {_own(name, k): tensor for k, tensors in found for name, tensor in tensors.items()}


def _own(name: str, task: int) -> str:
    """The parameter's name in the model from its name in a task's file."""
    return f"{name.removeprefix(_adapter.PREFIX).removesuffix('.weight')}.{task}"
