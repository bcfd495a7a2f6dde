"""What is minimised: one file per objective, each a subclass of :class:`Objective` beside its ``Config``."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunewright.core import plugins
from tunewright.core.config import Config
from tunewright.core.errors import Problem
from tunewright.data.rows import Row
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import ORIGIN, TASK

Sample = dict[str, np.ndarray]
"""One-dimensional integer arrays by name; ``input_ids`` [T] is always among them, and :func:`origin` should be."""
Batch = dict[str, Tensor]


def line_of(where: str) -> int:
    """The line in a row's ``where``, ``file:line``; 0 if there is none."""
    line = where.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


def origin(where: str) -> Sample:
    """The line a sample was made from, as a field of it: messages name it."""
    return {ORIGIN: np.array([line_of(where)], np.int64)}


class Objective(ABC):
    """The contract. ``codec`` turns rows into tokens; ``config`` is the file's own ``Config``."""

    wants_conversations: bool = True
    """Whether rows must be conversations (else text rows will do)."""

    def __init__(self, config: Any, codec: ChatCodec) -> None:
        self.config = config
        self.codec = codec

    @abstractmethod
    def encode(self, rows: Iterable[Row]) -> Iterator[Sample | Problem]:
        """Samples in the rows' order; a Problem for a row that cannot be learned from."""

    @abstractmethod
    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Samples padded into one batch."""

    def batch(self, samples: Sequence[Sample], device: torch.device) -> Batch:
        """The samples padded, on the device; with ``task`` int64 [B] if any names one, 0 for those that do not."""
        batch = self.collate(samples)
        if any(TASK in sample for sample in samples):
            tasks_B = torch.tensor([int(sample[TASK][0]) if TASK in sample else 0 for sample in samples])
            batch = {TASK: tasks_B, **batch}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    @abstractmethod
    def weight(self, batch: Batch) -> float:
        """How much of the global batch this one is (supervised tokens): accumulation divides by it."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The batch's mean loss per unit of :meth:`weight`, and figures to log."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must keep for this objective: none, unless it says so."""
        return {}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave. ValueError for tensors that it did not declare."""
        if state:
            raise ValueError(f"{type(self).__name__} declares no state, found {', '.join(state)}")


def create(choice: Mapping[str, Any], config: Config, codec: ChatCodec) -> Objective:
    """The objective a stage names."""
    return kind(choice["name"])(config, codec)


def kind(name: str) -> type[Objective]:
    """The class in the objective's file."""
    return plugins.implementation(plugins.load("objectives", name), Objective)  # type: ignore[type-abstract]
