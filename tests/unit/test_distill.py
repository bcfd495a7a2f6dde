"""Distillation: what a teacher says of a token, on whose answers, and what is kept of it."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tunewright as tw
from tunewright import objectives
from tunewright.core.errors import DataError, UserError
from tunewright.data.rows import Message, Row
from tunewright.data.template import ChatCodec
from tunewright.models.likelihood import IGNORED
from tunewright.objectives import Turn
from tunewright.objectives._divergence import divergences, with_rest
from tunewright.recipes import load, plugin_config

ROWS = [
    ("Say hello.", "Hello there, how are you?"),
    ("Name a colour.", "Blue."),
    ("And now?", "It is evening."),
]


def make(tokenizer: Any, teacher: Any, **choice: Any) -> Any:
    choice = {"name": "distill", "teacher": "model:x", **choice}
    codec = ChatCodec(tokenizer)
    made = objectives.create(choice, plugin_config("objectives", choice), codec)
    made.asked = {"model:x": lambda: SimpleNamespace(model=teacher.eval(), codec=codec, sha256="abc")}
    return made


def samples(objective: Any) -> list[Any]:
    talks = enumerate(ROWS)
    return list(
        objective.encode(
            Row(f"rows:{n}", (Message("user", q), Message("assistant", a))) for n, (q, a) in talks
        )
    )


def another(model: Any, seed: int = 1) -> Any:
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return other


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
def test_divergences_by_their_formulas(kind: Any) -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(5, 7, dtype=torch.float64).softmax(-1) for _ in range(2))
    mixed = 0.3 * p + 0.7 * q
    exact = {
        "forward": (p * (p / q).log()).sum(-1),
        "reverse": (q * (q / p).log()).sum(-1),
        "jensen_shannon": 0.3 * (p * (p / mixed).log()).sum(-1) + 0.7 * (q * (q / mixed).log()).sum(-1),
    }[kind]
    torch.testing.assert_close(divergences(kind, 0.3, p.log(), q.log()), exact)
    nowhere = p.log().clone()
    nowhere[:, 0] = -torch.inf
    assert divergences("forward", 0.5, nowhere, q.log()).isfinite().all()


def test_a_student_that_is_its_teacher_has_nothing_to_learn(make_model: Any, tokenizer: Any) -> None:
    model = make_model()
    for kind in ("forward", "reverse", "jensen_shannon"):
        objective = make(tokenizer, model, divergence=kind)
        loss, figures = objective.loss(model, objective.batch(samples(objective), torch.device("cpu")))
        assert abs(loss.item()) < 1e-6
        assert figures["cross_entropy"] > 1


def test_the_hard_share_is_cross_entropy(make_model: Any, tokenizer: Any) -> None:
    model, teacher = make_model(), another(make_model())
    losses = {}
    for hard in (0.0, 0.25, 1.0):
        objective = make(tokenizer, teacher, hard=hard, temperature=2.0)
        batch = objective.batch(samples(objective), torch.device("cpu"))
        losses[hard] = objective.loss(model, batch)[0].item()
    labels = batch["labels"]
    logits = model(input_ids=batch["input_ids"]).logits
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert losses[1.0] == pytest.approx(plain.item(), rel=1e-5)
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], rel=1e-5)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_kept_words_are_a_coarser_look_and_all_of_them_the_whole(
    make_model: Any, tokenizer: Any, kind: str
) -> None:
    model, teacher = make_model(), another(make_model())
    found = {}
    for top in (0, 4, len(tokenizer) - 1):
        objective = make(tokenizer, teacher, top=top, divergence=kind)
        batch = objective.batch(samples(objective), torch.device("cpu"))
        objective.begin(model, [batch])
        found[top] = objective.loss(model, batch)[0].item()
    assert 0 < found[4] < found[0]
    assert found[len(tokenizer) - 1] == pytest.approx(found[0], rel=2e-3)  # kept in 16 bits
    logs_NK = torch.randn(3, 4).log_softmax(-1)[:, :2]
    torch.testing.assert_close(with_rest(logs_NK).exp().sum(-1), torch.ones(3))


def test_the_teacher_is_asked_once_for_the_words_that_are_kept(make_model: Any, tokenizer: Any) -> None:
    model, teacher = make_model(), another(make_model(), seed=5)
    objective = make(tokenizer, teacher, top=4)
    batch = objective.batch(samples(objective), torch.device("cpu"))
    objective.begin(model, [batch])
    before = objective.loss(model, batch)[0].item()

    def closed() -> Any:
        raise AssertionError("asked again")

    objective.asked = {"model:x": closed}
    assert objective.loss(model, batch)[0].item() == before
    taken_up = make(tokenizer, teacher, top=4)
    taken_up.asked = {"model:x": closed}
    taken_up.set_state(objective.state())
    assert taken_up.loss(model, batch)[0].item() == before
    lost = {"teacher.table": torch.tensor(list(b"nowhere"), dtype=torch.uint8)}
    with pytest.raises(DataError, match="no longer in the cache"):
        taken_up.set_state(lost)


def test_the_teachers_answers_are_its_greedy_ones_and_kept(make_model: Any, tokenizer: Any) -> None:
    model, teacher = make_model(), another(make_model())
    objective = make(tokenizer, teacher, answers="teacher", longest=5)
    asked = samples(objective)
    batch = objective.collate(asked)
    assert "learned" not in asked[0]
    objective.begin(model, [batch])
    found = objective.explore(model, asked, Turn(0, 0))
    for question, answered in zip(asked, found, strict=True):
        ids = torch.from_numpy(question["input_ids"]).long()[None]
        exact = teacher.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
            eos_token_id=objective.codec.stop_ids, pad_token_id=objective.codec.pad_id,
        )[0].tolist()  # fmt: skip
        assert answered["input_ids"].tolist() == exact
        assert int(answered["learned"].sum()) == len(exact) - len(question["input_ids"])
    taken_up = make(tokenizer, model, answers="teacher", longest=5)
    taken_up.set_state(objective.state())
    again = taken_up.explore(model, asked, Turn(0, 0))
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(again, found, strict=True))
    with pytest.raises(ValueError, match="declares no state"):
        taken_up.set_state({"other": torch.zeros(1)})


def test_own_answers_are_drawn_anew_at_each_step(make_model: Any, tokenizer: Any) -> None:
    model = make_model()
    objective = make(tokenizer, another(model), answers="own", longest=6)
    asked = samples(objective)
    first, again, later = (objective.explore(model, asked, Turn(step, 0)) for step in (0, 0, 1))
    ids = [[s["input_ids"].tolist() for s in found] for found in (first, again, later)]
    assert ids[0] == ids[1] != ids[2]
    figures = objective.judged(model, asked)
    assert figures == objective.judged(model, asked)
    assert figures["loss"] == pytest.approx(figures["divergence"])


def recipe(model: Path, output: Path, **objective: Any) -> dict[str, Any]:
    return {
        "model": str(model), "data": "builtin:sums-valid", "precision": "fp32", "output": str(output),
        "method": "full", "train": {"max_steps": 4, "lr": 1e-2, "tokens_per_batch": 512}, "evaluate": {"generate": False},
        "objective": {"name": "distill", **objective},
    }  # fmt: skip


@pytest.mark.parametrize("answers", ["given", "teacher", "own"])
def test_a_run_comes_nearer_to_its_teacher(tiny_model_folder: Path, tmp_path: Path, answers: str) -> None:
    of_all = recipe(tiny_model_folder, tmp_path / "run", teacher="stage:big", answers=answers, longest=8)
    shared = {key: of_all.pop(key) for key in ("model", "data", "precision", "output", "method", "train")}
    big = {"name": "big", "objective": "sft", "evaluate": {"enabled": False}}
    run = tw.run({**shared, "stages": [big, {"name": "small", **of_all}]}, quiet=True)
    before, after = (run.results["stages"][1][when]["loss"] for when in ("before", "after"))
    assert 0 < after < before


def test_what_cannot_be_is_told_before_anything_runs(tiny_model_folder: Path, tmp_path: Path) -> None:
    for options, told in (
        ({}, "needs a teacher"),
        (
            {"teacher": "model:x", "top": 3, "answers": "own"},
            "top keeps what the teacher says of given answers",
        ),
    ):
        with pytest.raises(UserError, match=told):
            load(recipe(tiny_model_folder, tmp_path / "run", **options))
    for teacher, told in (
        ("stage:big", "no earlier stage"),
        (f"model:{tmp_path}/none", "there is no folder"),
    ):
        with pytest.raises(UserError, match=rf"objective\.teacher: .*{told}"):
            tw.run(recipe(tiny_model_folder, tmp_path / "run", teacher=teacher), quiet=True)


def test_another_tokenizer_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    words = json.loads((other / "tokenizer.json").read_text())
    added = max(token["id"] for token in words["added_tokens"]) + 1
    words["added_tokens"].append({**words["added_tokens"][-1], "id": added, "content": "<|new|>"})
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match=r"objective\.teacher: .* has another tokenizer"):
        tw.run(recipe(tiny_model_folder, tmp_path / "run", teacher=f"model:{other}"), quiet=True)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_logits_that_are_changed_after_the_output_layer_are_looked_at_as_they_are(
    make_model: Any, tokenizer: Any
) -> None:
    model, teacher = make_model(), another(make_model())
    objective = make(tokenizer, teacher)
    batch = objective.batch(samples(objective), torch.device("cpu"))

    def capped(module: Any, args: Any, output: Any) -> Any:
        output.logits = 3 * torch.tanh(output.logits / 3)
        return output

    model.register_forward_hook(capped)
    loss = objective.loss(model, batch)[0].item()
    kept = batch["labels"] != IGNORED
    p, q = (m(input_ids=batch["input_ids"]).logits[kept].log_softmax(-1) for m in (teacher, model))
    exact = (p.exp() * (p - q)).sum(-1).mean().item()
    assert math.isclose(loss, exact, rel_tol=1e-5)
