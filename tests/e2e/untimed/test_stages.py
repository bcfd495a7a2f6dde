"""Chains: a later stage begins from an earlier one's result."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tunewright as tw
from tunewright import doctor, examine
from tunewright.core.errors import DriftError, UserError
from tunewright.data.rows import Message


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n} it is"}) for n in range(40))
    )
    return path


def chain(tiny_model_folder, data, tmp_path, first, second):
    train = {"max_steps": 4, "lr": 1e-2, "tokens_per_batch": 256}
    return {
        "model": str(tiny_model_folder), "data": {"train": str(data), "valid_share": 0.2}, "precision": "fp32",
        "train": train, "evaluate": {"generate": False}, "output": str(tmp_path / "run"),
        "stages": [{"name": "one", "method": first}, {"name": "two", "method": second, "model": "stage:one"}],
    }  # fmt: skip


@pytest.mark.parametrize(("first", "second"), [("lora", "lora"), ("full", "lora"), ("lora", "full")])
def test_the_second_stage_begins_where_the_first_ended(tiny_model_folder, data, tmp_path, first, second):
    recipe = chain(tiny_model_folder, data, tmp_path, first, second)
    run = tw.run(recipe, quiet=True)
    one, two = run.results["stages"]
    assert two["before"]["loss"] == pytest.approx(one["after"]["loss"], abs=1e-4)
    assert two["after"]["loss"] < two["before"]["loss"]
    # What is loaded again is the whole chain, not the last adapter on the first base.
    speaker = tw.load(str(run.folder))
    ids = torch.tensor([speaker.codec.prompt((Message("user", "Say 3."),))])
    with torch.no_grad():
        assert torch.isfinite(speaker.model(input_ids=ids).logits).all()
    if second == "lora":
        assert two["lineage"]["base"] == str(
            run.folder / "stages" / ("one/model" if first == "full" else "two/base")
        )


def test_a_chain_that_was_killed_between_its_stages_reuses_the_first(
    tiny_model_folder, data, tmp_path, monkeypatch
):
    recipe = chain(tiny_model_folder, data, tmp_path, "lora", "lora")
    whole = tw.run({**recipe, "output": str(tmp_path / "whole")}, quiet=True)
    from tunewright import pipeline

    kept = pipeline._Runner._result_of

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline._Runner, "_result_of", killed)
    with pytest.raises(KeyboardInterrupt):
        tw.run(recipe, quiet=True)
    assert json.loads((tmp_path / "run/manifest.json").read_text())["status"] == "stopped"
    monkeypatch.setattr(pipeline._Runner, "_result_of", kept)
    made = (tmp_path / "run/stages/one/adapter/adapter_model.safetensors").stat().st_mtime_ns
    run = tw.run(recipe, quiet=True)
    assert (tmp_path / "run/stages/one/adapter/adapter_model.safetensors").stat().st_mtime_ns == made
    name = "stages/two/adapter/adapter_model.safetensors"
    ours, theirs = load_file(run.folder / name), load_file(whole.folder / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_model_too_large_for_the_machine_is_refused_before_it_is_loaded(
    tiny_model_folder, data, tmp_path, monkeypatch
):
    from tunewright.core import machine

    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    recipe = {"model": str(tiny_model_folder), "data": str(data), "output": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"needs at least .* of memory, 1000 B is free"):
        tw.run(recipe, quiet=True)
    assert not (tmp_path / "run").exists()


def test_available_memory_is_a_number_of_bytes():
    from tunewright.core.machine import available_memory

    assert 1 << 20 < available_memory() < 1 << 50


def test_a_broken_tokenizer_and_bad_data_are_told_together(tiny_model_folder, data, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_folder, broken)
    (broken / "tokenizer.json").write_text("{}")
    data.write_text('{"prompt": "a", "completion": ""}\n')
    recipe = {"model": str(broken), "data": str(data), "output": str(tmp_path / "run")}
    with pytest.raises(UserError) as refused:
        tw.run(recipe, quiet=True)
    assert "no usable tokenizer" in str(refused.value)
    assert f"{data}:1: turn 2 (assistant) is empty" in str(refused.value)


def test_code_that_comes_with_a_model_needs_to_be_trusted_aloud(tiny_model_folder, data, tmp_path, capsys):
    folder = tmp_path / "remote"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "x.Y"}}))
    recipe = {"model": str(folder), "data": {"train": str(data), "valid_share": 0}, "train": {"max_steps": 1},
              "output": str(tmp_path / "run")}  # fmt: skip
    with pytest.raises(UserError, match="wants to run its own Python code"):
        tw.run(recipe, quiet=True)
    shutil.copy(tiny_model_folder / "config.json", folder)
    tw.run({**recipe, "trust_remote_code": True})
    assert f"running Python code that comes with {folder}" in capsys.readouterr().err


def test_an_adapter_finds_its_base_from_any_working_directory(tiny_model_folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_model_folder.parent)
    recipe = {"model": f"./{tiny_model_folder.name}", "data": {"train": str(data), "valid_share": 0},
              "train": {"max_steps": 1}, "output": str(tmp_path / "run")}  # fmt: skip
    run = tw.run(recipe, quiet=True)
    monkeypatch.chdir(tmp_path)
    assert isinstance(run.generate("Say 3.", 2), str)


def test_a_stage_cannot_start_from_what_does_not_merge(tmp_path, tiny_model_folder):
    tree = {
        "output": str(tmp_path / "run"), "model": str(tiny_model_folder), "data": "builtin:demo-valid",
        "stages": [{"name": "first", "method": "houlsby"}, {"name": "second", "model": "stage:first"}],
    }  # fmt: skip
    with pytest.raises(UserError, match=r"stage 'first' is trained by houlsby, which cannot be merged: "):
        tw.run(tree, quiet=True)
    assert not (tmp_path / "run").exists()


# Trees: what is reused, what is made anew


@pytest.fixture
def tree(tiny_model_folder, data, tmp_path):
    """Two stages that start from the first one's result."""
    tree = chain(tiny_model_folder, data, tmp_path, "lora", "lora")
    tree["stages"].append({"name": "three", "method": "lora", "model": "stage:one"})
    return tree


