"""A recipe is read whole: shorthands, overrides, stages, and every problem at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tunewright.core import plugins
from tunewright.core.errors import RecipeError
from tunewright.recipes import Recipe, load, schema_json, to_yaml

BASE: dict[str, Any] = {"model": "builtin:pico", "data": "rows.jsonl"}
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def recipe(overrides: Any = (), **tree: Any) -> Recipe:
    return load({**BASE, **tree}, overrides)


def refused(overrides: Any = (), **tree: Any) -> list[str]:
    """The problems of a recipe, a line each."""
    with pytest.raises(RecipeError) as caught:
        recipe(overrides, **tree)
    return str(caught.value).splitlines()


# Shorthands and defaults


def test_a_model_and_a_file_are_enough() -> None:
    (stage,) = recipe().stages
    assert stage.name == "sft"
    assert [file.path for file in stage.data.train] == ["rows.jsonl"]
    assert (stage.method["name"], stage.objective["name"], stage.precision) == ("lora", "sft", "bf16")


def test_the_options_of_method_and_objective_are_written_out() -> None:
    (stage,) = recipe(objective="pretrain").stages
    method = {"name": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": "all-linear"}
    assert stage.method.items() >= method.items()
    assert {"init", "rslora", "lr_ratio", "rank_pattern"} <= stage.method.keys()
    assert stage.optimizer == {"name": "adamw"}
    assert stage.objective == {"name": "pretrain", "block": 256, "across": False}


@pytest.mark.parametrize(
    "data",
    ["a.jsonl", ["a.jsonl"], {"train": "a.jsonl"}, {"train": ["a.jsonl"]}, {"train": [{"path": "a.jsonl"}]}],
)
def test_all_ways_to_name_one_file_mean_the_same(data: Any) -> None:
    assert recipe(data=data) == recipe(data={"train": {"path": "a.jsonl"}})


def test_files_have_weights() -> None:
    files = recipe(data=["a.jsonl", {"path": "b.jsonl", "weight": 2}]).stages[0].data.train
    assert [(file.path, file.weight) for file in files] == [("a.jsonl", 1.0), ("b.jsonl", 2.0)]


def test_a_method_by_its_name_has_its_defaults() -> None:
    assert recipe(method="lora") == recipe(method={"name": "lora"})


def test_the_run_is_named_after_the_file(tmp_path: Path) -> None:
    path = tmp_path / "poems.yaml"
    path.write_text("model: builtin:pico\ndata: rows.jsonl\n")
    assert load(path).output == "runs/poems"
    assert load(path, ["output=elsewhere"]).output == "elsewhere"


# Overrides


def test_an_override_reaches_any_depth() -> None:
    (stage,) = recipe(["method.rank=4", "train.lr=0.5", "precision=fp32"], method="lora").stages
    assert (stage.method["rank"], stage.train.lr, stage.precision) == (4, 0.5, "fp32")


def test_an_override_wins_over_the_recipe_and_the_last_over_the_first() -> None:
    assert recipe(["train.seed=2", "train.seed=3"], train={"seed": 1, "keep": 7}).stages[0].train.seed == 3
    assert recipe(["train.seed=2"], train={"seed": 1, "keep": 7}).stages[0].train.keep == 7


@pytest.mark.parametrize("written", ["3e-4", "3.0e-4", "0.0003"])
def test_a_rate_may_be_written_as_people_write_it(written: str) -> None:
    assert recipe([f"train.lr={written}"]).stages[0].train.lr == 3e-4


def test_a_rate_in_the_file_may_be_written_so_too(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: builtin:pico\ndata: rows.jsonl\ntrain: {lr: 3e-4}\n")
    assert load(path).stages[0].train.lr == 3e-4


def test_an_override_may_be_a_list_or_a_mapping() -> None:
    (stage,) = recipe(["method.target_modules=[q_proj, v_proj]", "data.train=[{path: a.jsonl, weight: 2}]"],
                      method="lora").stages  # fmt: skip
    assert stage.method["target_modules"] == ["q_proj", "v_proj"]
    assert stage.data.train[0].weight == 2.0


def test_overrides_may_be_given_as_a_mapping() -> None:
    assert recipe({"train.lr": 0.5}) == recipe(["train.lr=0.5"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.valid=held.jsonl", ("valid", "held.jsonl")),
        ("data.max_length=64", ("max_length", 64)),
        ("data.template=chatml", ("template", "chatml")),
        ("data.valid_share=0.2", ("valid_share", 0.2)),
        ("data.on_bad_row=skip", ("on_bad_row", "skip")),
    ],
)
@pytest.mark.parametrize("data", ["rows.jsonl", ["rows.jsonl"]])
def test_an_override_goes_into_the_short_form_of_data(
    override: str, expected: tuple[str, Any], data: Any
) -> None:
    name, value = expected
    found = recipe([override], data=data).stages[0].data
    assert found.train[0].path == "rows.jsonl"
    assert (found.valid[0].path if name == "valid" else getattr(found, name)) == value


def test_an_override_finds_a_stage_by_number_or_name() -> None:
    stages = [{"name": "first"}, {"name": "second", "model": "stage:first"}]
    by_number = recipe(["stages.1.train.lr=0.5"], stages=stages)
    by_name = recipe(["stages.second.train.lr=0.5"], stages=stages)
    assert by_number == by_name
    assert [stage.train.lr for stage in by_name.stages] == [None, 0.5]


def test_an_override_of_no_stage_names_the_nearest() -> None:
    (problem,) = refused(["stages.secnd.train.lr=1"], stages=[{"name": "first"}, {"name": "second"}])
    assert problem == "stages.secnd.train.lr: there is no stage 'secnd'; fix: did you mean 'second'?"


@pytest.mark.parametrize("override", ["train.lr", "=3", "lr 3"])
def test_an_override_needs_key_and_value(override: str) -> None:
    (problem,) = refused([override])
    assert problem == f"{override}: an override is written key=value; fix: for example train.lr=1e-4"


def test_an_override_that_is_not_yaml() -> None:
    assert refused(["train.lr={"]) == [
        "train.lr={: not readable as YAML: expected the node content, but found '<stream end>'"
    ]


def test_overriding_leaves_the_given_mapping_alone() -> None:
    tree = {**BASE, "train": {"lr": 1.0}}
    load(tree, ["train.lr=2"])
    assert tree["train"] == {"lr": 1.0}


# Unknown options


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"modle": "x"}, "modle: there is no such option; fix: did you mean 'model'?"),
        ({"train": {"lrr": 1}}, "train.lrr: there is no such option; fix: did you mean 'lr'?"),
        (
            {"data": {"train": "a", "max_lenght": 9}},
            "data.max_lenght: there is no such option; fix: did you mean 'max_length'?",
        ),
        (
            {"data": {"train": [{"path": "a", "wieght": 2}]}},
            "data.train.0.wieght: there is no such option; fix: did you mean 'weight'?",
        ),
        (
            {"method": {"name": "lora", "rnak": 4}},
            "method.rnak: there is no such option; fix: did you mean 'rank'?",
        ),
        ({"method": "lroa"}, "method.name: no method is called 'lroa'; fix: did you mean 'lora'?"),
        (
            {"objective": {"name": "pretrain", "blok": 64}},
            "objective.blok: there is no such option; fix: did you mean 'block'?",
        ),
        (
            {"stages": [{"train": {"sedd": 1}}]},
            "stages.0.train.sedd: there is no such option; fix: did you mean 'seed'?",
        ),
    ],
)
def test_an_unknown_option_is_told_the_nearest(tree: dict[str, Any], problem: str) -> None:
    assert refused(**tree) == [problem]


def test_an_option_like_nothing_lists_all() -> None:
    (problem,) = refused(evaluate={"zzz": 1})
    assert problem == (
        "evaluate.zzz: there is no such option; fix: one of enabled, generate, kl, limit, max_new_tokens, old, rewards, samples"
    )


def test_all_problems_are_told_together() -> None:
    with pytest.raises(RecipeError) as caught:
        load(
            {
                "modle": "builtin:pico",
                "data": {"train": "rows.jsonl", "max_lenght": 64, "valid_share": 2},
                "method": {"name": "lora", "rnak": 4, "dropout": 1},
                "objective": "stf",
                "precision": "fp8",
                "train": {"lr": -1},
                "logs": ["paper"],
            }
        )
    assert sorted(problem.where for problem in caught.value.problems) == [
        "data.max_lenght", "data.valid_share", "logs.0", "method.dropout", "method.rnak", "model", "modle",
        "objective.name", "precision", "train.lr",
    ]  # fmt: skip


def test_problems_of_every_stage_are_told_together() -> None:
    problems = refused(
        stages=[{"name": "a", "train": {"lr": 0}}, {"name": "b", "method": {"name": "lora", "rank": 0}}]
    )
    assert [problem.split(":")[0] for problem in problems] == ["stages.0.train.lr", "stages.1.method.rank"]


def test_a_wrong_value_says_what_was_found() -> None:
    assert refused(train={"schedule": "cosin"}) == [
        "train.schedule: input should be 'constant', 'linear', 'cosine' or 'wsd', found 'cosin'"
    ]


@pytest.mark.parametrize("method", [4, {"name": 4}, ["lora"]])
def test_a_method_without_a_name(method: Any) -> None:
    (problem,) = refused(method=method)
    assert problem.startswith("method: ")


# Files


def unread(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load(path)
    return str(caught.value)


def test_a_missing_file_is_told_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "poems.yaml").touch()
    missing = tmp_path / "peoms.yaml"
    assert unread(missing) == f"{missing}: there is no such file; fix: did you mean 'poems.yaml'?"


def test_a_missing_file_in_a_missing_folder(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "a.yaml"
    assert unread(missing) == f"{missing}: there is no such file; fix: give the path of a YAML file"


def test_broken_yaml_is_told_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: builtin:pico\ntrain:\n  lr: [1\ndata: rows.jsonl\n")
    assert unread(path).startswith(f"{path}:4: not readable as YAML: ")


def test_yaml_tags_run_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    assert unread(path).startswith(f"{path}:1: not readable as YAML: the tag ")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "words"])
def test_a_file_that_is_no_mapping(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content)
    assert unread(path).startswith(f"{path}: a recipe is a mapping, found ")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"model: \x00"])
def test_a_file_that_is_no_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    assert "not readable as YAML" in unread(path)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert unread(tmp_path).startswith(f"{tmp_path}: not readable as YAML: ")


# Stages


def test_a_stage_is_laid_over_what_is_said_for_all() -> None:
    first, second = recipe(
        train={"lr": 0.5, "seed": 3}, method={"name": "lora", "rank": 4},
        stages=[{"name": "a", "train": {"lr": 0.25}}, {"name": "b", "method": {"rank": 8}}],
    ).stages  # fmt: skip
    assert (first.train.lr, first.train.seed, first.method["rank"]) == (0.25, 3, 4)
    assert (second.train.lr, second.train.seed, second.method["rank"]) == (0.5, 3, 8)


def test_a_stage_with_another_method_does_not_inherit_the_first_ones_options() -> None:
    (stage,) = recipe(method={"name": "lora", "rank": 4}, stages=[{"method": {"name": "full"}}]).stages
    assert stage.method == {"name": "full"}


def test_a_stage_adds_to_the_short_form_of_what_is_said_for_all() -> None:
    (stage,) = recipe(method="lora", stages=[{"data": {"max_length": 64}, "method": {"rank": 4}}]).stages
    assert (stage.data.train[0].path, stage.data.max_length) == ("rows.jsonl", 64)
    assert (stage.method["name"], stage.method["rank"]) == ("lora", 4)


def test_a_stage_is_named_after_its_objective() -> None:
    stages = recipe(stages=[{"objective": "pretrain"}, {"model": "stage:pretrain"}]).stages
    assert [stage.name for stage in stages] == ["pretrain", "sft"]


def test_two_stages_of_one_name() -> None:
    assert refused(stages=[{}, {}]) == ["stages: two stages are called 'sft'; fix: give each a `name`"]


def test_a_stage_may_only_start_from_an_earlier_one() -> None:
    (problem,) = refused(stages=[{"name": "first"}, {"name": "second", "model": "stage:frist"}])
    assert problem == (
        "model: stage 'second' starts from 'stage:frist', which is not an earlier stage; "
        "fix: did you mean 'first'?"
    )
    (problem,) = refused(stages=[{"name": "first", "model": "stage:second"}, {"name": "second"}])
    assert "starts from 'stage:second', which is not an earlier stage" in problem


def test_a_wrong_stage_is_still_an_earlier_stage() -> None:
    problems = refused(
        stages=[{"name": "first", "train": {"lr": -1}}, {"name": "second", "model": "stage:first"}]
    )
    assert [problem.split(":")[0] for problem in problems] == ["stages.0.train.lr"]


@pytest.mark.parametrize("stages", [[], {}, "sft", ["sft"], 3])
def test_stages_are_a_list_of_mappings(stages: Any) -> None:
    assert refused(stages=stages) == ["stages: expected a list of stages, each a mapping"]


def test_a_stage_cannot_lead_out_of_the_run_folder() -> None:
    (problem,) = refused(stages=[{"name": "../elsewhere"}])
    assert problem.startswith("stages.0.name: string should match pattern")


# Writing


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"method": {"name": "lora", "target_modules": ["q_proj"]}, "logs": ["tensorboard"]},
        {"data": {"train": ["a", {"path": "b", "weight": 0.5, "columns": {"prompt": "问"}}], "valid": "c"}},
        {
            "output": "out",
            "stages": [{"name": "a", "objective": "pretrain"}, {"name": "b", "model": "stage:a"}],
        },
    ],
)
def test_the_resolved_recipe_loads_as_itself(tmp_path: Path, tree: dict[str, Any]) -> None:
    path = tmp_path / "resolved.yaml"
    resolved = recipe(train={"lr": 3e-4}, **tree)
    path.write_text(to_yaml(resolved), encoding="utf-8")
    assert load(path) == resolved


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load(path, (), lambda stages, place, options, output: {**stages[place], "method": "full"}).stages


# The JSON schema


def choice(schema: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    """The schema of ``{name: NAME, ...}`` under method or objective."""
    (found,) = [
        c
        for c in schema["properties"][key]["anyOf"]
        if c.get("properties", {}).get("name") == {"const": name}
    ]
    return dict(found)


def test_the_schema_knows_every_methods_options_and_no_others() -> None:
    lora = choice(schema_json(), "method", "lora")
    assert lora["properties"]["rank"]["minimum"] == 1
    assert lora["properties"]["rank"]["description"].startswith("Rank r")
    assert lora["additionalProperties"] is False
    assert lora["description"].startswith("LoRA")


@pytest.mark.parametrize(
    ("key", "room", "more"), [("method", "methods", ["auto"]), ("objective", "objectives", [])]
)
def test_the_schema_takes_every_plugin_by_name_or_with_options(key: str, room: str, more: list[str]) -> None:
    schema = schema_json()
    by_name, *with_options = schema["properties"][key]["anyOf"]
    assert by_name == {"enum": [*plugins.names(room), *more]}
    assert [c["properties"]["name"]["const"] for c in with_options] == [*plugins.names(room), *more]


def test_the_schema_forbids_what_it_does_not_know() -> None:
    schema = schema_json()
    assert schema["additionalProperties"] is False
    assert schema["properties"]["stages"]["items"]["additionalProperties"] is False
    assert all(d["additionalProperties"] is False for d in schema["$defs"].values())


def test_the_schema_has_every_option_with_its_description() -> None:
    schema = schema_json()
    assert {"model", "data", "method", "objective", "train", "output", "logs", "stages"} <= set(
        schema["properties"]
    )
    assert schema["properties"]["precision"]["description"].startswith("bf16 holds weights")
    assert schema["$defs"]["TrainConfig"]["properties"]["lr"]["description"].startswith("Peak learning rate")


def test_the_schema_takes_the_short_forms() -> None:
    schema = schema_json()
    assert {"type": "string"} in schema["properties"]["data"]["anyOf"]
    assert {"type": "string"} in schema["$defs"]["DataConfig"]["properties"]["train"]["anyOf"]


def test_the_schema_takes_the_measurement_at_the_end() -> None:
    schema = schema_json()
    assert {"const": True} in schema["properties"]["eval"]["anyOf"]
    assert schema["$defs"]["Eval"]["required"] == []
    assert schema["$defs"]["Eval"]["properties"]["models"]["description"].startswith("``stage:NAME``")


def test_the_measurement_at_the_end_has_what_the_file_says_for_all() -> None:
    tree = {
        "model": "builtin:pico", "data": {"train": "a.jsonl", "valid": "b.jsonl", "template": "chatml"},
        "precision": "fp32", "evaluate": {"limit": 7, "rewards": ["contains"]},
        "eval": {"evaluate": {"limit": 9}},
    }  # fmt: skip
    last = load(tree).eval
    assert last is not None
    assert [file.path for file in last.data] == ["b.jsonl"]
    assert (last.template, last.precision) == ("chatml", "fp32")
    assert (last.evaluate.limit, last.evaluate.rewards) == (9, ("contains",))
    assert load({**tree, "eval": True}).eval.evaluate.limit == 7  # type: ignore[union-attr]
    assert load({**tree, "eval": None}).eval is None
    assert load(yaml.safe_load(to_yaml(load(tree)))).eval == last


def test_options_without_a_name_are_the_default_methods() -> None:
    recipe = load({"model": "builtin:pico", "data": "a.jsonl"}, ["method.rank=4"])
    assert recipe.stages[0].method["name"] == "lora"
    assert recipe.stages[0].method["rank"] == 4
