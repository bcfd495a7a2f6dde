"""Row 5: SIGTERM and SIGINT at any moment, and more of them while the checkpoint is saved: the run ends soon, with
a checkpoint of its very last step, and the same command goes on to the same bytes.
"""

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from lab import Lab, combinations, ended, outcome
from lab_more import log_of, newest, resumed, together, told, until

from tunewright.core import events, store

COMBINATIONS = combinations()
STEPS = 24
SIGNALS = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
GRACE = 1.0
NOTED = "stopping after this step"
KEPT = "is kept, and the same command goes on from there"


@dataclass(frozen=True)
class Plan:
    """When a run gets which signals: the first after a step, then so many more."""

    step: int
    first: int
    then: int
    more: int = 0
    in_the_save: bool = False
    """Wait with those until the checkpoint is being written."""


def plans(rng: random.Random, count: int, start: int) -> list[Plan]:
    """A second signal in the save, one that comes again until the run has ended, one alone, five: in turn."""
    made = []
    for i in range(count):
        first, second = rng.choice(SIGNALS), rng.choice(SIGNALS)
        step = rng.randrange(1, STEPS - 8)
        kinds = (Plan(step, first, second, 1, True), Plan(step, first, second, 10_000, True),
                 Plan(step, first, first), Plan(step, first, first, 4))  # fmt: skip
        made.append(kinds[(start + i) % len(kinds)])
    return made


@pytest.mark.row(5)
@pytest.mark.parametrize(("objective", "precision"), COMBINATIONS)
def test_a_signal_in_training_ends_the_run_with_a_checkpoint_of_its_last_step(
    lab: Lab, tally, times, objective, precision
):
    recipe = lab.recipe(
        objective=objective, precision=precision, evaluate={"enabled": False},
        train={"max_steps": STEPS, "save_every": 10, "eval_every": 0},
    )  # fmt: skip
    whole, bound = control(lab, recipe)
    rng, share = random.Random(f"{objective} {precision}"), -(-times(4, 40) // len(COMBINATIONS))
    stopped: list[Path] = []
    slowest = 0.0
    for i, plan in enumerate(plans(rng, share, share * COMBINATIONS.index((objective, precision)))):
        output = lab.folder / f"stopped-{i}"
        code, seconds = preempted(lab, recipe, output, plan, rng)
        wrong = wrongs(output, code, seconds, bound, plan)
        tally.add(not wrong, f"{output.name}, {plan}: {', '.join(wrong)}\n{log_of(output)}")
        slowest = max(slowest, seconds)
        stopped.append(output)
    tally.note("slowest exit, seconds", slowest)
    tally.note("bound, seconds", bound)
    together(resumed(lab, recipe, output, whole) for output in stopped)


def control(lab: Lab, recipe: Path) -> tuple[dict[str, object], float]:
    """The outcome without a signal, and the seconds in which a run must end after one."""
    output = lab.folder / "whole"
    assert lab.finish(recipe, output) == 0, log_of(output)
    log = list(events.read(output / "events.jsonl"))
    took = {"step": 0.0, "checkpoint": 0.0}
    for before, after in pairwise(log):
        if after["kind"] in took:
            took[after["kind"]] = max(took[after["kind"]], after["time"] - before["time"])
    return outcome(output), sum(took.values()) + GRACE


def preempted(lab: Lab, recipe: Path, output: Path, plan: Plan, rng: random.Random) -> tuple[int, float]:
    """The run's exit code, and the seconds that it took from the first signal on."""
    process = lab.start(recipe, output)
    pid = process.pid or 0
    until(lambda: process.exitcode is not None or last_step(output) >= plan.step)
    pause = time.monotonic() + rng.uniform(0, 0.02)
    until(lambda: time.monotonic() > pause)
    os.kill(pid, plan.first)
    began = time.monotonic()
    if plan.in_the_save:  # a periodic checkpoint may be on its way when the first signal comes
        until(lambda: process.exitcode is not None or NOTED in log_of(output))
        until(lambda: process.exitcode is not None or any(output.glob("stages/*/checkpoints/.step-*")))
    for _ in range(plan.more):
        if process.exitcode is not None:
            break
        with suppress(ProcessLookupError):  # it may have ended since
            os.kill(pid, plan.then)
        process.join(0.001)
    code = ended(process)
    return code, time.monotonic() - began


def last_step(output: Path) -> int:
    """The step that the log tells last, its line perhaps being written just now."""
    return max((event["step"] for event in told(output, "step")), default=0)


def wrongs(output: Path, code: int, seconds: float, bound: float, plan: Plan) -> list[str]:
    """What is not as it must be after signals in training."""
    said = log_of(output)
    status = store.read_record(output / "manifest.json")["status"]
    checks = {
        f"exit code {code}": code == 128 + plan.first,
        f"exit after {seconds:.2f} s, {bound:.2f} allowed": seconds <= bound,
        f"the checkpoint is of step {newest(output)}, the last step was {last_step(output)}":
            newest(output) == last_step(output) >= plan.step,
        f"status {status}": status == "stopped",
        "stderr does not say what is kept": KEPT in said,
        "a traceback": "Traceback" not in said,
        f"leftovers {store.leftovers(output)}": not store.leftovers(output),
    }  # fmt: skip
    return [what for what, held in checks.items() if not held]
