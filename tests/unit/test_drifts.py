"""What changed since a run was begun is named, old and new; nothing else is."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tunewright import drifts, jobs, recipes
from tunewright.core import machine, store
from tunewright.core.errors import DriftError
from tunewright.jobs import Job

FIX = "give another output=FOLDER, start over with --fresh, or insist with --allow-drift"


@pytest.fixture(scope="module")
def tree(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of two stages."""
    data = tmp_path_factory.mktemp("drifts") / "my.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n}"}) + "\n" for n in range(9))
    )
    common = {"model": str(tiny_model_folder), "data": str(data),
              "train": {"max_steps": 2}, "precision": "fp32"}  # fmt: skip
    return {"stages": [{"name": "first", **common, "method": {"name": "lora", "rank": 4}},
                       {"name": "second", **common, "method": "full"}]}  # fmt: skip


def checked(tree: dict[str, Any]) -> list[Job]:
    return jobs.check(recipes.load(tree))


@pytest.fixture(scope="module")
def todo(tree: dict[str, Any]) -> list[Job]:
    return checked(tree)


def begun(folder: Path, todo: list[Job]) -> Path:
    for job in todo:
        store.write_record(folder / "stages" / job.stage.name / drifts.INPUTS, job.inputs)
    return folder


def between(folder: Path, todo: list[Job], allow: bool) -> dict[str, list[str]]:
    """Stage -> its differences as they are told."""
    return {name: drifts.told(found) for name, found in drifts.between(folder, todo, allow).items()}


def told(folder: Path, todo: list[Job]) -> list[str]:
    with pytest.raises(DriftError) as caught:
        between(folder, todo, allow=False)
    assert {problem.fix for problem in caught.value.problems} == {FIX}
    assert caught.value.exit_code == 2
    return [f"{problem.where}: {problem.what}" for problem in caught.value.problems]


def changed(folder: Path, stage: str, keys: str, value: Any) -> Any:
    """Write another value into what a stage was begun with; the value it had."""
    path = folder / "stages" / stage / drifts.INPUTS
    record = store.read_record(path)
    *outer, last = keys.split(".")
    within = record
    for key in outer:
        within = within[key]
    old, within[last] = within[last], value
    store.write_record(path, record)
    return old


def test_a_folder_that_was_not_begun_has_no_drift(tmp_path: Path, todo: list[Job]) -> None:
    assert between(tmp_path / "none", todo, allow=False) == {}
    (tmp_path / "run" / "stages" / "first").mkdir(parents=True)
    assert between(tmp_path / "run", todo, allow=False) == {}


def test_the_same_recipe_again_has_no_drift(tmp_path: Path, tree: dict[str, Any], todo: list[Job]) -> None:
    begun(tmp_path, todo)
    assert between(tmp_path, todo, allow=False) == {}
    assert between(tmp_path, checked(tree), allow=False) == {}


def test_only_what_was_begun_is_compared(tmp_path: Path, todo: list[Job]) -> None:
    begun(tmp_path, todo[:1])
    assert between(tmp_path, todo, allow=False) == {}


CHANGES = [
    ("train.lr", 0.5), ("train.seed", 7), ("train.tokens_per_batch", 8), ("train.betas", [0.9, 0.99]),
    ("method.name", "full"), ("method.rank", 8), ("objective.name", "pretrain"), ("precision", "bf16"),
    ("base_sha256", "0"), ("tokenizer_sha256", "0"), ("template_sha256", "0"), ("data_sha256", ["0"]),
    ("versions.torch", "1.0"), ("versions.python", "2.7"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "before"), CHANGES, ids=[keys for keys, _ in CHANGES])
def test_a_change_is_told_by_name_with_old_and_new(
    tmp_path: Path, todo: list[Job], keys: str, before: Any
) -> None:
    begun(tmp_path, todo)
    now = changed(tmp_path, "first", keys, before)
    expected = f"first: {keys}: the run was begun with {before!r}, now it is {now!r}"
    assert told(tmp_path, todo) == [expected]
    assert between(tmp_path, todo, allow=True) == {"first": [expected]}


