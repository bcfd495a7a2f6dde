"""What is compared, told wrong all at once; and trials that are reused, gone on with, or rows with their reasons."""

import stat
import sys

import pytest
import yaml

from tunewright import head_to_head, recipes, sweeps, trials, variants
from tunewright.core import store
from tunewright.core.errors import Problem, UserError
from tunewright.core.units import parse_seconds
from tunewright.head_to_head import Choice
from tunewright.trials import Plan
from tunewright.variants import Trial, Variant

BASE = {
    "model": "builtin:pico", "data": {"train": "builtin:demo-valid"}, "train": {"max_steps": 2},
    "method": {"name": "lora", "rank": 4, "alpha": 8},
}  # fmt: skip

CHILD = """#!{python}
import sys, yaml
from pathlib import Path
from tunewright.core import store
recipe = yaml.safe_load(Path(sys.argv[5]).read_text())
stage, run = recipe["stages"][0], Path(recipe["output"])
with Path("asked").open("a") as asked:
    asked.write(f"{{run.name}} {{stage['train']['max_steps']}} {{' '.join(sys.argv[7:])}}\\n")
if stage["method"]["name"] == "vera":
    print('{{"status": "failed", "problems": ["vera diverged"]}}')
    sys.exit(1)
if stage["method"]["name"] == "ia3":
    sys.exit("no words in JSON")
store.write_record(run / "results.json", {{"status": "finished"}})
"""


