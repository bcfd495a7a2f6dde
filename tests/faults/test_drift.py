"""Row 7: a run folder that was begun with anything else is refused by name, old -> new, and left as it is."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from changes import CHANGES, HARMLESS, Change, Inputs
from lab import Lab, differences, outcome
from lab_more import Stop, copied, here, told

from tunewright.core import lock, store
from tunewright.core.errors import DriftError, InterruptedRunError
from tunewright.runs import Run


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Lab:
    """One folder for all tests here: none changes what is begun in it."""
    return Lab(tmp_path_factory.mktemp("drift"), tiny_model_folder)


@pytest.fixture(scope="module")
def inputs(lab: Lab) -> Inputs:
    """A recipe, its data and its model, to be changed; with a run that is finished and one that is half done."""
    made = Inputs(lab.folder / "inputs")
    made.folder.mkdir()
    shutil.copytree(lab.model, made.model)
    rows = lab.data("sft").read_text().splitlines(keepends=True)
    made.rows.write_text("".join(rows[8:]))
    made.held_out.write_text("".join(rows[:8]))
    stage = {"name": "one", "objective": "sft"}
    lab.recipe(
        str(made.recipe.relative_to(lab.folder).with_suffix("")), model=str(made.model), stages=[stage],
        data={"train": str(made.rows), "valid": str(made.held_out)},
        train={"max_steps": 8, "eval_every": 0, "save_every": 3}, evaluate={"limit": 4, "max_new_tokens": 2},
    )  # fmt: skip
    here(made.recipe, lab.folder / "finished")
    with pytest.raises(InterruptedRunError):
        here(made.recipe, lab.folder / "begun", stop=Stop(5, signal.SIGTERM))
    return made


@pytest.fixture
def changed(inputs: Inputs) -> Iterator[tuple[Change, tuple[str, ...]]]:
    """Every change in turn, each undone before the next."""

    def each() -> Iterator[tuple[Change, tuple[str, ...]]]:
        whole = inputs.folder.with_name("inputs-whole")
        shutil.copytree(inputs.folder, whole, dirs_exist_ok=True)
        for change in CHANGES:
            with pytest.MonkeyPatch.context() as patch:
                yield change, change.edit(inputs, patch)
            shutil.rmtree(inputs.folder)
            shutil.copytree(whole, inputs.folder)

    return each()


def snapshot(output: Path) -> dict[str, str]:
    """Every file of a run folder by its hash."""
    paths = sorted(p for p in output.rglob("*") if p.is_file() and p.name != lock.OWNER)
    return {path.relative_to(output).as_posix(): store.sha256_file(path) for path in paths}


def refused(inputs: Inputs, output: Path, change: Change, overrides: tuple[str, ...]) -> list[str]:
    """What is wrong with how the changed run is refused."""
    before = snapshot(output)
    try:
        here(inputs.recipe, output, *overrides)
    except DriftError as error:
        said, wrong = {p.where.partition(": ")[2]: p for p in error.problems}, []
        wrong += [f"it tells {sorted(said)}"] if set(said) != set(change.fields) else []
        wrong += [
            f"unclear: {p}" for p in said.values() if " with " not in p.what or ", now it is " not in p.what
        ]
        wrong += [f"no {v} in {error}" for v in change.values if v not in str(error)]
        wrong += ["--allow-drift is not named"] if "--allow-drift" not in str(error) else []
    else:
        wrong = ["it went on"]
    return wrong + (["the folder changed"] if snapshot(output) != before else [])


@pytest.mark.row(7)
def test_a_changed_run_is_refused_by_name(lab: Lab, tally, inputs, changed):
    for change, overrides in changed:
        for output in ("begun", "finished"):
            wrong = refused(inputs, lab.folder / output, change, overrides)
            tally.add(not wrong, f"{change.name}, {output}: {'; '.join(wrong)}")


@pytest.mark.row(7)
def test_a_changed_run_goes_on_if_one_insists_and_its_lineage_tells(lab: Lab, tally, inputs, changed):
    for change, overrides in changed:
        output = copied(lab.folder / "begun", f"allowed-{change.name}")
        before = snapshot(output / "stages" / "one" / "checkpoints")
        try:
            here(inputs.recipe, output, *overrides, allow_drift=True)
        except DriftError as error:
            clear = "checkpoint" in str(error) and "--fresh" in str(error)
            kept = snapshot(output / "stages" / "one" / "checkpoints") == before
            tally.add(not change.fits and clear and kept, f"{change.name}: {error}")
            tally.add(*goes_on_unchanged(lab, inputs, output))
            continue
        told_of = "; ".join(Run(output).results["stages"][0]["lineage"]["drift"])
        good = change.fits and all(field in told_of for field in change.fields)
        tally.add(good and bool(told(output, "drift")), f"{change.name}: lineage tells {told_of!r}")


def goes_on_unchanged(lab: Lab, inputs: Inputs, output: Path) -> tuple[bool, str]:
    """Whether the run goes on as it was begun, after a change that could not be."""
    try:
        here(inputs.recipe, output)
    except DriftError as error:
        return False, f"{output.name} cannot go on as it was begun: {error}"
    wrong = differences(outcome(lab.folder / "finished"), outcome(output))
    return not wrong, f"{output.name} does not go on as it was begun: {', '.join(wrong)} differ"


@pytest.mark.row(7)
def test_what_one_insisted_on_is_still_told_after_another_stop(lab: Lab, tally, inputs):
    output, other = copied(lab.folder / "begun", "insisted"), "train.lr=0.02"
    with pytest.raises(InterruptedRunError):
        here(inputs.recipe, output, other, stop=Stop(7, signal.SIGTERM), allow_drift=True)
    here(inputs.recipe, output, other)
    found = Run(output).results["stages"][0]["lineage"]["drift"]
    tally.add("train.lr" in str(found), f"lineage tells {found}")


@pytest.mark.row(7)
def test_what_a_stage_was_begun_as_is_not_left_beside_another(lab: Lab, tally, inputs):
    output = copied(lab.folder / "begun", "renamed")
    before = snapshot(output)
    try:
        here(inputs.recipe, output, "stages.0.name=other")
        tally.add(False, "a stage of another name was put beside the one that was begun")
    except DriftError as error:
        tally.add("one" in str(error) and snapshot(output) == before, str(error))


@pytest.mark.row(7)
def test_the_same_run_is_reused_and_so_is_one_that_differs_in_nothing_that_counts(lab: Lab, tally, inputs):
    finished = copied(lab.folder / "finished", "same")
    here(inputs.recipe, finished)
    tally.add(len(told(finished, "reuse")) == 1, "the same run was not reused")
    for harmless in HARMLESS:
        output = copied(lab.folder / "finished", f"finished {harmless}")
        here(inputs.recipe, output, harmless)
        tally.add(len(told(output, "reuse")) == 1, f"{harmless}: not reused")
        output = copied(lab.folder / "begun", f"begun {harmless}")
        try:
            here(inputs.recipe, output, harmless)
            wrong = differences(outcome(lab.folder / "finished"), outcome(output))
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        tally.add(not wrong, f"{harmless}: {', '.join(wrong)}")


@pytest.mark.row(7)
def test_another_machine_is_told_and_not_refused(lab: Lab, tally, inputs, monkeypatch):
    for name in ("begun", "finished"):
        output = copied(lab.folder / name, f"moved-{name}")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # it is said only
        here(inputs.recipe, output)
        monkeypatch.undo()
        said = [line for event in told(output, "drift") for line in event["differences"]]
        good = len(said) == 1 and "machine.threads" in said[0] and "with 1, now it is 3" in said[0]
        same = not differences(outcome(lab.folder / "finished"), outcome(output))
        tally.add(good and same, f"{name}: told {said}")
    tally.add(bool(told(output, "reuse")), "a finished stage was made again")
