"""``method: auto``: the advisor fills in what a recipe leaves open, says why, and a run keeps its answer."""

import json
from pathlib import Path

import pytest

from tunewright import pipeline, recipes
from tunewright.auto import Advisor
from tunewright.core.errors import UserError


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n}."}) + "\n" for n in range(300))
    )
    return {
        "model": "builtin:pico", "data": {"train": str(data), "max_length": 64}, "method": {"name": "auto", "tries": 0},
        "train": {"max_steps": 7, "tokens_per_batch": 512}, "output": str(tmp_path / "runs" / "one"),
    }  # fmt: skip


def keep(recipe: recipes.Recipe) -> None:
    """As a run does."""
    folder = Path(recipe.output)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipes.to_yaml(recipe))


def test_what_is_open_is_chosen_and_what_is_said_stays(recipe):
    stage = pipeline.load(recipe).stages[0]
    assert stage.method["name"] in {"lora", "full", "dora", "partial"}
    assert (stage.train.max_steps, stage.train.tokens_per_batch, stage.data.max_length) == (7, 512, 64)
    assert stage.train.lr
    assert stage.objective["name"] == "sft"
    assert all(stage.advised.why)
    assert stage.advised.memory > 1e8
    assert stage.advised.tried == 0
    assert stage.advised.seconds == pytest.approx(7 * 512 / stage.advised.tokens_per_second, rel=0.01)


def test_a_goal_counts(recipe):
    recipe["method"]["goal"] = "memory"
    assert pipeline.load(recipe).stages[0].method["name"] == "qlora"


def test_a_run_that_was_begun_keeps_its_answer(recipe, monkeypatch):
    first = pipeline.load(recipe)
    keep(first)
    monkeypatch.setattr("tunewright.auto.advise.answer_about", None)  # it is not asked
    assert pipeline.load(recipe) == first


def test_another_question_is_asked_anew(recipe):
    keep(pipeline.load(recipe))
    recipe["method"]["goal"] = "memory"
    assert pipeline.load(recipe).stages[0].method["name"] == "qlora"


def test_so_is_a_fresh_run_and_a_damaged_one(recipe, monkeypatch):
    first = pipeline.load(recipe)
    keep(first)
    monkeypatch.setattr("tunewright.auto._known", lambda path, question: pytest.fail("it was read"))
    assert pipeline.load(recipe, (), Advisor(fresh=True)) == first
    monkeypatch.undo()
    (Path(first.output) / "recipe.yaml").write_text("model: [")
    assert pipeline.load(recipe) == first


def test_what_it_says_is_part_of_the_recipe_and_changes_nothing(recipe):
    loaded = pipeline.load(recipe)
    again = recipes.load(json.loads(loaded.model_dump_json(exclude={"eval"})))
    assert again.stages == loaded.stages


def test_a_stage_that_goes_on_is_advised_by_the_first_ones_shape(recipe):
    data = recipe.pop("data")
    method = recipe.pop("method")
    recipe["stages"] = [
        {"name": "one", "data": data, "method": "full"},
        {"name": "two", "model": "stage:one", "data": data, "method": {**method, "tries": 3}},
    ]
    two = pipeline.load(recipe).stages[1]
    assert two.model == "stage:one"
    assert two.advised.tried == 0


def test_its_options_are_checked_with_all_else(recipe):
    recipe["method"] = {"name": "auto", "gaol": "speed", "tries": -1}
    recipe["train"]["epoch"] = 1
    with pytest.raises(UserError) as caught:
        pipeline.load(recipe)
    assert {problem.where for problem in caught.value.problems} == {
        "method.gaol",
        "method.tries",
        "train.epoch",
    }


def test_bad_data_is_told_and_not_advised_on(recipe):
    recipe["data"]["train"] = "nowhere.jsonl"
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        pipeline.load(recipe)


def test_where_no_run_begins_a_method_is_needed(recipe):
    with pytest.raises(UserError, match="auto is chosen when a run begins"):
        recipes.load(recipe)
