"""Speed techniques: one file each, each with a switch of its own, each proven equal to the plain path.

A technique changes how a training computes, never what: same loss and gradients, but for rounding.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tunewright.core import plugins
from tunewright.core.words import Words
from tunewright.data.tokens import LENGTH
from tunewright.models import anatomy, likelihood
from tunewright.models.announce import announced

Batch = Mapping[str, Tensor]
Seen = TypeVar("Seen")
_LOOKED_AT = 128
"""Tokens of a row that tell what a technique asks of a model."""


@dataclass(frozen=True)
class Portion:
    """How many tokens, padding included, go through the model at a time."""

    whole: int
    """Tokens of an optimizer step."""
    given: int | None
    """What the recipe says, or this run began with."""
    tried: Callable[[int], float]
    """Seconds that the passes of a step take with so many at a time; infinity if memory does not allow it."""
    take: Callable[[int], None]
    """From now on so many."""
    share: Callable[[bool], None] = lambda on: None
    """Whether tokens that all samples begin with count once, from now on."""


@dataclass(frozen=True)
class Work:
    """A training, as far as techniques look at it."""

    model: Any
    steps: int
    """Optimizer steps of the whole run, those before a kill included: a run that goes on must decide as it did then."""
    tokens: int
    """Tokens that those steps see, padding included."""
    epochs: float
    """Passes over the data in them."""
    batches: Callable[[], Iterator[Batch]]
    """All samples once, in an order that never changes: batches as the loop makes them, on the device."""
    folder: Path
    """Where what does not fit in memory can lie; it is cleared when training ends."""
    portion: Portion
    autocast: bool = False
    """Whether it computes in other numbers than its weights are held in."""
    changing: bool = False
    """Whether what a sample gives the first block is drawn anew each time."""
    answers: bool = False
    """Whether a batch has several answers to one question."""
    found: dict[str, bool] = field(default_factory=dict, compare=False)
    """What was found out by passes of the model, so that no technique makes them again."""

    @cached_property
    def plainly(self) -> "Plain":
        """Two short rows before any technique is on."""
        return look(self, lambda batch: Plain.of(self.model, batch), rows=2)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device


@dataclass(frozen=True)
class Plain:
    """What the model makes of a few tokens the plain way, by one pass that other ways are compared with."""

    batch: Batch
    looked: likelihood.Looked
    close: float

    @classmethod
    def of(cls, model: Any, batch: Batch) -> "Plain":
        """Of few of its labels; the model has an output layer."""
        few = likelihood.thinned(batch)
        close = 1e-4 if model.dtype == torch.float32 else 5e-2
        return cls(few, likelihood.looked_through(model, few), close)

    def agrees(self, losses_N: Tensor) -> bool:
        """Whether another way's losses are these, but for rounding."""
        return torch.allclose(losses_N, self.looked.losses_N, rtol=self.close, atol=self.close)


class Technique(ABC):
    """The contract. A file in this folder holds one; its name is its switch in a recipe's ``fast``."""

    idea: Words
    """What it does, in a sentence."""
    last: bool = False
    """Whether it measures, and so comes after all others."""

    @abstractmethod
    def why_not(self, work: Work) -> str:
        """Why it can do nothing here; empty if it can."""

    def not_worth(self, work: Work) -> str:
        """Why it would cost more than it gives; a recipe that asks for it by name is not told so. Empty if it pays.

        It is asked before :meth:`why_not`, which may take passes of the model.
        """
        return ""

    @abstractmethod
    def on(self, work: Work) -> AbstractContextManager[object]:
        """While it is entered, the model computes this way; afterwards the plain way again."""

    def off(self, work: Work) -> AbstractContextManager[object]:
        """While it is entered, the model computes the plain way: for what is on outside of training as well."""
        return nullcontext()


Switches = bool | Mapping[str, bool]
"""All that pay, or none; or some of them by name, and of the others those that pay."""


def names() -> list[str]:
    """The names of all techniques, in the order in which they are begun."""
    return sorted(plugins.names("fast"), key=lambda name: (technique(name).last, name))


def technique(name: str) -> Technique:
    """The one of that name."""
    kind = plugins.implementation(plugins.load("fast", name), Technique)  # type: ignore[type-abstract]
    return kind()


def reasons(switches: Switches, work: Work) -> dict[str, str]:
    """For every technique why it is off, and nothing for one that is on.

    A technique that is asked for by name is on wherever it can do anything at all.
    """
    return {name: _reason(name, switches, work) for name in names()}


def _reason(name: str, switches: Switches, work: Work) -> str:
    chosen = None if switches is True else switches and switches.get(name)
    if chosen is False:
        return "switched off"
    found = technique(name)
    return ("" if chosen else found.not_worth(work)) or found.why_not(work)


@contextmanager
def using(switches: Switches, work: Work, told: Callable[[dict[str, str]], object]) -> Iterator[None]:
    """Train with the techniques that are on; ``told`` hears of all of them, as :func:`reasons` has them."""
    found = reasons(switches, work)
    told(found)
    with ExitStack() as stack:
        for name, reason in found.items():
            one = technique(name)
            stack.enter_context(one.off(work) if reason else one.on(work))
        yield


def look(work: Work, compute: Callable[[Batch], Seen], rows: int = 1) -> Seen:
    """What ``compute`` makes of the shortest of the first rows, for a technique that watches or compares; of long ones
    there is no more than shows some labels.

    Nothing is learned or random in it.
    """
    batch = _shortest(next(work.batches()), rows)
    with quietly(work.model, batch):
        return compute(batch)


@contextmanager
def quietly(model: Any, batch: Batch) -> Iterator[None]:
    """Passes of this batch within learn nothing, and draw nothing."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), announced(model, batch):
            yield
    finally:
        model.train(training)


def through(model: Any, batch: Batch) -> None:
    """Let them go through the model, for who watches it."""
    if anatomy.output_head(model) is None:
        model(input_ids=batch["input_ids"], use_cache=False)
    else:  # logits of a row may take more than training does
        likelihood.hidden_states(model, batch)


def _shortest(batch: Batch, rows: int) -> Batch:
    """So many of its rows, a single one repeated, without what pads them only beside longer ones, or comes long after
    their first labels.
    """
    if LENGTH not in batch:
        return {name: tensor[:rows] for name, tensor in batch.items()}
    shape = batch["input_ids"].shape
    order = batch[LENGTH].argsort(stable=True)
    chosen = (order.repeat(rows) if len(order) == 1 else order)[:rows].sort().values
    longest = min(int(batch[LENGTH][chosen].max()), _enough(batch["labels"][chosen]))

    def cut(tensor: Tensor) -> Tensor:
        if len(tensor) != shape[0]:  # what a batch has of pairs, not of rows
            return tensor[:rows]
        return tensor[chosen][:, :longest] if tensor.shape == shape else tensor[chosen]

    return {name: cut(tensor) for name, tensor in batch.items()} | {
        LENGTH: batch[LENGTH][chosen].clamp(max=longest)
    }


def _enough(labels_BT: Tensor) -> int:
    """Tokens of these rows of which each has a label, if it has any in the whole."""
    learned_BT = labels_BT != likelihood.IGNORED
    first_B = torch.where(learned_BT.any(1), learned_BT.int().argmax(1), labels_BT.shape[1])
    return max(_LOOKED_AT, int(first_B.max()) + _LOOKED_AT // 4)
