"""Trials of a comparison: each an ordinary run in a process of its own, reused when finished, gone on with when not.

A process of its own makes peak memory the trial's alone, and a trial's death a row with its reason. Training that
stops by the clock would come out differently each time; so a budget becomes a number of steps, once for each
variant: a run of a few steps is timed, and the number that fits is kept in ``plan.json``, which holds for ever.
"""

import json
import math
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from typing import Any

from tunewright import drifts
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
_FEW = 5
"""Steps that are made however long they take."""
_LOOKED = 0.1
"""Seconds between looks at a run that has begun."""
_TOLD = 240
"""Characters of a reason; the log has all of it."""
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
    with _started(recipe, folder, name, *options) as child:
        try:
            out, _ = child.communicate()
        except BaseException:
            child.send_signal(
                signal.SIGTERM
            )  # it ends with a checkpoint; one that Ctrl-C has reached ignores this
            child.wait()
            raise
    return _reason(child.returncode, out.decode("utf-8", "replace"), _log(folder, name))


def first_steps(
    recipe: Recipe, folder: Path, name: str, count: int, patience: float = math.inf, memory: int = 0
) -> "Begun":
    """Run a recipe in a child process until it has made ``count`` steps, or a few in ``patience`` seconds, and end it.

    It begins as the whole run would, with all techniques that pay in that one. ``memory`` bytes are what it can get
    of the system (RLIMIT_DATA), if they are given.
    """
    log = Path(recipe.output) / "events.jsonl"
    with _started(recipe, folder, name) as child:
        if memory:
            resource.prlimit(child.pid, resource.RLIMIT_DATA, (memory, memory))
        try:
            while child.poll() is None and not _is_enough(log, count, patience):
                time.sleep(_LOOKED)
        finally:
            ended_itself = child.poll() is not None
            child.kill()
            out, _ = child.communicate()
    reason = (
        _reason(child.returncode, out.decode("utf-8", "replace"), _log(folder, name)) if ended_itself else ""
    )
    return Begun(list(events.read(log)), reason)


@dataclass(frozen=True)
class Begun:
    """How a run began."""

    log: Sequence[events.Event]
    reason: str
    """Why it failed; nothing if it did not."""

    def of(self, kind: str) -> list[events.Event]:
        """Its events of a kind."""
        return [event for event in self.log if event["kind"] == kind]


def _is_enough(log: Path, count: int, patience: float) -> bool:
    steps = [event["time"] for event in events.read(log) if event["kind"] == "step"]
    return len(steps) >= count or (len(steps) >= _FEW and steps[-1] - steps[0] > patience)


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


@contextmanager
def _started(recipe: Recipe, folder: Path, name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """The same program in a process of its own, which has ended when the context does."""
    path, log = folder / "recipes" / f"{name}.yaml", _log(folder, name)
    store.write_text(path, to_yaml(recipe))
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "tunewright", "run", str(path), "--json", *options]
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as child:  # noqa: S603 this program itself
        yield child


def _reason(status: int, out: str, log: Path) -> str:
    if status == 0:
        return ""
    lines = [line for line in out.splitlines() if line.startswith("{")]
    told = json.loads(lines[-1]).get("problems", []) if lines else []
    if told:
        return shorten("; ".join(told), _TOLD, placeholder=" ...")
    if status == -signal.SIGKILL:
        return "killed by the system, as happens when memory ends"
    ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return shorten(": ".join([ended, *last]), _TOLD, placeholder=" ...")


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
