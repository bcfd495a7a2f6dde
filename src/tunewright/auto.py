"""``method: auto``: what a recipe leaves open is chosen when its run begins, and why stays with the run."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright import advise, jobs, recipes
from tunewright.core import store
from tunewright.core.errors import RecipeError, UserError
from tunewright.recipes import EARLIER, Auto
from tunewright.recipes.reading import read_file

Tree = dict[str, Any]


@dataclass(frozen=True)
class Advisor:
    """What ``recipes.load`` asks. A run that was begun keeps the answer that it began with, unless it is ``fresh``."""

    fresh: bool = False
    tell: Callable[[str], None] = lambda line: None
    dry: bool = False
    """Whether nothing may be tried."""

    def __call__(self, stages: Sequence[Tree], place: int, options: Auto, output: str) -> Tree:
        """The stage at ``place`` with a method, and with all dials that it left open.

        Raises:
            UserError: all that is wrong with model and data, or with the options of ``auto``.
        """
        stage = stages[place]
        question = store.sha256_json({key: value for key, value in stage.items() if key != "evaluate"})
        known = None if self.fresh else _known(Path(output) / "recipe.yaml", question)
        if known:
            return known
        # a stage that goes on from an earlier one has that one's shape, and cannot be tried before there is one
        goes_on = str(stage.get("model", "")).startswith(EARLIER)
        base = {**stage, "model": stages[0].get("model")} if goes_on else stage
        if found := [*jobs.output_problems(output), *jobs.look([base])]:  # before anything is tried
            raise UserError(found)
        own = {key: value for key in ("goal", "memory", "deadline") if (value := getattr(options, key))}
        answer = advise.answer_about(base, {**own, "runs": str(Path(output).parent)})
        if options.tries and not goes_on and not self.dry:
            from tunewright.probe import probed

            answer = probed(answer, self.tell, options.tries, options.rates)
        made = answer.stage()
        made["advised"]["question"] = question
        return {**made, "model": stage["model"]}


def _known(path: Path, question: str) -> Tree | None:
    """The stage of an earlier run of the same question."""
    if not path.is_file():
        return None
    with suppress(RecipeError):  # damaged: it is asked anew
        for stage in recipes.load(read_file(path)).stages:
            if stage.advised and stage.advised.question == question:
                return stage.model_dump(mode="json")
    return None
