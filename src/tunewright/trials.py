"""Trials of a comparison: each an ordinary run in a process of its own, reused when finished, gone on with when not.

A process of its own makes peak memory the trial's alone, and a trial's death a row with its reason. Training that
stops by the clock would come out differently each time; so a budget becomes a number of steps, once for each
variant: a run of a few steps is timed, and the number that fits is kept in ``plan.json``, which holds for ever.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tunewright import children, drifts
from tunewright.core import events, store
from tunewright.core.errors import DamagedError, Problem, UserError
from tunewright.jobs import Job
from tunewright.recipes import Recipe, to_yaml
from tunewright.variants import Trial, Variant

Tree = dict[str, Any]
Tell = Callable[[str], None]
_PROBED = 6
"""Steps that are timed; the first ones, which also warm up, count as what a run takes besides its steps."""
_COLD = 2
_PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """How long each variant trains, by its name; nothing if the recipe says it."""

    folder: Path
    budget: float
    """Seconds of training for each trial; 0 if there is none."""
    steps: Mapping[str, int]

    def recipe(self, trial: Trial) -> Recipe:
        """Of the trial's run."""
        length: Tree = {"max_steps": self.steps[trial.variant.name]} if self.budget else {}
        return trial.variant.at(str(place(self.folder, trial)), seed=trial.seed, **length)


def place(folder: Path, trial: Trial) -> Path:
    """The trial's run folder."""
    return folder / "trials" / trial.name


def run_all(plan: Plan, trials: Sequence[Trial], refused: Mapping[str, str], tell: Tell) -> dict[str, str]:
    """Make every trial that is not there; why each that failed did, by its name.

    ``refused`` are variants that cannot be tried, with the reason. A signal ends the trial that runs, with a
    checkpoint, and all of it.
    """
    failed: dict[str, str] = {}
    for number, trial in enumerate(trials, 1):
        told = f"[{number}/{len(trials)}] {trial.variant.name}, seed {trial.seed}"
        at = place(plan.folder, trial)
        reason = refused.get(trial.variant.name, "")
        if not reason and is_finished(at):
            tell(f"{told}: finished before")
            continue
        if not reason:
            tell(f"{told}: training")
            reason = run(plan.recipe(trial), plan.folder, trial.name)
        if reason:
            failed[trial.name] = reason
            tell(f"{told}: failed: {reason}")
    return failed


def is_finished(run: Path) -> bool:
    """Whether a run came to its end and what it found can be read."""
    try:
        return (run / "results.json").exists() and store.read_record(run / "results.json")[
            "status"
        ] == "finished"
    except DamagedError:
        return False


def run(recipe: Recipe, folder: Path, name: str, *options: str) -> str:
    """Run a recipe in a child process; why it failed, or nothing. What it says of itself goes to ``logs/``."""
    return children.run(to_yaml(recipe), folder, name, *options)


def planned(folder: Path, variants: Sequence[Variant], budget: float) -> Plan:
    """What ``plan.json`` says already.

    Raises:
        UserError: the folder was begun with another budget, or measures something else.
    """
    path, asked = folder / _PLAN, _asked(variants, budget)
    if not path.exists():
        return Plan(folder, budget, {})
    known = store.read_record(path)
    if changed := [key for key in asked if known.get(key) != asked[key]]:
        raise UserError(
            Problem(f"--out: {key}", f"{folder} was begun with {known.get(key)!r}, now it is {asked[key]!r}", "give another --out")
            for key in changed
        )  # fmt: skip
    return Plan(folder, budget, known["steps"])


def _asked(variants: Sequence[Variant], budget: float) -> Tree:
    measured = variants[0].recipe.stages[0].evaluate.model_dump(mode="json")
    return {"budget": budget, **{f"evaluate.{key}": value for key, value in measured.items()}}


def plan(begun: Plan, variants: Sequence[Variant], tell: Tell) -> tuple[Plan, dict[str, str]]:
    """How long each variant trains, timed now unless it is known; and why variants failed to be timed."""
    folder, budget = begun.folder, begun.budget
    steps, failed = dict(begun.steps), dict[str, str]()
    _keep(begun, variants)
    for variant in variants if budget else ():
        if variant.name in steps:
            continue
        tell(f"timing {variant.name}")
        at = folder / "timing" / variant.folder
        probe = variant.at(str(at), evaluated=False, max_steps=_PROBED, save_every=0, eval_every=0)
        if reason := "" if is_finished(at) else run(probe, folder, f"timing-{variant.folder}", "--fresh"):
            failed[variant.name] = reason
            continue
        steps[variant.name] = fitting_steps(list(events.read(at / "events.jsonl")), budget)
        tell(f"timing {variant.name}: {steps[variant.name]:,} steps fit")
        _keep(Plan(folder, budget, steps), variants)
    return Plan(folder, budget, steps), failed


def _keep(plan: Plan, variants: Sequence[Variant]) -> None:
    store.write_record(plan.folder / _PLAN, {**_asked(variants, plan.budget), "steps": plan.steps})


def fitting_steps(log: Sequence[events.Event], budget: float) -> int:
    """How many steps fit ``budget`` seconds by a timed run's events: at least one."""
    began = next(event["time"] for event in log if event["kind"] == "train")
    times = [event["time"] for event in log if event["kind"] == "step"][_COLD - 1 :]
    each = max(statistics.median(after - before for before, after in pairwise(times)), 1e-6)
    return max(1, _COLD + int((budget - (times[0] - began)) / each))


@dataclass(frozen=True)
class _Begun:
    """A trial as what its folder is compared with."""

    name: str
    inputs: Tree
    needs = ()


def check_begun(plan: Plan, trials: Sequence[Trial], jobs: Mapping[str, Job]) -> None:
    """UserError, naming trials and fields, if the folder has trials of other data, recipe or versions."""
    found: list[Problem] = []
    ground: dict[str, Tree] = {}
    for trial in trials:
        if not drifts.is_begun(at := place(plan.folder, trial)) or (
            plan.budget and trial.variant.name not in plan.steps
        ):
            continue
        name = trial.variant.name
        if name not in ground:  # once for all seeds: it reads every byte of the base
            ground[name] = jobs[name].inputs
        train = plan.recipe(trial).stages[0].train.model_dump(mode="json", exclude={"keep"})
        work = _Begun(jobs[name].name, {**ground[name], "train": train})
        differences = drifts.between(at, [work], allow=True).get(work.name, [])
        found += [replace(p, where=f"{trial.name}: {p.where.partition(': ')[2]}", fix="give another --out")
                  for p in differences if not drifts.is_tolerated(p)]  # fmt: skip
    if found:
        raise UserError(found)
