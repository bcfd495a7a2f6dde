"""The verbs as a user types them, on a tiny model."""

import json
import os
import signal
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import tunewright as tw
from tunewright import cli
from tunewright.data.rows import Message

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture
def tunewright(capsys, monkeypatch):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tunewright", *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return call


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "my.jsonl"
    rows = [{"prompt": f"Say {w} {n}.", "completion": f"{w} {n}"} for w in WORDS for n in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def recipe(tmp_path, data, tiny_model_folder):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_model_folder}\ndata: {{train: {data}, valid_share: 0.2}}\nprecision: fp32\n"
        "train: {max_steps: 6, lr: 1.0e-2, tokens_per_batch: 128}\n"
        f"evaluate: {{limit: 4, max_new_tokens: 4}}\noutput: {tmp_path / 'run'}\n"
    )
    return path


def test_run_trains_reports_and_prints_one_json_line(tunewright, recipe, tmp_path):
    code, out, _ = tunewright("run", recipe, "--json")
    assert code == 0
    line = json.loads(out.splitlines()[-1])
    assert line["run"] == str(tmp_path / "run")
    assert line["status"] == "finished"
    stage = line["results"]["stages"][0]
    assert stage["after"]["loss"] < stage["before"]["loss"]
    assert 0 < stage["parameters"]["trainable"] < stage["parameters"]["total"]
    for name in ("recipe.yaml", "manifest.json", "events.jsonl", "results.json", "report.html"):
        assert (tmp_path / "run" / name).is_file()
    card = (tmp_path / "run" / stage["artifact"] / "README.md").read_text()
    assert "## Licence of the base" in card
    assert "rank: 16" in card


def test_a_finished_run_is_reused_and_a_changed_one_refused(tunewright, recipe, tmp_path):
    assert tunewright("run", recipe)[0] == 0
    adapter = tmp_path / "run/stages/sft/adapter/adapter_model.safetensors"
    first, made = adapter.read_bytes(), adapter.stat().st_mtime_ns
    code, _, err = tunewright("run", recipe)
    assert code == 0
    assert "reused" in err
    assert adapter.stat().st_mtime_ns == made
    code, _, err = tunewright("run", recipe, "train.lr=0.02", "method.rank=4")
    assert code == 2
    assert "sft: train.lr: the run was begun with 0.01, now it is 0.02" in err
    assert "sft: method.rank: the run was begun with 16, now it is 4" in err
    assert adapter.read_bytes() == first
    assert tunewright("run", recipe, "train.lr=0.02", "--fresh")[0] == 0
    assert (tmp_path / "run.1/stages/sft/adapter/adapter_model.safetensors").read_bytes() == first
    assert adapter.read_bytes() != first


def test_drift_that_is_insisted_on_goes_on_and_is_recorded(tunewright, recipe, tmp_path):
    assert tunewright("run", recipe)[0] == 0
    code, out, _ = tunewright("run", recipe, "train.max_steps=9", "--allow-drift", "--json")
    assert code == 0
    stage = json.loads(out)["results"]["stages"][0]
    assert stage["train"]["steps"] == 9
    assert stage["lineage"]["drift"] == ["sft: train.max_steps: the run was begun with 6, now it is 9"]


def test_all_problems_of_recipe_model_and_data_are_told_together(tunewright, recipe, data, tmp_path):
    data.write_text('{"prompt": "a", "completion": ""}\n{"prompt": "b", "completion": 3}\n')
    code, _, err = tunewright("run", recipe, "model=/nowhere", "train.lr=-1", "trian.seed=1", "method.rnak=8")
    assert code == 2
    assert "Traceback" not in err
    for part in ("trian: there is no such option; fix: did you mean 'train'?", "train.lr:",
                 "method.rnak: there is no such option; fix: did you mean 'rank'?",
                 "there is no folder /nowhere", f"{data}:1: turn 2 (assistant) is empty", f"{data}:2:"):  # fmt: skip
        assert part in err, part
    assert not (tmp_path / "run").exists()


def test_bad_rows_stop_the_run_or_are_listed(tunewright, recipe, data, tmp_path):
    good = data.read_text()
    data.write_text(good + '\n{"prompt": "x", "completion": ""}\nnot json\n')
    code, _, err = tunewright("run", recipe)
    assert code == 2
    assert f"{data}:31:" in err
    assert f"{data}:32:" in err
    assert not (tmp_path / "run").exists()
    code, _, err = tunewright("run", recipe, "data.on_bad_row=skip")
    assert code == 0
    assert "left out" in err
    assert f"  {data}:31: " in err
    results = json.loads((tmp_path / "run/results.json").read_text())
    skipped = results["stages"][0]["data"]["train"]["skipped"]
    assert [s.split(": ")[0] for s in skipped] == [f"{data}:31", f"{data}:32"]


