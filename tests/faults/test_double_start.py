"""Row 11: of several runs that begin at the same moment on one folder exactly one has it; the others say who."""

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from lab import Lab, differences, ended, outcome
from lab_more import Stop, copied, here, until
from races import at_once

from tunewright.core import lock
from tunewright.core.errors import InterruptedRunError

RUNS = 4
PROMPT = 10.0
"""Seconds within which those that lose must have ended; they check the recipe first."""
KINDS = ("new", "stopped", "fresh")


@pytest.mark.row(11)
def test_exactly_one_of_several_runs_has_the_folder(lab: Lab, tally, times):
    recipe = lab.recipe(evaluate={"enabled": False}, train={"max_steps": 6, "eval_every": 0, "save_every": 4})
    here(recipe, lab.folder / "whole")
    with pytest.raises(InterruptedRunError):
        here(recipe, lab.folder / "begun", stop=Stop(3, signal.SIGTERM))
    whole, slowest = outcome(lab.folder / "whole"), 0.0
    for i in range(times(3, 50)):
        kind = KINDS[i % len(KINDS)]
        output = lab.folder / f"race-{i}" if kind == "new" else copied(lab.folder / "begun", f"race-{i}")
        wrong, seconds = race(recipe, output, ("--fresh",) if kind == "fresh" else ())
        wrong += [f"{name} differs" for name in differences(whole, outcome(output))]
        wrong += ["the folder is still owned"] if lock.is_owned(output) else []
        tally.add(not wrong, f"{output.name}, {kind}: {'; '.join(wrong)}")
        slowest = max(slowest, seconds)
    tally.note("slowest refusal, seconds", slowest)


def race(recipe: Path, output: Path, flags: tuple[str, ...]) -> tuple[list[str], float]:
    """Start several runs at the same moment; what is wrong then, and the seconds until the last one that lost ended.

    The one that wins waits for the others within its training, so that none comes when it is already done.
    """
    runs = at_once(RUNS, recipe, output, *flags)
    began = time.monotonic()
    until(lambda: sum(run.exitcode is None for run in runs) <= 1 or time.monotonic() > began + PROMPT)
    seconds = time.monotonic() - began
    Path(f"{output}.go").touch()
    codes = [ended(run) for run in runs]
    if sorted(codes) != [0] + [2] * (RUNS - 1):
        return [f"exit codes {codes}: {said(output, runs)}"], seconds
    winner = runs[codes.index(0)]
    losers = [run for run in runs if run is not winner]
    nameless = [words for words in said(output, losers) if f"process {winner.pid} on" not in words]
    return [f"{winner.pid} won, but: {words}" for words in nameless], seconds


def said(output: Path, runs: list[BaseProcess]) -> list[str]:
    """What each of them printed."""
    return [Path(f"{output}.{run.pid}.log").read_text().strip() for run in runs]


@pytest.mark.row(11)
def test_a_killed_owner_frees_the_folder_at_once(lab: Lab, tally, times):
    recipe = lab.recipe(evaluate={"enabled": False}, train={"max_steps": 8, "eval_every": 0})
    rng = random.Random(11)
    for i in range(times(1, 5)):
        output = lab.folder / f"killed-{i}"
        process = lab.start(recipe, output)
        until(lambda output=output: lock.is_owned(output))
        process.join(rng.uniform(0, 0.2))
        owned = process.exitcode is None and lock.is_owned(output)
        os.kill(process.pid or 0, signal.SIGKILL)
        ended(process)
        free = not lock.is_owned(output)
        code = lab.finish(recipe, output)
        tally.add(
            owned and free and code == 0, f"{output.name}: owned {owned}, then free {free}, then {code}"
        )
