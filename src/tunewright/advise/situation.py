"""What is to be decided about: a model, data, devices and what one wants of them."""

from dataclasses import dataclass, field

from tunewright.advise.facts import Facts
from tunewright.advise.hardware import Fleet
from tunewright.advise.shape import Shape

GOALS = ("quality", "speed", "memory", "multi-task", "alignment")

_TEMPLATE, _STEP = 40, 32
"""Tokens that chat templates add to a row with few turns; lengths are multiples of the other."""
_FAR = 4


@dataclass(frozen=True)
class Given:
    """Dials that are no longer open; 0 or nothing where they are."""

    epochs: float = 0.0
    steps: int = 0
    """Of the optimizer; they count in place of epochs."""
    batch: int = 0
    """Tokens of an optimizer step."""
    length: int = 0
    """Tokens that rows are cut at."""
    precision: str = ""


@dataclass(frozen=True)
class Situation:
    """All that advice is made from."""

    model: str
    shape: Shape
    fleet: Fleet
    data: Facts
    goal: str = ""
    """One of :data:`GOALS`, or none."""
    deadline: float = 0.0
    """Seconds that training may take; 0 is as long as it needs."""
    objective: str = ""
    """What a recipe asks for; without it the data decides."""
    given: Given = field(default_factory=Given)

    @property
    def length(self) -> int:
        """Tokens that a row is cut at, the chat template's own included, within the model's context."""
        if self.given.length:
            return max(8, min(self.shape.context, self.given.length, self._whole(self.data.longest)))
        wanted = self.data.longest if self.keeps_all else self.data.p95
        return max(8, min(self.shape.context, self._whole(wanted)))

    def _whole(self, wanted: int) -> int:
        """A row of the data's, as the model reads it."""
        if self.data.assumed:
            return wanted
        return -(-(wanted + _TEMPLATE) // _STEP) * _STEP

    @property
    def keeps_all(self) -> bool:
        """Whether no row is cut: the longest is not far longer than nearly all."""
        return self.data.longest <= min(_FAR * self.data.p95, self.shape.context - _TEMPLATE)

    @property
    def memory_over_weights(self) -> float:
        """Memory of all devices as a multiple of the weights in 16 bits."""
        return self.fleet.memory / (2 * self.shape.parameters)
