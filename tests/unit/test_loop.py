"""The one training loop, on a real model of two layers."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import LORA, OTHERS, MakeTrainer, killed_and_whole, logged, losses, same, weights

from tunewright.core import events
from tunewright.core.errors import DivergedError
from tunewright.train.lesson import Lesson
from tunewright.train.loop import Trainer
from tunewright.train.measure import HeldOut

# Learning


@pytest.mark.parametrize(("method", "share"), [("full", 0.8), ({"name": "lora", "rank": 8}, 0.92)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls(
    make_trainer: MakeTrainer, tmp_path: Path, method: Any, share: float, precision: str
) -> None:
    make_trainer(method=method, precision=precision, lr=0.02, max_steps=20).run()
    found = losses(tmp_path)
    assert len(found) == 20
    assert np.mean(found[-3:]) < share * found[0]


def test_only_what_the_method_trains_changes(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method="lora", lr=0.01, max_steps=3)
    before = weights(trainer)
    trainer.run()
    changed = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_two_runs_are_equal_to_the_last_bit(make_trainer: MakeTrainer) -> None:
    one, other = (make_trainer(method=LORA, folder=name, max_steps=5) for name in ("one", "other"))
    one.run()
    other.run()
    assert same(weights(one), weights(other))


def test_another_seed_is_another_run(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for seed in (0, 1):
        make_trainer(folder=str(seed), seed=seed, max_steps=3).run()
    assert losses(tmp_path, "0") != losses(tmp_path, "1")


def epoch(trainer: Trainer, start: int) -> list[np.ndarray]:
    """The batches from a step on, until every sample has come up."""
    batches: list[np.ndarray] = []
    for indices in trainer.feed.from_step(start):
        batches.append(indices)
        if sum(map(len, batches)) >= len(trainer.data):
            break
    assert sorted(np.concatenate(batches)) == list(range(len(trainer.data)))
    return batches


def test_epochs_are_steps_unless_steps_are_given(make_trainer: MakeTrainer) -> None:
    one = make_trainer(epochs=1)
    assert one.steps == len(epoch(one, 0)) > 1
    assert make_trainer(epochs=2).run().step == one.steps + len(epoch(one, one.steps))
    assert make_trainer(epochs=9, max_steps=2, folder="other").run().step == 2


def test_without_a_rate_the_methods_own_is_used(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(method="lora", max_steps=2, schedule="linear").run()
    make_trainer(method="lora", max_steps=1, lr=0.5, folder="given").run()
    assert [event["lr"] for event in logged(tmp_path, "step")] == pytest.approx([2e-4, 1e-4])
    assert [event["lr"] for event in logged(tmp_path, "step", "given")] == [0.5]


def test_tokens_are_counted(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(epochs=1)
    state = trainer.run()
    assert state.tokens == trainer.data.lengths.sum()
    assert state.learned_tokens == sum(int(sample["learned"][1:].sum()) for sample in trainer.data)
    assert state.seconds > 0


@pytest.mark.parametrize("steps", [1, 2, 0])
def test_the_log_tells_what_training_begins_with(
    make_trainer: MakeTrainer, tmp_path: Path, steps: int
) -> None:
    """The padding is that of the first epoch, or of the steps where they are fewer."""
    trainer = make_trainer(**({"max_steps": steps} if steps else {"epochs": 2}))
    trainer.run()
    (event,) = logged(tmp_path, "train")
    assert (event["steps"], event["step"], event["samples"]) == (trainer.steps, 0, len(trainer.data))
    batches = epoch(trainer, 0)[: steps or None]
    real = sum(int(trainer.data.lengths[b].sum()) for b in batches)
    padded = sum(len(b) * int(trainer.data.lengths[b].max()) for b in batches)
    assert event["padding_share"] == pytest.approx(1 - real / padded)


# Accumulation


def gradients(trainer: Trainer) -> tuple[int, float, dict[str, torch.Tensor]]:
    """Forward passes, loss and gradients of the first global batch."""
    lesson = Lesson(trainer.feed, next(trainer.feed.from_step(0)))
    parts = lesson.batches(trainer._budget)
    loss = trainer.passes.over(parts, trainer.clock).loss
    return len(parts), loss, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_many_micro_batches_have_the_gradient_of_one(make_trainer: MakeTrainer, method: str) -> None:
    count, loss, whole = gradients(make_trainer(method=method, tokens_per_batch=512))
    assert count == 1
    for micro_tokens in (8, 40, 64):
        count, parts_loss, parts = gradients(
            make_trainer(method=method, tokens_per_batch=512, micro_tokens=micro_tokens)
        )
        assert count > 2
        assert parts_loss == pytest.approx(loss, abs=1e-6)
        assert parts.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=0)


def test_the_gradient_of_a_batch_is_that_of_its_mean_over_supervised_tokens(
    make_trainer: MakeTrainer,
) -> None:
    _, loss, found = gradients(make_trainer(tokens_per_batch=512, micro_tokens=40))
    trainer = make_trainer(tokens_per_batch=512)
    total, count = torch.tensor(0.0), 0
    for sample in trainer.data:  # one by one, without padding
        ids = torch.tensor(sample["input_ids"], dtype=torch.long)
        learned = torch.tensor(sample["learned"][1:], dtype=torch.bool)
        log_probabilities = trainer.model(ids[None]).logits[0, :-1].log_softmax(-1)
        total = total - log_probabilities[torch.arange(len(ids) - 1), ids[1:]][learned].sum()
        count += int(learned.sum())
    (total / count).backward()
    assert loss == pytest.approx(float(total.detach()) / count, abs=1e-5)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=0)


# Resuming


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", LORA], ids=["full", "lora with dropout"])
@pytest.mark.parametrize("killed_at", [2, 5, 9])
def test_a_resumed_run_is_the_uninterrupted_one(
    make_trainer: MakeTrainer, tmp_path: Path, method: Any, precision: str, killed_at: int
) -> None:
    settings = {
        "method": method, "precision": precision, "lr": 0.01, "max_steps": 10, "micro_tokens": 32,
        "valid": OTHERS, "eval_every": 3, "save_every": 2,
    }  # fmt: skip
    killed_and_whole(make_trainer, tmp_path, killed_at, **settings)


def test_a_finished_run_is_not_trained_again(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    first = make_trainer(max_steps=4, lr=0.01)
    first.run()
    again = make_trainer(max_steps=4, lr=0.01)
    assert again.run().step == 4
    assert len(losses(tmp_path)) == 4
    assert same(weights(again), weights(first))


def test_checkpoints_are_kept_as_asked(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(max_steps=9, save_every=2, keep=2).run()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000009"]
    assert [event["step"] for event in logged(tmp_path, "checkpoint")] == [2, 4, 6, 8, 9]


# Held-out loss


def test_the_held_out_loss_is_the_mean_over_supervised_tokens(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(valid=OTHERS)
    alone = [
        (HeldOut(trainer.objective, [s], 64).loss(trainer.model), s["learned"][1:].sum())
        for s in trainer.valid
    ]
    expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    assert trainer.held_out_loss() == pytest.approx(expected)
    for budget in (8, 64, 4096):
        assert HeldOut(trainer.objective, trainer.valid, budget).loss(trainer.model) == pytest.approx(
            expected
        )


def test_measuring_is_without_dropout_and_leaves_the_model_as_it_was(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method={"name": "lora", "dropout": 0.9}, valid=OTHERS, lr=0.05, max_steps=3)
    trainer.run()
    trainer.model.train()
    assert trainer.held_out_loss() == trainer.held_out_loss()
    assert trainer.model.training
    trainer.model.eval()
    trainer.held_out_loss()
    assert not trainer.model.training


def test_evaluations_come_as_often_as_asked(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(valid=OTHERS, eval_every=2, max_steps=5).run()
    assert [event["step"] for event in logged(tmp_path, "eval")] == [2, 4]


def test_without_held_out_samples_nothing_is_measured(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(eval_every=1, early_stop=1, max_steps=3).run()
    assert logged(tmp_path, "eval") == []
    assert len(losses(tmp_path)) == 3


# A rate at which what is held out is soon forgotten.
FORGETS = {"valid": OTHERS, "lr": 0.03, "eval_every": 1, "max_steps": 60, "schedule": "constant"}


def test_training_stops_when_the_held_out_loss_no_longer_falls(make_trainer: MakeTrainer) -> None:
    state = make_trainer(early_stop=3, **FORGETS).run()
    assert state.step == state.best_step + 3 < 60
    assert state.evals_since_best == 3


def test_the_best_weights_are_kept(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(early_stop=3, **FORGETS)
    state = trainer.run()
    assert trainer.held_out_loss() == pytest.approx(state.best_loss, rel=1e-5)  # measured the plain way now
    (event,) = logged(tmp_path, "restore")
    assert (event["step"], event["loss"]) == (state.best_step, state.best_loss)


def test_or_the_last_ones_where_that_is_asked(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(early_stop=3, restore_best=False, **FORGETS)
    state = trainer.run()
    assert trainer.held_out_loss() == logged(tmp_path, "eval")[-1]["loss"] > state.best_loss
    assert logged(tmp_path, "restore") == []


def test_a_run_that_stopped_early_ends_with_the_best_weights_when_started_again(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    first = make_trainer(early_stop=3, **FORGETS)
    first.run()
    steps = len(losses(tmp_path))
    again = make_trainer(early_stop=3, **FORGETS)
    again.run()
    assert len(losses(tmp_path)) == steps
    assert same(weights(again), weights(first))


# The process


def test_training_leaves_the_processs_arithmetic_as_it_was(make_trainer: MakeTrainer) -> None:
    torch.set_flush_denormal(False)
    assert sys.float_info.min / 2 > 0  # a subnormal number; flushed, it is 0
    make_trainer(max_steps=1).run()
    assert sys.float_info.min / 2 > 0


# Memory


@pytest.mark.parametrize("method", ["full", LORA], ids=["full", "lora with dropout"])
def test_gradient_checkpointing_changes_no_loss(
    make_trainer: MakeTrainer, tmp_path: Path, method: Any
) -> None:
    for name, used in (("plain", False), ("checkpointed", True)):
        trainer = make_trainer(
            method=method, folder=name, lr=0.01, max_steps=4, micro_tokens=32, gradient_checkpointing=used
        )
        trainer.run()
        assert trainer.model.is_activation_checkpointing == used
    assert losses(tmp_path, "checkpointed") == pytest.approx(losses(tmp_path, "plain"), abs=1e-6)


# Numbers that are not finite


def test_a_model_that_is_not_finite_is_not_trained(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(save_every=1, max_steps=3)
    with torch.no_grad():
        trainer.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    before = weights(trainer)
    expected = r"the model to start from is not finite: weight model\.layers\.0\.mlp\.up_proj\.weight$"
    with pytest.raises(DivergedError, match=expected):
        trainer.run()
    assert same(weights(trainer), before)
    assert trainer.state.step == 0
    assert not any(tensor.any() for tensor in trainer.optimizer.state().values())
    assert losses(tmp_path) == []
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_steps_before_a_bad_one_are_kept(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(save_every=2, max_steps=9)

    def poison(event: events.Event) -> None:
        if event["kind"] == "step" and event["step"] == 3:
            with torch.no_grad():
                trainer.model.model.norm.weight.fill_(float("inf"))

    trainer.log.readers.append(poison)
    with pytest.raises(
        DivergedError, match=r"^step 4: the loss is not finite \(weight model\.norm\.weight\)"
    ):
        trainer.run()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


# fp16


def test_fp16_learns_with_a_scaled_loss(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(precision="fp16", lr=0.02, max_steps=12)
    trainer.state.loss_scale = 1024.0
    state = trainer.run()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]
    assert (state.loss_scale, state.scaled_steps) == (1024.0, 12)


def test_fp16_gradients_are_those_of_fp32_but_for_rounding(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for precision in ("fp32", "fp16"):
        trainer = make_trainer(precision=precision, folder=precision, max_steps=1)
        trainer.state.loss_scale = 1024.0
        trainer.run()
    (exact,), (rounded,) = (logged(tmp_path, "step", name) for name in ("fp32", "fp16"))
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=1e-2)
    assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=5e-2)


def test_an_fp16_overflow_halves_the_scale_and_skips_the_update(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(precision="fp16", max_steps=1)
    trainer.state.loss_scale = 2.0**60
    before = weights(trainer)
    state = trainer.run()
    assert same(weights(trainer), before)
    assert not any(tensor.any() for tensor in trainer.optimizer.state().values())
    assert (state.step, state.loss_scale, state.scaled_steps) == (1, 2.0**59, 0)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_fp16_finds_a_scale_by_itself(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(precision="fp16", max_steps=40, lr=0.01)
    trainer.state.loss_scale = 2.0**40
    before = weights(trainer)
    state = trainer.run()
    assert state.loss_scale < 2.0**40
    assert state.scaled_steps > 0
    assert not same(weights(trainer), before)


def test_every_logged_event_is_json_that_any_reader_takes(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(precision="fp16", max_steps=1)
    trainer.state.loss_scale = 2.0**60
    trainer.run()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(("micro_tokens", "at_a_time"), [(48, 48), (None, 128), (4096, 128)])
def test_held_out_rows_go_through_as_few_at_a_time_as_are_learned(
    make_trainer: MakeTrainer, micro_tokens: int | None, at_a_time: int
) -> None:
    trainer = make_trainer(valid=OTHERS, tokens_per_batch=128, micro_tokens=micro_tokens)
    assert trainer.held_out.budget == at_a_time
