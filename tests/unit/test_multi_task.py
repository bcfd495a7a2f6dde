"""Multi-task LoRA: each row trains, and is answered by, its own task's adapter and no other."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import tunewright as tw
from tunewright import methods
from tunewright.core.errors import ModelError, RecipeError, UserError
from tunewright.core.events import EventLog
from tunewright.data.prepare import held_out_rows
from tunewright.data.rows import Message, task_id
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import TASK, Mixture
from tunewright.methods.multi_task import MultiTask
from tunewright.models.announce import ROUTER, announced
from tunewright.models.generate import answer
from tunewright.objectives.sft import Config as SftConfig
from tunewright.objectives.sft import Sft
from tunewright.recipes import DataConfig, TrainConfig, plugin_config
from tunewright.serve import speaker
from tunewright.train.loop import Trainer
from tunewright.train.measure import HeldOut

TASKS = ("translate", "sum")
TALKS = {
    "translate": (
        ("cat", "猫"),
        ("Good morning to you", "早上好"),
        ("dog", "狗"),
        ("bird in the sky", "天上的鸟"),
    ),
    "sum": (("1 + 2", "3"), ("20 + 4 + 1", "25, that is all"), ("7 + 7", "14")),
}
CPU = torch.device("cpu")


def method(**options: Any) -> MultiTask:
    return MultiTask(plugin_config("methods", {"name": "multi_task", "tasks": TASKS, "rank": 4, **options}))


@pytest.fixture
def sft(tokenizer: Any) -> Sft:
    return Sft(SftConfig(), ChatCodec(tokenizer))


@pytest.fixture
def mixture(make_mixture: Callable[..., Any]) -> Mixture:
    tables = [make_mixture(TALKS[task], task).tables[0] for task in TASKS]
    return Mixture(tables, [1.0, 1.0], 0, TASKS)


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    """The tiny model with an adapter for each task, none of them zero."""
    torch.manual_seed(1)
    made = method().apply(make_model())
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return made


def of_task(model: Any, task: str) -> dict[str, Tensor]:
    """The parameters of a task's adapter."""
    end = f".{TASKS.index(task)}"
    return {n: p for n, p in model.named_parameters() if "lora_" in n and n.endswith(end)}


def alone(model: Any, base: Any, task: str) -> Any:
    """PEFT's own LoRA on the base, with the weights of one of the tasks, ready to train."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = get_peft_model(base, config, autocast_adapter_dtype=False)
    own = of_task(model, task)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(own[same_in_ours(name, task)])
    return lora


def same_in_ours(name: str, task: str) -> str:
    """Our name of one of PEFT's parameters."""
    return name.removeprefix("base_model.model.").replace(".default.weight", f".{TASKS.index(task)}")


def close(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# Gradients


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5, 6), (4, 0, 5, 3, 6, 1, 2)])
def test_a_mixed_batch_gives_each_task_the_gradients_of_a_lora_of_its_own(
    model: Any, make_model: Any, mixture: Mixture, sft: Sft, order: Sequence[int]
) -> None:
    samples = [mixture[i] for i in order]
    batch = sft.batch(samples, CPU)
    with announced(model, batch):
        loss, _ = sft.loss(model, batch)
    (loss * sft.weight(batch)).backward()
    for task in TASKS:
        lora = alone(model, make_model(), task)
        own = sft.batch([s for s in samples if s[TASK][0] == task_id(task)], CPU)
        assert len(own["input_ids"]) == len(TALKS[task])
        (sft.loss(lora, own)[0] * sft.weight(own)).backward()
        ours = of_task(model, task)
        expected = {same_in_ours(n, task): p.grad for n, p in lora.named_parameters() if "lora_" in n}
        assert ours.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0
            close(ours[name].grad, gradient, 1e-5 * max(1.0, float(gradient.abs().max())))


def test_a_step_moves_the_adapters_of_its_rows_and_no_other(
    make_model: Any, mixture: Mixture, sft: Sft, tmp_path: Path
) -> None:
    """Nor do the optimizer's means of earlier steps."""
    torch.manual_seed(0)
    made = method()
    model = made.apply(make_model())
    config = TrainConfig(
        tokens_per_batch=8, max_steps=14, lr=1e-2, warmup=0.0, weight_decay=0.1, on_spike="learn"
    )
    log = EventLog(tmp_path / "events.jsonl")
    trainer = Trainer(model, made, sft, mixture, (), config, "fp32", log, tmp_path)
    seen: list[dict[str, dict[str, Tensor]]] = []

    def look(event: Any) -> None:
        if event["kind"] in ("train", "step"):
            seen.append(
                {task: {n: p.detach().clone() for n, p in of_task(model, task).items()} for task in TASKS}
            )

    log.readers.append(look)
    trainer.run()
    log.close()
    taught = []
    for step, indices in zip(range(14), trainer.feed.from_step(0), strict=False):
        numbers = {int(mixture[int(i)][TASK][0]) for i in indices}
        assert len(numbers) == 1
        before, after = seen[step], seen[step + 1]
        moved = [t for t in TASKS if any(not torch.equal(before[t][n], after[t][n]) for n in before[t])]
        assert [task_id(task) for task in moved] == list(numbers)
        taught += moved
    assert set(taught) == set(TASKS)
    assert taught[1:] != sorted(taught[1:])  # the tasks took turns


