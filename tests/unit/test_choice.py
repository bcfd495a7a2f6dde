"""Choice quality: tasks are as a user has them, trials have the dials of advice, and regret is against the best of all."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks is a package of the repository, not of what is installed

from benchmarks import choice, choice_data, rows  # noqa: E402
from benchmarks.choice import Task  # noqa: E402
from tunewright import trials  # noqa: E402
from tunewright.advise import recipe as advised  # noqa: E402
from tunewright.core import plugins, store  # noqa: E402
from tunewright.variants import Trial  # noqa: E402

Tree = dict[str, Any]
SPEC: Tree = {
    "title": {"en": "tiny", "zh": "小"}, "model": "builtin:pico", "steps": 3,
    "data": {"train": "builtin:sums-train", "valid": "builtin:sums-valid"},
}  # fmt: skip


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setattr(choice, "FOLDER", tmp_path / "choice")
    return Task("tiny", "tuned", SPEC, tmp_path)


def keep(task: Task, trial: Trial, loss: float) -> None:
    """As a finished run leaves it."""
    method = trial.variant.recipe.stages[0].method
    settings = {"method": method, "train_config": trial.variant.recipe.stages[0].train.model_dump()}
    stage = {**settings, "after": {"loss": loss}, "data": {"valid": {"samples": 9}}}
    at = trials.place(task.folder, trial)
    at.mkdir(parents=True)
    store.write_record(at / "results.json", {"status": "finished", "stages": [stage]})


def test_a_trial_is_what_advise_writes_with_so_many_steps(task: Task) -> None:
    best = task.best
    written = yaml.safe_load(advised.text(task.answer.question, best, "en", "runs/x"))
    stage = task.trial(best.method).variant.recipe.stages[0]
    assert (stage.train.lr, stage.train.max_steps) == (written["train"]["lr"], 3)
    assert stage.train.tokens_per_batch == written["train"]["tokens_per_batch"]
    assert stage.data.max_length == written["data"]["max_length"]
    assert stage.method["name"] == written["method"]["name"]


def test_methods_that_advice_cannot_choose_take_their_own_rate_raised_as_loras(task: Task) -> None:
    own, lora = (task.trial(name).variant.recipe.stages[0].train for name in ("adalora", "lora"))
    assert own.lr == pytest.approx(1e-3 * lora.lr / 2e-4)
    assert own.tokens_per_batch == lora.tokens_per_batch


def test_every_method_is_tried_or_left_out_with_a_reason(task: Task) -> None:
    tried = {*choice.planned(task), *choice.others()}
    assert tried | choice.LEFT_OUT.keys() == set(plugins.names("methods"))
    assert not tried & choice.LEFT_OUT.keys()


def test_a_trials_name_has_all_that_differs(task: Task) -> None:
    names = [task.trial("lora", factor).name for factor in (1.0, 3.0)]
    assert names == ["lora-warmup-0.3-lr-0.002-seed-0", "lora-warmup-0.3-lr-0.006-seed-0"]


def test_regret_is_against_the_best_of_methods_and_rates(task: Task) -> None:
    store.write_record(task.folder / "rate.json", {"factor": 1.0})  # a range test's
    keep(task, task.trial(task.best.method), 1.1)
    keep(task, task.trial("ia3"), 4.0)
    keep(task, task.trial("lora"), 1.2)
    keep(task, task.trial("lora", 3), 1.0)
    found = choice.row(task)
    assert found
    assert found["regret"] == pytest.approx(0.1)
    assert (found["ranked"][0]["method"], found["ranked"][0]["loss"]) == ("lora", 1.0)
    assert (found["median"], found["worst"], found["methods"], len(found["ranked"])) == (1.2, 4.0, 3, 4)


def test_without_the_choice_itself_there_is_no_row(task: Task) -> None:
    assert choice.row(task) is None


def test_the_best_and_the_advised_are_tried_at_other_rates(task: Task) -> None:
    keep(task, task.trial("ia3"), 0.5)
    keep(task, task.trial("bitfit"), 0.9)
    tried = [trial.name.split("-")[0] for trial in choice.narrowed(task, [0.3333, 3], 1)]
    assert tried == [task.best.method] * 2 + ["ia3"] * 2


def test_rows_are_drawn_once_and_held_out_ones_are_others(tmp_path: Path) -> None:
    for name in "ab":
        rows.write(
            tmp_path / f"{name}.jsonl", [{"text": f"{name} {number} {'x' * number}"} for number in range(40)]
        )
    spec: Tree = {
        "files": {"first": "a.jsonl", "second": "b.jsonl"},
        "longest": 30,
        "train": 8,
        "held_out": 4,
    }
    paths = choice_data.held(tmp_path / "kept", spec, tmp_path)
    train, valid = (rows.read(path) for path in paths.values())
    assert [len(train), len(valid)] == [16, 8]
    assert {row["label"] for row in train} == {"first", "second"}
    assert not {row["text"] for row in train} & {row["text"] for row in valid}
    assert all(len(row["text"]) <= 30 for row in train)
    assert choice_data.held(tmp_path / "kept", spec, tmp_path) == paths


def test_pairs_that_teach_nothing_and_rows_that_repeat_are_left_out(tmp_path: Path) -> None:
    pair = {
        "instruction": "Say hello.",
        "input": "",
        "output": "Hi.",
        "chosen": "Hello.",
        "rejected": "What?",
    }
    (tmp_path / "pairs.json").write_text(json.dumps([pair, pair, {**pair, "rejected": "Hello."}]))
    spec: Tree = {"files": ["pairs.json"], "train": 1, "held_out": 0}
    paths = choice_data.held(tmp_path / "kept", spec, tmp_path)
    asked = [{"role": "user", "content": "Say hello."}]
    assert rows.read(paths["train"]) == [{"prompt": asked, "chosen": "Hello.", "rejected": "What?"}]
    with pytest.raises(ValueError, match=r"pairs\.json has only 1 rows"):
        choice_data.held(tmp_path / "kept", {**spec, "held_out": 1}, tmp_path)


def test_the_tasks_are_six_to_tune_on_and_some_that_are_fresh() -> None:
    spec = yaml.safe_load((ROOT / "benchmarks/choice.yaml").read_text())
    assert len(spec["tuned"]) == 6
    assert spec["fresh"]
    assert not spec["tuned"].keys() & spec["fresh"].keys()
    for name, own in (task for group in choice.GROUPS for task in spec[group].items()):
        assert own["title"].keys() == {"en", "zh"}, name
        assert ("rows" in own) != ("data" in own), name


def test_what_is_kept_is_of_these_tasks_and_the_best_is_the_best() -> None:
    spec = yaml.safe_load((ROOT / "benchmarks/choice.yaml").read_text())
    for row in json.loads((ROOT / "benchmarks/choice.json").read_text()):
        assert spec[row["group"]][row["task"]]["title"] == row["title"]
        assert row["regret"] >= 0
        assert row["advised"] in row["ranked"]
        assert len(row["ranked"]) >= row["methods"]
