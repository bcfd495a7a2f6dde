"""What holds a model to what it knew: one file each, a subclass of :class:`Regularizer` beside its ``Config``.

A recipe lists any number of them beside any objective.
"""

from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tunewright.core import plugins
from tunewright.core.config import Config
from tunewright.core.words import Words
from tunewright.objectives import Batch
from tunewright.recipes.schema import DataFiles


@dataclass(frozen=True)
class Facts:
    """What one weighs before choosing one; docs/objectives.md shows it."""

    idea: Words
    formula: str
    """What is added to the loss."""
    when: Words
    paper: str


Losses = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Old:
    """Data besides those that are learned: batches of one sample each, and their loss, nats a token."""

    batches: Callable[[], Iterator[Batch]]
    loss: Losses
    count: int
    """Of samples."""
    batch: Callable[[Sequence[int]], Batch]
    """Of the samples with these numbers."""


class Regularizer(ABC):
    """The contract. ``config`` is the file's own ``Config``; what a subclass leaves out does nothing."""

    facts: ClassVar[Facts]

    def __init__(self, config: Any) -> None:
        self.config = config

    wants_old: ClassVar[bool] = False
    """Whether it has to be given old data."""

    @property
    def old(self) -> DataFiles:
        """Files of old data that it looks at."""
        return ()

    def share(self) -> float:
        """The share of all samples that shall be of :attr:`old`; 0 if they are only looked at."""
        return 0.0

    def attach(self, model: Any) -> None:
        """Add to the model what is trained besides it."""

    def release(self, model: Any) -> None:
        """Take away what :meth:`attach` added, before the model is measured and saved."""

    def begin(self, start: "Start", old: Old | None) -> None:
        """Look at the model as it is before its first step; also called when a run goes on."""

    def look(self, model: Any, batches: Sequence[Batch], progress: float) -> None:
        """Called before the passes of a step, with all that :meth:`loss` will be asked of, and the share of steps done.

        The start may stand in here, but no longer once a pass has begun whose gradient is still to be made.
        """

    def penalty(self, model: Any) -> Tensor | None:
        """What is added to a step's loss, once."""
        return None

    def loss(self, model: Any, batch: Batch) -> Tensor | None:
        """What is added to a batch's loss, in its unit."""
        return None

    def figures(self) -> dict[str, float]:
        """To be told of the batch that :meth:`loss` was asked of last."""
        return {}


class Start:
    """The trained parameters of a model as they were at first, to be looked at or to stand in for those of now."""

    def __init__(self, model: Any, parameters: Mapping[str, Tensor]) -> None:
        self.model = model
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def moved(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's way from its start, fp32, with gradient."""
        for name, parameter in model.named_parameters():
            if name in self.weights:
                yield name, parameter.float() - self.weights[name].float()

    @contextmanager
    def standing_in(self, model: Any) -> Iterator[None]:
        """Within, the model computes as it did at first; no gradient may be asked for."""
        own = {name: parameter for name, parameter in model.named_parameters() if name in self.weights}
        now = {name: parameter.data for name, parameter in own.items()}
        for name, parameter in own.items():
            parameter.data = self.weights[name]
        try:
            yield
        finally:
            for name, parameter in own.items():
                parameter.data = now[name]


def create(
    choices: Iterable[Mapping[str, Any]], config: Callable[[Mapping[str, Any]], Config]
) -> list[Regularizer]:
    """Those that a stage lists."""
    return [kind(choice["name"])(config(choice)) for choice in choices]


def kind(name: str) -> type[Regularizer]:
    """The class in the regularizer's file."""
    return plugins.implementation(plugins.load("regularizers", name), Regularizer)
