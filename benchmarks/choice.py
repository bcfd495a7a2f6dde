"""How good the advisor's choice is: ``python -m benchmarks.choice`` tries every method on the tasks of choice.yaml.

Each trial is an ordinary run at the dials that advice writes for its method, and as many steps as all others. First what
advice chooses, then every method that it can choose at its rate, then the best at other rates, then all other methods.
It goes on where it was stopped; what there is so far is kept in choice.json after each round, which docs/advice.md shows, and
is not tried again while task, data and dials are the same.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks import choice_data, models
from tunewright import advise, methods, probe, recipes, trials
from tunewright.advise import recipe as advised
from tunewright.advise.plan import Plan
from tunewright.advise.trained import FAMILIES
from tunewright.core import plugins, store
from tunewright.recipes.schema import TrainConfig
from tunewright.variants import Trial, Variant

Tree = dict[str, Any]
HERE = Path(__file__).parent
FOLDER = Path("runs/benchmarks/choice")
RESULTS = HERE / "choice.json"
GROUPS = ("tuned", "seen", "fresh")
LEFT_OUT = {
    "scratch": "begins from random weights",
    "multi_task": "needs rows of several tasks",
    "peft": "stands for methods of another library by their names",
}
_ASKED = ("warmup",)
"""Dials of training that rules ask for."""


@dataclass(frozen=True)
class Task:
    """Data and a model with what they are asked about."""

    name: str
    group: str
    spec: Tree
    fixtures: Path

    @cached_property
    def answer(self) -> advise.Answer:
        """Advice as a user gets it who has measured nothing yet."""
        model = str(self.spec["model"])
        model = model if model.startswith("builtin:") else str(self.fixtures / model)
        data = self.spec.get("data") or choice_data.held(FOLDER / "data", self.spec["rows"], self.fixtures)
        pairs = [f"model={model}", *(f"data.{key}={value}" for key, value in data.items())]
        return advise.answer("", [*pairs, f"runs={FOLDER / 'nothing'}"])

    @property
    def best(self) -> Plan:
        """What advice puts first."""
        return self.answer.plans[0]

    @cached_property
    def folder(self) -> Path:
        """Of its trials, which are those of this data, batch and length; all else is in their names."""
        spec = {key: self.spec.get(key) for key in ("model", "steps")}
        question, choice = self.answer.question, self.best.choice
        dials = [spec, question.situation.data.sha256, self.best.batch, choice.length, choice.objective]
        return FOLDER / f"{self.name}-{store.sha256_json(dials)[:8]}"

    @cached_property
    def kept(self) -> Tree:
        """The row of choice.json, if it is of the same question; else nothing."""
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        return next((row for row in rows if row["question"] == self.folder.name), {})

    @property
    def own(self) -> Trial:
        """What ``advise --probe`` puts first: the rate is that of a range test, kept beside the trials."""
        path = self.folder / "rate.json"
        if not path.exists() and self.kept:
            store.write_record(path, {"factor": _rate(self.kept["advised"]) / _rate(self.kept["computed"])})
        if not path.exists():
            asked = replace(
                self.best, hours=self.spec["steps"] * self.best.batch / self.best.tokens_per_second / 3600
            )
            found = probe.rated(
                replace(self.answer, plans=(asked,)), lambda told: print(f"{self.name} {told}", flush=True)
            )
            store.write_record(path, {"factor": found.plans[0].lr / asked.lr})
        return self.trial(self.best.method, store.read_record(path)["factor"])

    def trial(self, method: str, factor: float = 1.0) -> Trial:
        """A method at its dials and ``factor`` times its rate."""
        tree = self._recipe(method)
        lr = float(f"{tree['train']['lr'] * factor:.2g}")
        tree["train"] |= {"lr": lr, "max_steps": self.spec["steps"], "save_every": 0}
        tree["evaluate"] = {"generate": False}
        options = [f"{key} {value}" for key, value in tree["method"].items() if key != "name"]
        options += [f"{key} {value:g}" for key, value in tree["train"].items() if key in _ASKED]
        name = ", ".join([method, *options, f"lr {lr:g}"])
        return Trial(Variant(name, recipes.load(tree)), 0)

    def _recipe(self, method: str) -> Tree:
        """As ``advise --apply`` writes it; a method that advice does not know takes LoRA's dials and its own rate."""
        plans = {plan.method: plan for plan in self.answer.plans}
        known = plans.get(method, plans["lora"])
        tree: Tree = yaml.safe_load(advised.text(self.answer.question, known, "en", str(self.folder)))
        if method not in plans:
            tree["method"] = {"name": method}
            scale = known.lr / FAMILIES["lora"].lr
            tree["train"]["lr"] = methods.kind(method).default_lr * scale
        return tree

    def run(self, trial: Trial) -> None:
        """Unless it is there; one that fails is left out of the table, with its reason told."""
        if self.found(trial):
            return
        plan = trials.Plan(self.folder, 0.0, {})
        trials.run_all(plan, [trial], {}, lambda told: print(f"{self.name} {told}", flush=True))

    def found(self, trial: Trial) -> Tree | None:
        """What came of a finished trial, now or earlier."""
        stage = trial.variant.recipe.stages[0]
        name = _name(stage.method, stage.train.model_dump())
        earlier = (one for one in self.kept.get("ranked", ()) if one["name"] == name)
        return self._found(trials.place(self.folder, trial)) or next(earlier, None)

    def tried(self) -> list[Tree]:
        """All that was ever tried, also at rates that advice had before its rules were changed; the best first."""
        found = {one["name"]: one for one in self.kept.get("ranked", ())}
        now = (self._found(at) for at in sorted(self.folder.glob("trials/*")))
        found |= {one["name"]: one for one in now if one}
        return sorted(found.values(), key=lambda one: one["loss"])

    def _found(self, at: Path) -> Tree | None:
        if not trials.is_finished(at):
            return None
        stage = store.read_record(at / "results.json")["stages"][0]
        after, method = stage["after"], stage["method"]
        return {
            "name": _name(method, stage["train_config"]), "method": method["name"], "loss": after["loss"],
        }  # fmt: skip


