"""Row 6: whatever a run keeps besides weights and moments is there again after a kill.

Each condition puts some state between two steps, or into the middle of one. The run is stopped there, goes on in
another process, and must end as the one that was left alone.
"""

import random
from pathlib import Path

import pytest
from conditions import Condition, conditions_of
from lab import Lab, differences, outcome
from lab_more import Case, Stop, here, log_of, stopping, together, told

from tunewright.core import plugins, store

BASE = ("evaluate.enabled=false", "train.max_steps=8", "train.eval_every=0", "train.keep=3")


@pytest.mark.row(6)
@pytest.mark.parametrize("objective", plugins.names("objectives"))
def test_a_run_stopped_in_any_condition_ends_with_the_same_bytes(lab: Lab, tally, times, objective):
    conditions = conditions_of(objective)
    assert len([condition for condition in conditions if not condition.of_any]) >= 2
    recipe = lab.recipe(objective=objective)
    here(recipe, lab.folder / "whole", *BASE)
    here(recipe, lab.folder / "control", *BASE)
    assert not differences(outcome(lab.folder / "whole"), outcome(lab.folder / "control"))
    together(
        case
        for condition in conditions
        for case in cases(lab, recipe, tally, times(1, 6), condition, objective)
    )


def cases(lab: Lab, recipe: Path, tally, count: int, condition: Condition, objective: str):
    """The condition's runs that are stopped, made one after the other."""
    overrides = (*BASE, *condition.overrides(lab, objective))
    whole = lab.folder / f"{condition.name}-whole"
    here(recipe, whole, *overrides)
    assert condition.came_about(whole), f"{condition.name} did not come about: {told(whole, 'eval')}"
    stops = condition.stops(whole, random.Random(f"{objective} {condition.name}"), count)
    for i, stop in enumerate(stops):
        output = lab.folder / f"{condition.name}-{i}"
        yield survive(lab, tally, recipe, output, whole, (stop, overrides))


def survive(
    lab: Lab, tally, recipe: Path, output: Path, whole: Path, how: tuple[Stop, tuple[str, ...]]
) -> Case:
    """Stop the run, let it go on, compare."""
    stop, overrides = how
    code = yield stopping(stop, recipe, output, *overrides, *stop.besides)
    assert code == stop.exit_code, f"{output.name}, {stop}: exit code {code}\n{log_of(output)}"
    expected = stop.resumes_from(save_every(output))
    code = yield lab.start(recipe, output, *overrides, *stop.besides)
    assert code == 0, log_of(output)
    resumed = [event["step"] for event in told(output, "resume")]
    assert resumed == ([expected] if expected else []), f"{output.name}, {stop}: went on from {resumed}"
    wrong = differences(outcome(whole), outcome(output))
    tally.add(not wrong, f"{output.name}, {stop}: {', '.join(wrong)} differ")


def save_every(output: Path) -> int:
    """As the run has it."""
    (inputs,) = output.glob("stages/*/inputs.json")
    return int(store.read_record(inputs)["train"]["save_every"])
