"""What is left to do in a run folder, stage by stage, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunewright import drifts
from tunewright.core.errors import Problem, RecipeError, nearest
from tunewright.drifts import Work

Action = Literal["reuse", "go on", "run", "run anew", "leave"]
OLDER = "older"
"""Where results lie that were made anew."""


@dataclass(frozen=True)
class Task:
    """One stage and what becomes of it."""

    work: Work
    action: Action
    why: str

    @property
    def name(self) -> str:
        """The stage's."""
        return self.work.name

    @property
    def is_work(self) -> bool:
        """Whether its result changes, and with it what depends on it."""
        return self.action in ("go on", "run", "run anew")


@dataclass(frozen=True)
class Wish:
    """What the user asks for besides the recipe."""

    start: str = ""
    """This stage, and all that depends on it, anew."""
    only: str = ""
    """No stage but this one."""

    def check(self, names: Sequence[str]) -> None:
        """RecipeError for a stage that there is not."""
        asked = (("--from", self.start), ("--only", self.only))
        strange = [(option, name) for option, name in asked if name and name not in names]
        if strange:
            raise RecipeError(
                Problem(option, f"no stage is called {name!r}", nearest(name, names))
                for option, name in strange
            )


def tasks(
    folder: Path, todo: Sequence[Work], drift: drifts.Drift, wish: Wish, insists: bool = False
) -> list[Task]:
    """Every stage in order. A changed one is made anew, unless the user ``insists`` on going on with it.

    Raises:
        RecipeError: a stage was wished for that there is not, or that needs one that is not made.
    """
    wish.check([work.name for work in todo])
    made: dict[str, Task] = {}
    for work in todo:
        changes = [p for p in drift.get(work.name, []) if not insists and not drifts.is_tolerated(p)]
        ground = [made[name] for name in work.needs if name in made]
        made[work.name] = Task(work, *_what(work, folder / "stages" / work.name, ground, wish, changes))
    _check_ground(made)
    return list(made.values())


def _what(
    work: Work, at: Path, ground: Sequence[Task], wish: Wish, changes: Sequence[Problem]
) -> tuple[Action, str]:
    name, finished, begun = work.name, (at / "metrics.json").exists(), (at / drifts.INPUTS).exists()
    if wish.only and name != wish.only:
        return ("reuse", "finished") if finished and not changes else ("leave", "not asked for")
    anew: Action = "run anew" if begun else "run"
    if name == wish.start:
        return anew, "asked for"
    if moving := [task.name for task in ground if task.is_work]:
        return anew, f"uses {' and '.join(moving)}"
    if changes:
        return anew, "; ".join(f"{p.where.partition(': ')[2]}: {p.what}" for p in changes)
    if finished:
        return "reuse", "finished, nothing changed"
    return ("go on", "not finished") if begun else ("run", "not begun")


def _check_ground(made: dict[str, Task]) -> None:
    for task in made.values():
        for below in (made[name] for name in task.work.needs if task.is_work and name in made):
            if below.action == "leave":
                what = (
                    f"stage {task.name!r} uses {below.name!r}, of which there is no result that is up to date"
                )
                raise RecipeError(Problem("--only", what, f"run it first: --only {below.name}"))


def set_aside(folder: Path, name: str) -> Path | None:
    """Move what a stage made out of the way, under the next free number; None if there is nothing."""
    at = folder / "stages" / name
    if not at.exists():
        return None
    (folder / OLDER).mkdir(exist_ok=True)
    taken = (folder / OLDER / f"{name}.{number}" for number in range(1, 10_000))
    target = next(path for path in taken if not path.exists())
    at.rename(target)
    return target


def lines(agenda: Sequence[Task]) -> list[str]:
    """The agenda for people."""
    names, actions = (max(len(getattr(task, part)) for task in agenda) for part in ("name", "action"))
    return [f"{task.name:<{names}}  {task.action:<{actions}}  {task.why}" for task in agenda]
