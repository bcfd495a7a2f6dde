"""How weights move along their gradients: one file per optimizer, each a subclass of :class:`Optimizer`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tunewright.core import plugins
from tunewright.core.config import Config
from tunewright.core.words import Words


@dataclass(frozen=True)
class Facts:
    """What one weighs before choosing an optimizer."""

    idea: Words
    bytes_per_parameter: float
    """Of its state, for a large matrix; the fp32 master and the gradient come on top."""
    paper: str


class Optimizer(ABC):
    """The contract: a torch optimizer over fp32 masters, and its state as it is before the first step.

    State is tensors only, by fixed names, so that it can be saved and a run goes on bit for bit.
    """

    facts: ClassVar[Facts]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def make(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer:
        """A torch optimizer over groups of ``params`` with their ``weight_decay``."""

    @abstractmethod
    def start(self, master: Tensor) -> dict[str, Tensor]:
        """The state of one master before its first step, all memory that it will ever need."""


def create(choice: Mapping[str, Any], config: Config) -> Optimizer:
    """The optimizer a stage names."""
    module = plugins.load("optimizers", choice["name"])
    return plugins.implementation(module, Optimizer)(config)  # type: ignore[type-abstract]