def planned(tree, start="", only=""):
    from tunewright import agenda, pipeline

    tasks = pipeline.plan(pipeline.load(tree), agenda.Wish(start, only))
    return {task.name: (task.action, task.why) for task in tasks}


def made(tree, name):
    return (Path(tree["output"]) / "stages" / name / "adapter/adapter_model.safetensors").stat().st_mtime_ns


def test_a_changed_stage_and_what_depends_on_it_are_made_anew(tree):
    assert [action for action, _ in planned(tree).values()] == ["run", "run", "run"]
    tw.run(tree, quiet=True)
    assert {why for _, why in planned(tree).values()} == {"finished, nothing changed"}
    before = {name: made(tree, name) for name in ("one", "two", "three")}

    tree["stages"][1]["train"] = {**tree["train"], "lr": 2e-2}
    plan = planned(tree)
    assert [action for action, _ in plan.values()] == ["reuse", "run anew", "reuse"]
    assert plan["two"][1] == "train.lr: the run was begun with 0.01, now it is 0.02"
    run = tw.run(tree, quiet=True)
    after = {name: made(tree, name) for name in before}
    assert [name for name in before if after[name] != before[name]] == ["two"]
    assert (run.folder / "older/two.1/adapter/adapter_model.safetensors").stat().st_mtime_ns == before["two"]
    assert [stage["train_config"]["lr"] for stage in run.results["stages"]] == [1e-2, 2e-2, 1e-2]

    tree["stages"][0]["train"] = {**tree["train"], "seed": 3}
    assert [action for action, _ in planned(tree).values()] == ["run anew"] * 3
    assert planned(tree)["three"][1] == "uses one"


def test_a_stage_can_be_made_anew_or_alone(tree):
    with pytest.raises(
        UserError, match=r"--only: stage 'two' uses 'one', of which there is no result.*--only one"
    ):
        tw.run(tree, quiet=True, only="two")
    run = tw.run(tree, quiet=True, only="one")
    assert (run.results["status"], [stage["name"] for stage in run.results["stages"]]) == ("partial", ["one"])
    run = tw.run(tree, quiet=True, only="three")
    assert [stage["name"] for stage in run.results["stages"]] == ["one", "three"]
    assert [action for action, _ in planned(tree).values()] == ["reuse", "run", "reuse"]
    run = tw.run(tree, quiet=True)
    assert run.results["status"] == "finished"
    assert planned(tree, start="two") == {
        "one": ("reuse", "finished, nothing changed"), "two": ("run anew", "asked for"),
        "three": ("reuse", "finished, nothing changed"),
    }  # fmt: skip
    assert [action for action, _ in planned(tree, start="one").values()] == ["run anew"] * 3
    with pytest.raises(UserError, match=r"--from: no stage is called 'tow'; fix: did you mean 'two'"):
        planned(tree, start="tow")