def _name(method: Tree, train: Tree) -> str:
    """As the table has it."""
    dials = [method["name"], *([f"rank {method['rank']}"] if "rank" in method else [])]
    dials += [f"{key} {train[key]:g}" for key in _ASKED if train[key] != getattr(TrainConfig(), key)]
    return ", ".join([*dials, f"lr {train['lr']:g}"])


def _rate(one: Tree) -> float:
    """Of a trial by its name."""
    return float(one["name"].rpartition(" ")[2])


def planned(task: Task) -> list[str]:
    """Methods that advice can choose, in its order."""
    return [plan.method for plan in task.answer.plans]


def others() -> list[str]:
    """Methods that it cannot."""
    return [name for name in plugins.names("methods") if name not in {*FAMILIES, *LEFT_OUT}]


def narrowed(task: Task, rates: Sequence[float], best: int) -> Iterator[Trial]:
    """The best methods and the advised one, at other rates."""
    at_advised = [task.trial(method) for method in [*planned(task), *others()]]
    found = sorted((row for trial in at_advised if (row := task.found(trial))), key=lambda row: row["loss"])
    chosen = dict.fromkeys([task.best.method, *(row["method"] for row in found[:best])])
    for method in chosen:
        for factor in rates:
            yield task.trial(method, factor)


def row(task: Task) -> Tree | None:
    """A line of the table, of what has been tried so far; None before the choice itself has been."""
    dry, every = task.found(task.trial(task.best.method)), task.tried()
    own = task.found(task.own) if dry else None
    if dry is None or own is None:
        return None
    first = [one for method in [*planned(task), *others()] if (one := task.found(task.trial(method)))]
    losses, best = [one["loss"] for one in first], every[0]["loss"]
    return {
        "task": task.name, "question": task.folder.name, "group": task.group, "title": task.spec["title"], "steps": task.spec["steps"],
        "tokens_per_batch": task.best.batch, "objective": task.best.choice.objective,
        "advised": own, "regret": own["loss"] / best - 1, "computed": dry, "regret_computed": dry["loss"] / best - 1,
        "median": median(losses), "worst": max(losses), "methods": len({one["method"] for one in every}),
        "of": len(planned(task)) + len(others()), "ranked": every,
    }  # fmt: skip


def write(tasks: Sequence[Task]) -> None:
    """Keep what docs/advice.md shows, and tell it."""
    found = [one for task in tasks if (one := row(task))]
    RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
    for one in found:
        told = (
            f"advised {one['advised']['name']} {one['advised']['loss']:.3f}, best {one['ranked'][0]['name']}"
        )
        print(f"{one['task']}: {told} {one['ranked'][0]['loss']:.3f}, regret {one['regret']:.1%}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Round after round over all tasks, so that what there is at any time is of use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fixtures", type=Path, default=models.FIXTURES)
    parser.add_argument("--tasks", default="", help="Some of them, with commas between.")
    parser.add_argument("--rounds", type=int, default=5, help="So many of the five.")
    parser.add_argument("--told", action="store_true", help="Try nothing, tell what there is.")
    given = parser.parse_args(arguments)
    spec = yaml.safe_load((HERE / "choice.yaml").read_text())
    tasks = [Task(name, group, own, given.fixtures) for group in GROUPS for name, own in spec[group].items()]
    wanted = [task for task in tasks if not given.tasks or task.name in given.tasks.split(",")]
    rounds: list[Callable[[Task], Iterable[Trial]]] = [
        lambda task: [task.trial(task.best.method), task.own], lambda task: map(task.trial, planned(task)), lambda task: narrowed(task, spec["rates"], spec["best"][0]),
        lambda task: map(task.trial, others()), lambda task: narrowed(task, spec["rates"], spec["best"][1]),
    ]  # fmt: skip
    for trials_of in () if given.told else rounds[: given.rounds]:
        for task in wanted:
            for trial in trials_of(task):
                task.run(trial)
        write(tasks)
    write(tasks)


if __name__ == "__main__":
    main()
