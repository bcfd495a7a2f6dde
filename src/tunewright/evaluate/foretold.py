"""What the advisor foretold of a stage, beside what came."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.core.units import human_bytes, human_count, human_seconds

Tree = dict[str, Any]
_SAME = 0.005
"""Errors below this are none."""


@dataclass(frozen=True)
class Figure:
    """Foretold and measured, in the same unit."""

    name: str
    foretold: float
    measured: float
    say: Callable[[float], str]

    @property
    def error(self) -> float:
        """Of what was foretold, as a share of what was measured."""
        return self.foretold / self.measured - 1 if self.measured else 0.0

    @property
    def words(self) -> str:
        """``4 % too high``."""
        if abs(self.error) < _SAME:
            return "exact"
        return f"{abs(self.error):.0%} too {'high' if self.error > 0 else 'low'}"


@dataclass(frozen=True)
class Advice:
    """Why the stage is as it is, and how well it was foretold."""

    why: Sequence[str]
    figures: Sequence[Figure]
    tried: int
    """Real steps that the figures come from; 0 where they were computed."""

    @property
    def summary(self) -> str:
        """What the figures say together."""
        worst = max(self.figures, key=lambda figure: abs(figure.error))
        source = (
            f"{self.tried} real steps before the run" if self.tried else "the shapes alone, nothing was tried"
        )
        return (
            f"It was foretold from {source}. Farthest off was {worst.name.lower()}: {worst.say(worst.foretold)} foretold, "
            f"{worst.say(worst.measured)} measured, {worst.words}."
        )


def of(stage: Tree) -> Advice:
    """From the results of a stage that was advised."""
    told, train = stage["advised"], stage["train"]
    figures = [
        Figure("Peak memory", told["memory"], train["peak_memory"], human_bytes),
        Figure("Tokens per second", told["tokens_per_second"], train["tokens_per_second"], human_count),
        Figure("Training time", told["seconds"], train["seconds"], human_seconds),
    ]
    return Advice(told["why"], figures, told["tried"])