@pytest.fixture
def base():
    return recipes.load(BASE)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A child that trains nothing; what it was asked for, as lines."""
    child = tmp_path / "child"
    child.write_text(CHILD.format(python=sys.executable))
    child.chmod(child.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(child))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked").touch()
    return lambda: (tmp_path / "asked").read_text().splitlines()


def made(base, methods, *swept):
    return list(variants.of(base, methods, sweeps.parse(swept)))


def told(problems):
    return [f"{problem.where}: {problem.what}" for problem in problems]


def test_times_are_read():
    assert [parse_seconds(text) for text in ("90s", "5m", "1.5h")] == [90, 300, 5400]
    for text in ("5", "0s", "5 days", "-1s", "1e3s", ""):
        with pytest.raises(ValueError, match="is not a time"):
            parse_seconds(text)


def test_methods_and_swept_values_make_variants_with_readable_names(base):
    found = made(base, ["lora", "houlsby"], "method.rank=4,8", "train.lr=1e-3,1e-4")
    assert [variant.name for variant in found] == [
        "lora, rank 4, lr 1e-3", "lora, rank 4, lr 1e-4", "lora, rank 8, lr 1e-3", "lora, rank 8, lr 1e-4",
        "houlsby, lr 1e-3", "houlsby, lr 1e-4",
    ]  # fmt: skip
    assert found[3].recipe.stages[0].train.lr == 1e-4
    assert Trial(made(base, ["p_tuning"], "method.length=4")[0], 2).name.startswith("p_tuning-length-4-")
    assert Trial(made(base, ["lora"], "method.rank=4")[0], 2).name == "lora-rank-4-seed-2"


def test_the_recipes_options_are_its_own_methods(base):
    lora, dora = made(base, ["lora", "dora"])
    assert lora.recipe.stages[0].method["rank"] == 4
    assert dora.recipe.stages[0].method["rank"] == 16


def test_values_may_be_lists_and_switches(base):
    found = made(
        base, ["lora"], "method.target_modules=all-linear,[q_proj, v_proj]", "method.rslora=true,false"
    )
    assert found[3].name == "lora, target modules q_proj v_proj, rslora off"
    assert len({variant.folder for variant in found}) == 4


def test_different_names_have_different_files():
    names = ["a, b", "a b", "a: b", "a/b", "a" * 70, "a" * 71, "../x"]
    assert len({variants.file_name(name) for name in names[2:]}) == 5
    assert not any(
        "/" in variants.file_name(name) or variants.file_name(name).startswith(".") for name in names
    )


def test_seed_length_and_place_are_the_trials(base, tmp_path):
    (variant,) = made(base, ["lora"])
    recipe = Plan(tmp_path, 60.0, {"lora": 7}).recipe(Trial(variant, 3))
    assert (recipe.stages[0].train.seed, recipe.stages[0].train.max_steps) == (3, 7)
    assert recipe.output == str(tmp_path / "trials/lora-seed-3")
    assert Plan(tmp_path, 0, {}).recipe(Trial(variant, 3)).stages[0].train.max_steps == 2


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    wish = Choice(["lora", "bitfitt"], 0, "5x", ("method.rnk=3", "data.train=x", "train.seed=1", "train.lrr=1",
                                                 "method=a", "method.rank=0", "nothing"))  # fmt: skip
    with pytest.raises(UserError) as caught:
        head_to_head.of_methods(
            {**BASE, "data": "nix.jsonl"}, {"train": {"epochs": -1}}, wish, str(tmp_path / "o"), print
        )
    text = str(caught.value)
    for words in ("--seeds", "5x", "bitfitt", "train.epochs", "nix.jsonl", "nothing: names no values"):
        assert words in text
    wish = Choice(["lora"], sweep={"method.rnk": [3], "data.train": ["x"], "train.seed": [1], "train.lrr": [1],
                                   "method": ["a"], "method.rank": [0]})  # fmt: skip
    with pytest.raises(UserError) as caught:
        head_to_head.of_methods(BASE, {}, wish, str(tmp_path / "o"), print)
    assert len(caught.value.problems) == 6
    assert not (tmp_path / "o").exists()


def test_what_all_variants_share_is_told_once_and_what_some_have_by_name(base):
    unmeasured = recipes.load({**BASE, "evaluate": {"enabled": False}})
    with pytest.raises(UserError) as caught:
        variants.check(made(unmeasured, ["lora", "bitfit"]))
    assert told(caught.value.problems) == ["evaluate.enabled: what is not measured cannot be compared"]
    with pytest.raises(UserError) as caught:
        variants.check([*made(base, ["lora"], "method.target_modules=nix"), *made(base, ["bitfit"])])
    assert all(problem.where.startswith("lora, target modules nix: ") for problem in caught.value.problems)


def test_several_stages_are_refused():
    two = recipes.load({**BASE, "stages": [{"name": "a"}, {"name": "b"}]})
    (problem,) = variants.of(two, ["lora"], {})
    assert isinstance(problem, Problem)
    assert problem.where == "stages"


def test_models_need_data_and_recipes_have_their_own():
    with pytest.raises(UserError, match="held-out rows"):
        head_to_head.of_anything(["a", "b"], Choice(), [], "", print)
    with pytest.raises(UserError) as caught:
        head_to_head.of_anything(["a", "b"], Choice(["lora"], 2), ["x.jsonl"], "", print)
    assert len(caught.value.problems) == 2


def test_finished_trials_are_reused_and_deaths_are_rows(base, tmp_path, asked):
    found = [one for one in made(base, ["lora", "vera", "ia3"]) if isinstance(one, Variant)]
    todo = [Trial(variant, seed) for seed in (0, 1) for variant in found]
    plan = Plan(tmp_path / "out", 0, {})
    failed = trials.run_all(plan, todo, {}, lambda words: None)
    assert failed["vera-seed-0"] == "vera diverged"
    assert failed["ia3-seed-1"] == "ended with exit code 1: no words in JSON"
    assert len(asked()) == 6
    assert trials.run_all(plan, todo, {"vera": "not timed"}, lambda words: None)["vera-seed-1"] == "not timed"
    assert len(asked()) == 8  # finished ones are not asked for again, those that failed are
    (tmp_path / "out/trials/lora-seed-1/results.json").write_text("{}")
    trials.run_all(plan, todo[:1] + todo[3:4], {}, lambda words: None)
    assert asked()[8:] == ["lora-seed-1 2 "]


def test_a_budget_becomes_steps_once(base, tmp_path, asked):
    log = [{"kind": "train", "time": 100.0}]
    log += [{"kind": "step", "time": time} for time in (104.0, 105.0, 107.0, 109.0, 111.0)]
    assert trials.fitting_steps(log, 60.0) == 2 + 27  # five seconds for the first two, two for each other
    assert trials.fitting_steps(log, 1.0) == 1
    found = made(base, ["lora", "vera"])
    begun = Plan(tmp_path / "out", 60.0, {"lora": 29})
    plan, failed = trials.plan(begun, found, lambda words: None)
    assert plan.steps == {"lora": 29}
    assert failed == {"vera": "vera diverged"}
    assert asked() == ["vera 6 --fresh"]
    assert trials.planned(tmp_path / "out", found, 60.0) == plan
    with pytest.raises(UserError, match="budget"):
        trials.planned(tmp_path / "out", found, 61.0)


def test_trials_of_other_inputs_are_refused_by_name(base, tmp_path):
    found = made(base, ["lora"])
    jobs, trial = variants.check(found), Trial(found[0], 0)
    plan = Plan(tmp_path, 0, {})
    at = trials.place(tmp_path, trial) / "stages" / "sft"
    recipe = plan.recipe(trial)
    inputs = {
        **jobs["lora"].inputs,
        "train": recipe.stages[0].train.model_dump(mode="json", exclude={"keep"}),
    }
    store.write_record(at / "inputs.json", inputs)
    trials.check_begun(plan, [trial, Trial(found[0], 1)], jobs)
    store.write_record(at / "inputs.json", {**inputs, "data_sha256": ["0"]})
    with pytest.raises(UserError, match=r"lora-seed-0: data_sha256.*give another --out"):
        trials.check_begun(plan, [trial], jobs)


def test_a_trials_recipe_is_whole(base, tmp_path, asked):
    (variant,) = made(base, ["lora"])
    trials.run(variant.at(str(tmp_path / "run"), seed=5), tmp_path, "x")
    assert yaml.safe_load((tmp_path / "recipes/x.yaml").read_text())["stages"][0]["train"]["seed"] == 5