def test_fp16_is_refused_without_a_gpu(tunewright, recipe):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = tunewright("run", recipe, "precision=fp16")
    assert code == 2
    assert "precision: fp16 needs a GPU and there is none; fix: use precision: bf16" in err


def test_lint(tunewright, data, tiny_model_folder):
    code, out, _ = tunewright("lint", data)
    assert code == 0
    assert "rows: 30 (30 good" in out
    code, out, _ = tunewright("lint", data, "--model", tiny_model_folder, "--max-length", 5, "--json")
    assert code == 2
    report = json.loads(out)
    assert report["good"] == 0
    assert report["problems"][0]["what"] == "no assistant token is left within max_length 5"


def test_evaluate_chat_and_export(tunewright, recipe, data, tmp_path, tiny_model_folder):
    assert tunewright("run", recipe)[0] == 0
    run = tmp_path / "run"
    for model in (run, run / "stages/sft/adapter", tiny_model_folder):
        code, out, _ = tunewright("evaluate", model, "--data", data, "--limit", 4, "--json")
        assert code == 0
        scores = json.loads(out)
        assert scores["samples"] == 30
        assert scores["count"] == 4
    assert "exact match" in tunewright("evaluate", run, "--data", data, "--limit", 4)[1]

    code, out, _ = tunewright("chat", run, "--prompt", "Say one 1.", "--max-new-tokens", 4, "--json")
    assert code == 0
    assert json.loads(out)["answer"] == tw.load(str(run)).reply((Message("user", "Say one 1."),), 4)

    code, out, _ = tunewright("export", run, "--merge", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["merged"] < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(result["out"], dtype=torch.float32)
    speaker = tw.load(str(run), "fp32")
    ids = torch.tensor([speaker.codec.prompt((Message("user", "Say ten 2."),))])
    with torch.no_grad():
        difference = merged(input_ids=ids).logits - speaker.model(input_ids=ids).logits
    assert float(difference.abs().max()) < 1e-4

    code, out, _ = tunewright("export", run, "--out", tmp_path / "copy")
    assert code == 0
    assert (tmp_path / "copy/adapter_model.safetensors").read_bytes() == (
        run / "stages/sft/adapter/adapter_model.safetensors"
    ).read_bytes()
    assert tunewright("export", run, "--out", tmp_path / "copy")[0] == 2
    assert tunewright("export", tmp_path)[0] == 2
    assert tunewright("export", tiny_model_folder, "--merge")[0] == 2


def test_chat_keeps_the_conversation_until_new(tunewright, monkeypatch, tiny_model_folder):
    asked = iter(["Hello", "", "Again", "/new", "Again", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    code, out, _ = tunewright("chat", tiny_model_folder, "--max-new-tokens", 3)
    assert code == 0
    reply = tw.load(str(tiny_model_folder)).reply
    hello, again = Message("user", "Hello"), Message("user", "Again")
    first = reply((hello,), 3)
    second = reply((hello, Message("assistant", first), again), 3)
    afresh = reply((again,), 3)
    assert second != afresh  # else the test could not tell a kept conversation from a forgotten one
    assert out.partition("\n")[2] == f"{first}\n{second}\n{afresh}\n"


def test_an_unfinished_run_cannot_talk(tunewright, tmp_path):
    (tmp_path / "half/stages/sft").mkdir(parents=True)
    code, _, err = tunewright("chat", tmp_path / "half", "--prompt", "hi")
    assert code == 2
    assert "has not finished" in err


def test_texts_are_evaluated_without_answers(tunewright, tiny_model_folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat.\n\nThe dog ran home.\n")
    code, out, _ = tunewright("evaluate", tiny_model_folder, "--data", path, "--json")
    assert code == 0
    assert "exact_match" not in json.loads(out)


@pytest.mark.parametrize("what", ["objectives", "optimizers", "models", "templates", "data"])
def test_list(tunewright, what):
    code, out, _ = tunewright("list", what)
    assert code == 0
    listed = json.loads(tunewright("list", what, "--json")[1])
    assert [entry["name"] for entry in listed] == [line.split()[0] for line in out.splitlines()]


def test_the_schema_accepts_the_shipped_recipes_and_names_the_dials(tunewright):
    schema = json.loads(tunewright("list", "schema")[1])
    assert {"model", "data", "method", "objective", "train", "output", "stages"} <= set(schema["properties"])
    for dial in ("max_steps", "epochs", "lr", "tokens_per_batch", "save_every", "seed"):
        assert dial in schema["$defs"]["TrainConfig"]["properties"]


def test_errors_as_json(tunewright):
    code, out, _ = tunewright("run", "nowhere.yaml", "--json")
    assert code == 2
    assert json.loads(out)["status"] == "failed"


def test_ctrl_c_says_how_to_go_on(tunewright, recipe, monkeypatch):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("tunewright.train.loop.Trainer.run", interrupted)
    code, _, err = tunewright("run", recipe)
    assert code == 130
    assert "stopped by SIGINT" in err
    assert "the same command goes on from there" in err
