"""What is minimised: one file per objective, each a subclass of :class:`Objective` beside its ``Config``."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from tunewright.core import plugins
from tunewright.core.config import Config
from tunewright.core.errors import Problem
from tunewright.core.words import Words
from tunewright.data.rows import Row
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import ORIGIN, TASK

Sample = dict[str, np.ndarray]
"""One-dimensional integer arrays by name; ``input_ids`` [T] is always among them, and :func:`origin` should be."""
Batch = dict[str, Tensor]
Wants = Literal["texts", "conversations", "pairs", "verdicts", "labels"]
"""Running text; answers to learn; a better and a worse answer; an answer with a verdict on it; a text with its class."""


@dataclass(frozen=True)
class Facts:
    """What one weighs before choosing an objective; docs/objectives.md shows it."""

    idea: Words
    formula: str
    """What is minimised."""
    dials: Words
    """Which options matter, and which way."""
    watch: Words
    """The figures that tell whether it goes well."""
    when: Words
    paper: str


def line_of(where: str) -> int:
    """The line in a row's ``where``, ``file:line``; 0 if there is none."""
    line = where.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


def origin(where: str) -> Sample:
    """The line a sample was made from, as a field of it: messages name it."""
    return {ORIGIN: np.array([line_of(where)], np.int64)}


@dataclass(frozen=True)
class Turn:
    """The step under way, for an objective that draws answers of its own: all randomness comes from it."""

    step: int
    seed: int


OTHERS = ("stage:", "model:")
"""How names of other models begin: an earlier stage's result, or a folder's that holds one."""


@dataclass(frozen=True)
class Other:
    """Another model that an objective asks."""

    name: str
    """``stage:NAME`` or ``model:FOLDER``: it begins as one of :data:`OTHERS`."""
    place: str
    """Where the recipe names it."""
    speaks: bool = False
    """Whether it is asked for words, which must be the model's own; otherwise it is a reward model."""


class Objective(ABC):
    """The contract. ``codec`` turns rows into tokens; ``config`` is the file's own ``Config``."""

    facts: ClassVar[Facts]
    wants: ClassVar[Wants] = "conversations"
    """What rows it learns from."""
    needs_start: ClassVar[bool] = False
    """Whether it asks the model as it was at first, by :attr:`start`."""
    start: Any = None
    speaks: ClassVar[bool] = True
    """Whether the model shall answer questions afterwards, and is asked some before and after."""
    rows: int = 1
    """Rows of a batch that a sample becomes: first one of each sample, then the next."""
    is_likelihood: bool = False
    """Whether the loss is nats a token, so that perplexity can be told of it."""

    def __init__(self, config: Any, codec: ChatCodec) -> None:
        self.config = config
        self.codec = codec
        self.asked: dict[str, Any] = {}
        """What :meth:`others` names: a judge that is called with answers, or what gives a speaker; the stage's run sets it."""

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

    @property
    def reuse(self) -> int:
        """Steps that learn from the same samples, one after another."""
        return 1

    def sizes(self, lengths_N: np.ndarray) -> np.ndarray:
        """How many tokens go through the model to learn from samples of these lengths."""
        return lengths_N

    def others(self) -> list[Other]:
        """Other models that it asks."""
        return []

    def attach(self, model: Any) -> None:
        """Add to the model what is trained besides it."""

    def release(self, model: Any) -> None:
        """Take away what :meth:`attach` added, before the model is measured and saved."""

    def explore(self, model: Any, samples: list[Sample], turn: Turn) -> list[Sample]:
        """What is learned from instead of the samples, if the model itself has to answer first."""
        return samples

    @property
    def explores(self) -> bool:
        """Whether it learns from answers that are drawn: samples are only questions then."""
        return False

    @property
    def is_changing(self) -> bool:
        """Whether what a sample gives the first block is drawn anew each time."""
        return False

    def look(self, model: Any, batches: Sequence[Batch]) -> None:
        """Look at all of what :meth:`loss` will be asked of in parts: a step's batches, or the held-out ones.

        For what is a figure of the whole, and must not depend on how large the parts are.
        """

    def judged(self, model: Any, samples: list[Sample]) -> dict[str, float]:
        """For one that explores: ``loss`` and figures of the model's answers to held-out samples."""
        raise NotImplementedError

    def told(self, figures: dict[str, float]) -> dict[str, float]:
        """What to tell of the means of :meth:`loss`'s figures over all held-out samples."""
        return figures

    def begin(self, model: Any, batches: Iterable[Batch]) -> None:
        """Look at the model before the first step, and at all data it will learn from or be measured on.

        ``batches`` may be gone through more than once; they are made anew each time.
        """

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
