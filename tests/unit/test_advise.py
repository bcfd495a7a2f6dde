"""The verb: what is asked, what is told, and the recipe that is written."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tunewright import advise, cli, recipes
from tunewright.advise import configs, facts
from tunewright.core.errors import UserError
from tunewright.recipes.schema import DataFile

ROOT = Path(__file__).parents[2]
PICO = configs.folder("builtin:pico")
PAIR = {"prompt": "Which unit?", "chosen": "Crates of twelve.", "rejected": "No idea."}
TALK = {"prompt": "Which unit do we ship in?", "completion": "Crates of twelve."}


def written(folder: Path, rows: list[dict[str, Any]], name: str = "my.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def talks(count: int) -> list[dict[str, Any]]:
    return [{**TALK, "prompt": f"Question {number}?"} for number in range(count)]


@pytest.mark.parametrize("size", ["llama-2-7b", "llama-2-70b", "mixtral-8x7b"])
@pytest.mark.parametrize("devices", ["1xH100", "8xH100", "64xH100"])
def test_a_plan_of_any_size_comes_at_once(size: str, devices: str) -> None:
    began = time.monotonic()
    found = advise.answer("", [f"model=shape:{size}", f"devices={devices}"])
    assert time.monotonic() - began < 1.0
    assert found.plans
    told = found.to_json()
    assert told["choice"] == told["plans"][0]["method"]["name"]
    assert json.loads(json.dumps(told)) == told


def test_no_heavy_library_is_imported_for_it() -> None:
    code = (
        "import sys; from tunewright import advise; advise.answer('', ['model=shape:llama-2-70b', 'devices=8xH200']); "
        "print(sorted({'torch', 'transformers', 'peft', 'numpy.f2py'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_people_read_a_table_and_reasons() -> None:
    told = CliRunner().invoke(cli.app, ["advise", "model=shape:llama-2-7b", "devices=8xH100", "goal=quality"])
    assert told.exit_code == 0, told.output
    assert "Choice: full, sft, bf16, zero2" in told.output
    assert "early stopping" in told.output
    told = CliRunner().invoke(cli.app, ["advise", "model=shape:llama-2-7b", "devices=1xH100", "--lang", "zh"])
    assert "选择：lora" in told.output
    assert "单卡微调大模型" in told.output
    told = CliRunner().invoke(cli.app, ["advise", "model=shape:gpt2", "devices=1xH100", "--json"])
    assert json.loads(told.output)["model"] == "shape:gpt2"


@pytest.mark.parametrize(
    ("rows", "kind", "objective"),
    [(talks(20), "conversations", "sft"), ([PAIR | {"prompt": f"{n}?"} for n in range(20)], "pairs", "dpo"),
     ([{"text": f"Running text number {n}."} for n in range(20)], "texts", "pretrain"),
     ([{"text": f"Some text {n}", "label": "ab"[n % 2]} for n in range(20)], "labels", "classification")],
)  # fmt: skip
def test_the_recipe_that_is_written_can_be_loaded(
    tmp_path: Path, rows: list[dict[str, Any]], kind: str, objective: str
) -> None:
    data = written(tmp_path, rows)
    found = advise.answer("", ["model=builtin:pico", f"data={data}", "devices=1x8GB", "goal=quality"])
    assert found.question.situation.data.kind == kind
    for language in ("en", "zh"):
        found.write(tmp_path / "advised.yaml", language)
        stage = recipes.load(tmp_path / "advised.yaml").stages[0]
        best = found.plans[0]
        assert (stage.method["name"], stage.objective["name"]) == (best.method, objective)
        assert (stage.train.lr, stage.train.tokens_per_batch) == (best.lr, best.batch)
        assert stage.data.max_length == best.choice.length
    text = (tmp_path / "advised.yaml").read_text(encoding="utf-8")
    assert "# 没有行会被截断" in text


def test_a_recipe_keeps_what_it_says_of_its_data(tmp_path: Path) -> None:
    first, second = written(tmp_path, talks(20), "a.jsonl"), written(tmp_path, talks(30)[20:], "b.jsonl")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"model: builtin:pico\ndata:\n  train: [{{path: '{first}', task: one}}, {{path: '{second}', task: two}}]\n"
        "  valid_share: 0.2\nevaluate: {max_new_tokens: 7}\nregularizers: l2sp\nobjective: {name: sft, neftune: 5}\n"
        "stages: [{name: first}, {name: second, model: 'stage:first', objective: dpo}]\n"
    )
    found = advise.answer(str(recipe), ["devices=1x8GB", "stage=first"])
    assert found.plans[0].method == "multi_task"
    found.write(tmp_path / "advised.yaml", "en")
    stage = recipes.load(tmp_path / "advised.yaml").stages[0]
    assert stage.data.valid_share == 0.2
    assert [file.task for file in stage.data.train] == ["one", "two"]
    assert stage.method["tasks"] == ["one", "two"]
    assert (stage.evaluate.max_new_tokens, stage.objective["neftune"], len(stage.regularizers)) == (7, 5, 1)
    second_stage = advise.answer(str(recipe), ["devices=1x8GB", "stage=second"])
    assert (second_stage.question.situation.model, second_stage.plans[0].choice.objective) == (
        "builtin:pico",
        "dpo",
    )


def test_a_large_plan_becomes_a_recipe_too(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
              "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = written(tmp_path, [{"text": "word " * 3000}, {"text": "more " * 3000}])
    found = advise.answer("", [f"model={tmp_path}", f"data={data}", "devices=2x24GB", "objective=pretrain"])
    found.write(tmp_path / "advised.yaml", "en")
    text = (tmp_path / "advised.yaml").read_text()
    assert "Planned for 2 devices" in text
    assert "gradient_checkpointing: true  #" in text
    assert recipes.load(tmp_path / "advised.yaml").stages[0].train.gradient_checkpointing


def test_a_size_without_weights_is_no_recipe(tmp_path: Path) -> None:
    found = advise.answer("", ["model=shape:gpt2", "devices=1xH100"])
    with pytest.raises(UserError) as caught:
        found.write(tmp_path / "advised.yaml", "en")
    assert len(caught.value.problems) == 2


def test_where_nothing_fits_no_recipe_is_written(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Say one.", "completion": "One."}\n' * 4)
    asked = ["advise", "model=builtin:pico", f"data={data}", "memory=300MB"]
    done = CliRunner().invoke(cli.app, [*asked, "--apply", str(tmp_path / "advised.yaml")])
    assert "Choice: " in done.output
    assert isinstance(done.exception, UserError)
    assert "no plan fits in 300.0 MB" in str(done.exception)
    assert "takes the least, 5" in str(done.exception)
    assert not (tmp_path / "advised.yaml").exists()


@pytest.mark.parametrize(("page", "language"), [("README.md", "en"), ("README.zh-CN.md", "zh")])
def test_the_readme_shows_what_is_printed(page: str, language: str) -> None:
    asked = ["advise", "model=shape:llama-2-70b", "devices=8xH200", "--lang", language]
    told = CliRunner().invoke(cli.app, asked).output
    ending = told[told.index({"en": "Choice:", "zh": "选择："}[language]) :]
    assert f"```text\n{ending}```" in (ROOT / page).read_text(encoding="utf-8")


def test_all_mistakes_are_told_at_once() -> None:
    asked = ["modle=x", "model=shape:llama2", "devices=8xH20", "memory=lots", "goal=sped", "deadline=soon", "objective=dpoo",
             "data=nowhere.jsonl", "word"]  # fmt: skip
    with pytest.raises(UserError) as caught:
        advise.answer("", asked)
    told = str(caught.value)
    expected = (
        "model",
        "llama-2",
        "H200",
        "lots",
        "'speed'",
        "like 2h",
        "'dpo'",
        "nowhere.jsonl",
        "word",
        "modle",
    )
    assert [word for word in expected if word not in told] == []


@pytest.mark.parametrize(
    "asked",
    [["devices=1xH100"], ["model=", "devices=1xH100"], ["model=3", "devices=1xH100"], ["model=shape:gpt2", "deadline=0h"],
     ["model=shape:gpt2", "memory=0GB"], ["model=shape:gpt2", "rows=-1"], ["model=shape:gpt2", "stage=other"],
     ["model=shape:gpt2", "data.trian=x"], ["model=shape:gpt2", "length=9" + "9" * 5000]],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(asked: list[str]) -> None:
    with pytest.raises(UserError):
        advise.answer("", [*asked, "devices=1xH100"])


def test_rows_of_data_that_is_there_are_not_given(tmp_path: Path) -> None:
    data = written(tmp_path, talks(3))
    with pytest.raises(UserError, match="told by the data"):
        advise.answer("", ["model=builtin:pico", f"data={data}", "rows=5", "devices=1xH100"])


def test_data_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWRIGHT_CACHE", str(tmp_path / "cache"))
    path = written(tmp_path, [*talks(40), TALK, TALK, {"prompt": "", "completion": ""}])
    first = facts.look((DataFile(path=str(path), task="ship"),), None)
    assert (first.rows, first.duplicates, first.problems, first.tasks) == (41, 1, 1, ("ship",))
    assert not first.counted
    monkeypatch.setattr(facts, "_read", lambda *args: pytest.fail("it was read again"))
    assert facts.look((DataFile(path=str(path), task="ship"),), None) == first


def test_a_tokenizer_counts_and_characters_estimate(tmp_path: Path) -> None:
    path = written(tmp_path, [{"prompt": "法国的首都是哪里？", "completion": "巴黎。"}, TALK])
    estimated, counted = (facts.look((DataFile(path=str(path)),), folder) for folder in (None, PICO))
    assert (estimated.counted, counted.counted) == (False, True)
    assert estimated.tokens == pytest.approx(counted.tokens, rel=0.6)
    assert facts.look((DataFile(path=str(path), weight=2),), None).tokens == 2 * estimated.tokens