# Which adapter is used


def test_rows_of_no_task_use_the_first(model: Any, make_model: Any) -> None:
    ids = torch.tensor([[5, 77, 1030, 9]])
    with torch.no_grad():
        expected = alone(model, make_model(), "translate")(input_ids=ids).logits
        close(model(input_ids=ids).logits, expected)
        with announced(model, {TASK: torch.tensor([0])}):
            close(model(input_ids=ids).logits, expected)


def test_the_held_out_loss_is_that_of_each_tasks_own(
    model: Any, make_model: Any, mixture: Mixture, sft: Sft
) -> None:
    total = weight = 0.0
    for task, table in zip(TASKS, mixture.tables, strict=True):
        tokens = sum(int(sample["learned"][1:].sum()) for sample in table)
        total += HeldOut(sft, table, 64).loss(alone(model, make_model(), task)) * tokens
        weight += tokens
    for budget in (1, 64, 512):
        assert HeldOut(sft, mixture, budget).loss(model) == pytest.approx(total / weight, abs=1e-5)


def test_answers_are_those_of_each_tasks_own(model: Any, make_model: Any, tokenizer: Any) -> None:
    codec = ChatCodec(tokenizer)
    asked = [(task, (Message("user", talk[0]),)) for task in TASKS for talk in TALKS[task]]
    asked = asked[::2] + asked[1::2]
    together = answer(model, codec, [p for _, p in asked], 8, tasks=[task for task, _ in asked])
    own = {task: alone(model, make_model(), task) for task in TASKS}
    assert together == [answer(own[task], codec, [prompt], 8)[0] for task, prompt in asked]
    first = answer(model, codec, [p for _, p in asked], 8)
    assert first == [answer(own["translate"], codec, [prompt], 8)[0] for _, prompt in asked]
    assert first != together


def test_a_task_that_was_not_trained_is_refused(model: Any) -> None:
    ids, told = torch.tensor([[1]]), r"a row is of a task .* one of translate, sum"
    with announced(model, {TASK: torch.tensor([task_id("poems")])}), pytest.raises(ModelError, match=told):
        model(input_ids=ids)
    told = "1 rows, and the tasks of 2"
    with announced(model, {TASK: torch.tensor([0, 0])}), pytest.raises(ValueError, match=told):
        model(input_ids=ids)


# A sample's task on its way into a batch


def test_a_task_has_a_number_of_its_own() -> None:
    numbers = {task_id(task) for task in ("", "a", "b", "A", "任务")}
    assert len(numbers) == 5
    assert task_id("") == 0
    assert all(0 <= number < 2**63 for number in numbers)


def test_samples_know_the_task_of_their_file(mixture: Mixture, sft: Sft) -> None:
    assert [int(sample[TASK][0]) for sample in mixture] == [task_id(t) for t in TASKS for _ in TALKS[t]]
    mixed = Mixture(mixture.tables, [1.0, 1.0], 0, ("", "sum"))
    assert TASK not in mixed[0]
    assert sft.batch([mixed[0], mixed[4]], CPU)[TASK].tolist() == [0, task_id("sum")]
    assert TASK not in sft.batch([mixed[0], mixed[1]], CPU)


def test_rows_that_are_asked_know_it_too(tmp_path: Path) -> None:
    for task in TASKS:
        rows = [{"prompt": question, "completion": said} for question, said in TALKS[task]]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [{"path": str(tmp_path / f"{task}.jsonl"), "task": task} for task in TASKS]
    rows = held_out_rows(DataConfig.model_validate({"train": files, "valid": files}), 100)
    assert {(row.task, row.family) for row in rows} == {(task, task) for task in TASKS}


# Recipes


