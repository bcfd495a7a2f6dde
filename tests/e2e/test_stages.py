"""Chains: a later stage begins from an earlier one's result."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tunewright as tw
from tunewright.core.errors import UserError
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
    from tunewright.models import inspect

    monkeypatch.setattr(inspect, "available_memory", lambda: 1000)
    recipe = {"model": str(tiny_model_folder), "data": str(data), "output": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"needs at least .* of memory, 1000 B is free"):
        tw.run(recipe, quiet=True)
    assert not (tmp_path / "run").exists()


def test_available_memory_is_a_number_of_bytes():
    from tunewright.models.inspect import available_memory

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
    import shutil

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
