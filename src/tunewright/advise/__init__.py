"""Which method fits the model, the data and the hardware, computed before anything runs. Nothing here needs torch,
but for measuring the machine at hand.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.advise import advice, past, recipe
from tunewright.advise.plan import Plan, plans
from tunewright.advise.question import Question, about, ask
from tunewright.core import store
from tunewright.core.errors import Problem, UserError
from tunewright.core.units import human_bytes

__all__ = ["Answer", "answer", "answer_about"]


@dataclass(frozen=True)
class Answer:
    """Plans for what was asked, best first."""

    question: Question
    plans: tuple[Plan, ...]

    def lines(self, language: str) -> list[str]:
        """For people, ``en`` or ``zh``."""
        return advice.lines(self.question.situation, self.plans, language)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return advice.to_json(self.question.situation, self.plans)

    def stage(self) -> dict[str, Any]:
        """The best plan as a stage of a recipe. UserError where none can be made of it."""
        return recipe.tree(self.question, self.plans[0])

    def write(self, path: Path, language: str) -> None:
        """The recipe of the best plan. UserError where a recipe cannot be made of it, or would not fit in memory."""
        if not self.plans[0].fits:
            raise UserError(self._too_large())
        store.write_text(path, recipe.text(self.question, self.plans[0], language, f"runs/{path.stem}"))

    def _too_large(self) -> Problem:
        """Nothing fits: what takes the least, and what there is."""
        least = min(self.plans, key=lambda plan: plan.memory)
        free = human_bytes(self.question.situation.fleet.device.memory)
        what = (
            f"no plan fits in {free} with some of it left free; {least.method} takes the least,"
            f" {human_bytes(least.memory)}"
        )
        return Problem("memory", what, "use a smaller model or shorter rows, or free more memory")


def answer(file: str, pairs: Iterable[str]) -> Answer:
    """Advice for a recipe file (or none) and ``key=value`` pairs. UserError with every problem."""
    return _answer(ask(file, pairs))


def answer_about(stage: Mapping[str, Any], own: Mapping[str, str]) -> Answer:
    """Advice on what a stage, as a recipe has it, leaves open. UserError with every problem."""
    return _answer(about(stage, own))


def _answer(question: Question) -> Answer:
    situation = question.situation
    measured = (
        past.measured(question.runs, situation.model, situation.data.sha256) if situation.data.sha256 else {}
    )
    return Answer(question, tuple(plans(situation, measured)))
