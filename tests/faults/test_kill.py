"""Row 1: SIGKILL at any moment; the same command again gives the same bytes and the same order of samples."""

import random
import signal
import time

import pytest
from lab import Lab, combinations, dealt, differences, outcome

COMBINATIONS = combinations()


@pytest.mark.row(1)
@pytest.mark.parametrize(("objective", "precision"), COMBINATIONS)
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bytes(
    lab: Lab, tally, times, objective, precision
):
    share = dealt(times(20, 180), COMBINATIONS.index((objective, precision)), len(COMBINATIONS))
    survive(lab, tally, lab.recipe(objective=objective, precision=precision), share)


@pytest.mark.row(1)
def test_a_chain_of_stages_killed_at_a_random_moment_ends_with_the_same_bytes(lab: Lab, tally, times):
    stages = [{"name": "first"}, {"name": "second", "model": "stage:first", "method": "full"}]
    survive(lab, tally, lab.recipe(stages=stages), times(1, 20))


def survive(lab: Lab, tally, recipe, count: int) -> None:
    """Kill so many runs, half of them twice; each must end as the one that was left alone."""
    began = time.monotonic()
    assert lab.finish(recipe, lab.folder / "whole") == 0
    length = time.monotonic() - began
    whole = outcome(lab.folder / "whole")
    assert lab.finish(recipe, lab.folder / "control") == 0
    assert not differences(whole, outcome(lab.folder / "control"))

    rng = random.Random(recipe.read_text().replace(str(lab.folder), ""))
    killed = 0
    while killed < count:
        output = lab.folder / f"broken-{rng.random():.9f}"
        codes = [lab.kill_after(rng.uniform(0, length), recipe, output)]
        if codes[0] == -signal.SIGKILL and rng.random() < 0.5:
            codes.append(lab.kill_after(rng.uniform(0, length), recipe, output))
        if -signal.SIGKILL not in codes:
            continue  # the run was done before the signal came
        killed += 1
        code = lab.finish(recipe, output)
        wrong = differences(whole, outcome(output)) if code == 0 else [f"exit code {code}: {told(output)}"]
        tally.add(not wrong, f"{output.name}: {', '.join(wrong)} differ")


def told(output) -> str:
    """The last that the run printed."""
    return output.with_name(f"{output.name}.log").read_text()[-500:]