def test_all_changes_of_all_stages_are_told_at_once(tmp_path: Path, todo: list[Job]) -> None:
    begun(tmp_path, todo)
    for stage, keys in (("first", "train.lr"), ("first", "train.seed"), ("second", "train.seed")):
        changed(tmp_path, stage, keys, 5)
    assert [line.split(": the run")[0] for line in told(tmp_path, todo)] == [
        "first: train.lr", "first: train.seed", "second: train.seed"
    ]  # fmt: skip
    assert between(tmp_path, todo, allow=True).keys() == {"first", "second"}


def test_an_option_that_is_new_or_gone_is_told(tmp_path: Path, todo: list[Job]) -> None:
    begun(tmp_path, todo)
    method = {**todo[0].inputs["method"], "old": 3}
    del method["rank"]
    changed(tmp_path, "first", "method", method)
    assert told(tmp_path, todo) == [
        "first: method.old: the run was begun with 3, now it is None",
        "first: method.rank: the run was begun with None, now it is 4",
    ]


def test_an_edited_row_is_told(tmp_path: Path, tree: dict[str, Any], todo: list[Job]) -> None:
    begun(tmp_path, todo)
    edited = copy.deepcopy(tree)
    data = tmp_path / "my.jsonl"
    data.write_text(Path(tree["stages"][0]["data"]).read_text().replace("Say 3", "Say three"))
    edited["stages"][0]["data"] = str(data)
    found = told(tmp_path, checked(edited))
    assert {line.split(":")[1].strip().partition(".")[0] for line in found} >= {"data_sha256"}
    assert all(line.startswith("first: ") for line in found)


@pytest.mark.parametrize("key", ["threads", "processor", "accelerators"])
def test_another_machine_is_told_and_not_refused(tmp_path: Path, todo: list[Job], key: str) -> None:
    begun(tmp_path, todo)
    now = changed(tmp_path, "first", f"machine.{key}", ["other"])
    expected = f"first: machine.{key}: the run was begun with ['other'], now it is {now!r}"
    assert between(tmp_path, todo, allow=False) == {"first": [expected]}


def test_the_machine_is_what_sums_depend_on() -> None:
    found = machine.identity()
    assert found["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(found)) == found


def test_the_machine_does_not_hide_what_is_refused(tmp_path: Path, todo: list[Job]) -> None:
    begun(tmp_path, todo)
    changed(tmp_path, "first", "machine.threads", 99)
    changed(tmp_path, "second", "train.lr", 1.0)
    assert [line.split(": the run")[0] for line in told(tmp_path, todo)] == ["second: train.lr"]


def test_what_does_not_decide_the_outcome_may_change(
    tmp_path: Path, tree: dict[str, Any], todo: list[Job]
) -> None:
    begun(tmp_path, todo)
    other = copy.deepcopy(tree)
    other["stages"][0] |= {"train": {"max_steps": 2, "keep": 5}, "evaluate": {"limit": 3}}
    assert between(tmp_path, checked(other), allow=False) == {}


# Nothing tells what the run was begun with


@pytest.mark.parametrize("text", ["", "{", "{}", '{"train": {"lr": 1}}'])
def test_damaged_inputs_are_a_drift(tmp_path: Path, todo: list[Job], text: str) -> None:
    begun(tmp_path, todo)
    (tmp_path / "stages" / "first" / drifts.INPUTS).write_text(text)
    (found,) = told(tmp_path, todo)
    assert found.startswith("first: inputs.json: ")
    assert found.endswith("so nothing tells whether the inputs are the same")


def test_checkpoints_without_inputs_are_a_drift(tmp_path: Path, todo: list[Job]) -> None:
    (tmp_path / "stages" / "second" / "checkpoints").mkdir(parents=True)
    (found,) = told(tmp_path, todo)
    assert "inputs.json: missing, so nothing tells" in found