def test_a_run_of_one_stage_is_refused_when_it_changed_unless_it_shall_be_made_anew(tree):
    single = {key: value for key, value in tree.items() if key != "stages"}
    tw.run(single, quiet=True)
    changed = {**single, "train": {**single["train"], "lr": 2e-2}}
    with pytest.raises(DriftError):
        tw.run(changed, quiet=True)
    run = tw.run(changed, quiet=True, start="sft")
    assert (run.folder / "older/sft.1").is_dir()


def test_a_reward_model_of_an_earlier_stage_judges(tiny_model_folder, tmp_path):
    """Polite answers are preferred; what the judge learned of pairs, ppo and grpo are rewarded by."""
    rows = [
        {"prompt": f"Say {n}.", "completion": f"{n}", "chosen": f"{n}, please.", "rejected": f"{n}!"}
        for n in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = {"rewards": ["stage:judge"], "longest": 6}
    tree = {
        "model": str(tiny_model_folder), "data": {"train": str(tmp_path / "pairs.jsonl"), "valid_share": 0.2},
        "precision": "fp32", "evaluate": {"generate": False}, "output": str(tmp_path / "run"),
        "train": {"max_steps": 4, "lr": 1e-2, "tokens_per_batch": 256},
        "stages": [{"name": "judge", "objective": "reward"},
                   {"name": "ppo", "objective": {"name": "ppo", **drawn}},
                   {"name": "grpo", "objective": {"name": "grpo", "group": 2, **drawn}}],
    }  # fmt: skip
    run = tw.run(tree, quiet=True)
    judge, ppo, grpo = run.results["stages"]
    assert judge["after"]["accuracy"] >= judge["before"]["accuracy"]
    assert ppo["before"]["reward"] != 0
    assert (run.folder / "stages/ppo/adapter/adapter_model.safetensors").is_file()
    names = load_file(run.folder / "stages/ppo/adapter/adapter_model.safetensors")
    assert not [name for name in names if "value" in name]
    assert grpo["train"]["steps"] == 4
    assert planned(tree, start="judge")["grpo"] == ("run anew", "uses judge")
    tree["stages"][1]["objective"]["rewards"] = ["stage:jude"]
    with pytest.raises(
        UserError, match=r"stage:jude is no earlier stage with objective: reward; fix: did you mean 'judge'"
    ):
        tw.run(tree, quiet=True)


def test_answers_are_judged_by_rewards_before_and_after(tiny_model_folder, data, tmp_path):
    (tmp_path / "own.py").write_text("def long(asked, answer):\n    return len(answer)\n")
    name = f"{tmp_path / 'own.py'}:long"
    recipe = {
        "model": str(tiny_model_folder), "data": {"train": str(data), "valid_share": 0.2}, "precision": "fp32",
        "evaluate": {"rewards": [name], "max_new_tokens": 8}, "train": {"max_steps": 12, "lr": 1e-2}, "output": str(tmp_path / "run"),
    }  # fmt: skip
    run = tw.run(recipe, quiet=True)
    (stage,) = run.results["stages"]
    shown = [(len(sample["before"]), len(sample["after"])) for sample in stage["samples"]]
    count = stage["after"]["count"]
    assert len(shown) == count
    assert stage["before"]["worth"][name] == pytest.approx(sum(before for before, _ in shown) / count)
    assert stage["after"]["worth"][name] == pytest.approx(sum(after for _, after in shown) / count)
    won = sum((after > before) + (after == before) / 2 for before, after in shown) / count
    assert stage["after"]["wins"][name] == pytest.approx(won)
    assert "By own.py:long, answers are worth" in run.report.read_text()
    with pytest.raises(UserError, match="there is no reward 'stage:judge'"):
        tw.run({**recipe, "evaluate": {"rewards": ["stage:judge"]}}, quiet=True)


# The measurement that ends a run


def test_all_models_are_asked_the_same_at_the_end(tree, data, tmp_path):
    """Scores are those that ``evaluate`` finds; only what changed is measured again."""
    (tmp_path / "own.py").write_text("def long(asked, answer):\n    return len(answer)\n")
    reward = f"{tmp_path / 'own.py'}:long"
    tree["evaluate"] = {"max_new_tokens": 8, "limit": 9, "rewards": [reward]}
    tree["eval"] = {"data": str(data)}
    run = tw.run(tree, quiet=True)
    last = run.results["eval"]
    names = [tree["model"], "stage:one", "stage:two", "stage:three"]
    assert [row["model"] for row in last["rows"]] == names
    assert [stage["name"] for stage in run.results["stages"]] == ["one", "two", "three"]
    for row, place in zip(last["rows"][1:], ("one", "two", "three"), strict=True):
        alone = examine.evaluate(str(run.folder / "stages" / place), [str(data)], limit=9, max_new_tokens=8)
        assert (row["loss"], row["exact_match"]) == (alone["loss"], alone["exact_match"])
        lengths = [len(sample["answers"][names.index(row["model"])]) for sample in last["samples"]]
        assert row["worth"][reward] == pytest.approx(sum(lengths) / len(lengths))
        firsts = [len(sample["answers"][0]) for sample in last["samples"]]
        wins = [(a > b) + (a == b) / 2 for a, b in zip(lengths, firsts, strict=True)]
        assert row["wins"][reward] == pytest.approx(sum(wins) / len(wins))
    assert "Side by side: 4 models" in run.report.read_text()
    found = doctor.examine(run.folder)
    assert not found.damaged
    assert "eval: finished; running the recipe again reuses it" in found.next
    assert planned(tree)["eval"] == ("reuse", "finished, nothing changed")
    assert planned(tree, start="two")["eval"] == ("run anew", "uses two")
    tree["eval"]["models"] = ["stage:three", "stage:one"]
    assert planned(tree)["eval"][0] == "run anew"
    again = tw.run(tree, quiet=True, only="eval").results["eval"]["rows"]
    by_name = {row["model"]: row["loss"] for row in last["rows"]}
    assert [(row["model"], row["loss"]) for row in again] == [
        (name, by_name[name]) for name in ("stage:three", "stage:one")
    ]


_OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_models_that_bring_code_are_asked_if_the_recipe_trusts_them(
    tiny_model_folder, data, tmp_path, capsys
):
    folder = tmp_path / "own"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "own.py").write_text(_OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": names}))
    recipe = {
        "model": str(folder), "data": {"train": str(data), "valid": str(data)}, "train": {"max_steps": 1},
        "evaluate": {"limit": 2, "max_new_tokens": 2}, "output": str(tmp_path / "run"), "precision": "fp32",
        "trust_remote_code": True, "eval": True,
    }  # fmt: skip
    run = tw.run(recipe)
    assert [row["model"] for row in run.results["eval"]["rows"]] == [str(folder), "stage:sft"]
    assert capsys.readouterr().err.count(f"running Python code that comes with {folder}") == 1
    recipe |= {"eval": {"trust_remote_code": False}, "output": str(tmp_path / "other")}
    with pytest.raises(UserError, match=r"eval: .*wants to run its own Python code"):
        tw.run(recipe, quiet=True)


def test_what_cannot_be_asked_at_the_end_is_told_before_anything_runs(tree, data, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"instruction": ""}\n')
    tree["stages"].append(
        {"name": "judge", "objective": "reward", "data": {"train": str(tmp_path / "pairs.jsonl")}}
    )
    (tmp_path / "pairs.jsonl").write_text(
        "".join(f'{{"prompt": "Say {n}", "chosen": "{n}.", "rejected": "{n}!"}}\n' for n in range(9))
    )
    tree["eval"] = {"models": ["stage:one", "stage:judge", "nowhere"], "data": [str(tmp_path / "bad.jsonl")],
                    "evaluate": {"rewards": ["exact"]}}  # fmt: skip
    with pytest.raises(UserError) as caught:
        tw.run(tree, quiet=True)
    told = str(caught.value)
    for words in (
        "eval.models.1: stage 'judge' learns reward and does not answer",
        "eval.models.2: ",
        "bad.jsonl:1: ",
        "exact_match",
    ):
        assert words in told, told
    tree["eval"] = {"models": ["stage:oen"]}
    with pytest.raises(UserError, match=r"eval.data: there are no held-out files(.|\n)*did you mean 'one'"):
        tw.run(tree, quiet=True)
    tree["eval"], tree["stages"][0]["name"] = [1], "eval"
    with pytest.raises(UserError, match=r"no stage can be called 'eval'(.|\n)*eval: expected a mapping"):
        tw.run(tree, quiet=True)
    assert not Path(tree["output"]).exists()