@pytest.mark.parametrize(
    ("tasks", "files", "told"),
    [
        (("a", "b"), [("x", "a"), ("y", "b")], []),
        (("default",), [("x", "")], []),
        (("a",), [("x", "")], []),
        (
            ("a", "b"),
            [("x", "a"), ("y", "c")],
            ["data.train.1.task: there is no task 'c'", "of the task 'b'"],
        ),
        (("a", "b"), [("x", "a"), ("y", "")], ["data.train.1.task: names no task", "of the task 'b'"]),
        (("default",), [("x", "a")], ["data.train.0.task: there is no task 'a'", "of the task 'default'"]),
    ],
)
def test_tasks_of_method_and_data_must_agree(tasks: Any, files: Any, told: list[str]) -> None:
    data = DataConfig.model_validate({"train": [{"path": path, "task": task} for path, task in files]})
    problems = [str(problem) for problem in method(tasks=tasks).data_problems(data)]
    assert len(problems) == len(told)
    assert all(words in problem for words, problem in zip(told, problems, strict=True))


@pytest.mark.parametrize(
    ("tasks", "told"), [(["a", "A"], "named twice"), ([], "at least 1"), (["a/b"], "should match pattern")]
)
def test_tasks_become_folders_and_must_differ(tasks: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        method(tasks=tasks)


# On disk


def test_each_task_is_saved_as_an_ordinary_lora(model: Any, make_model: Any, tmp_path: Path) -> None:
    method().export(model, tmp_path)
    ids = torch.tensor([[5, 77, 1030, 9]])
    again = MultiTask.load(make_model(), tmp_path)
    for task in TASKS:
        assert sorted(path.name for path in (tmp_path / task).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        lora = PeftModel.from_pretrained(make_model(), tmp_path / task).eval()
        merged, kind = methods.load_adapter(
            tmp_path / task, methods.foreign_manifest(tmp_path / task), "fp32"
        )
        with torch.no_grad(), announced(model, {TASK: torch.tensor([task_id(task)])}):
            expected = model.eval()(input_ids=ids).logits
        with torch.no_grad(), announced(again, {TASK: torch.tensor([task_id(task)])}):
            close(again.eval()(input_ids=ids).logits, expected)
        with torch.no_grad():
            close(lora(input_ids=ids).logits, expected)
            close(kind.merge(merged)(input_ids=ids).logits, expected, 1e-4)


def test_a_task_folder_that_is_missing_or_another_is_told(
    model: Any, make_model: Any, tmp_path: Path
) -> None:
    method().export(model, tmp_path)
    path = tmp_path / "sum" / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        MultiTask.load(make_model(), tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    method(target_modules=["q_proj"]).export(method(target_modules=["q_proj"]).apply(make_model()), other)
    path.write_bytes((other / "sum" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"holds .* numbers, expected"):
        MultiTask.load(make_model(), tmp_path)
    path.write_bytes(whole)
    MultiTask.load(make_model(), tmp_path)


@pytest.fixture
def recipe(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    for task in TASKS:
        said = {"translate": "这是 {}", "sum": "{} in all"}[task]
        rows = [{"prompt": f"{task} {n}", "completion": said.format(n)} for n in range(30)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [{"path": str(tmp_path / f"{task}.jsonl"), "task": task} for task in TASKS]
    return {
        "model": str(tiny_model_folder), "data": {"train": files, "valid_share": 0.2}, "precision": "fp32",
        "method": {"name": "multi_task", "tasks": list(TASKS)},
        "train": {"max_steps": 8, "lr": 1e-2, "tokens_per_batch": 256},
        "evaluate": {"max_new_tokens": 4}, "output": str(tmp_path / "run"),
    }  # fmt: skip


def test_a_run_from_recipe_to_the_answer_of_a_task(recipe: dict[str, Any]) -> None:
    run = tw.run(recipe, quiet=True)
    (stage,) = run.results["stages"]
    assert stage["after"]["loss"] < stage["before"]["loss"]
    assert set(stage["after"]["families"]) == set(TASKS)
    assert stage["artifact_bytes"] > 4 * stage["parameters"]["trainable"]
    whole = run.speaker
    question = (Message("user", "sum 3"),)
    own = {task: speaker.load(str(run.artifact / task)) for task in TASKS}
    assert {task: one.method for task, one in own.items()} == dict.fromkeys(TASKS, methods.kind("lora"))
    assert whole.reply(question, 8) == own["translate"].reply(question, 8)
    asked = answer(whole.model, whole.codec, [question], 8, tasks=["sum"])[0]
    assert asked == own["sum"].reply(question, 8)
    assert asked != whole.reply(question, 8)
    with pytest.raises(ModelError, match="export the folder of one task instead"):
        MultiTask.merge(whole.model)
    assert whole.model.get_submodule(ROUTER).names == TASKS


def test_tasks_that_do_not_agree_are_told_before_the_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["method"]["tasks"] = ["translate", "poems"]
    with pytest.raises(UserError) as refused:
        tw.run(recipe, quiet=True)
    assert "data.train.1.task: there is no task 'sum' in method.tasks" in str(refused.value)
    assert "no file of data.train is of the task 'poems'" in str(refused.value)
    assert not (tmp_path / "run").exists()
