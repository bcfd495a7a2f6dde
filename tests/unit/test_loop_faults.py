"""The training loop when something goes wrong: numbers, losses, memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import LORA, OTHERS, MakeTrainer, Poison, checkpoints, learned, logged, losses, same, weights

from tunewright.core import events
from tunewright.core.errors import DivergedError, HardwareError
from tunewright.train import guard
from tunewright.train.loop import Trainer


def poison(trainer: Trainer, change: Poison, when: Callable[[torch.Tensor], bool]) -> None:
    """Change the logits of every forward pass whose token ids ``when`` says yes to."""

    def hook(model: Any, arguments: Any, given: dict[str, Any], output: Any) -> Any:
        if when(given["input_ids"]):
            output.logits = change(output.logits)
        return output

    trainer.model.register_forward_hook(hook, with_kwargs=True)


def watch(trainer: Trainer, see: Callable[[torch.Tensor], None]) -> None:
    """Show the token ids of every forward pass."""

    def hook(model: Any, arguments: Any, given: dict[str, Any]) -> None:
        see(given["input_ids"])

    trainer.model.register_forward_pre_hook(hook, with_kwargs=True)


def at_steps(trainer: Trainer, *steps: int) -> Callable[[torch.Tensor], bool]:
    """While learning in these steps (from 1)."""
    return lambda ids: trainer.model.training and trainer.state.step + 1 in steps


def holds(trainer: Trainer, *samples: int) -> Callable[[torch.Tensor], bool]:
    """Where one of these samples is in the batch."""
    wanted = [trainer.data[i]["input_ids"].tolist() for i in samples]
    return lambda ids: any(row[: len(want)] == want for row in ids.tolist() for want in wanted)


# The rehearsal


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing is taken to fit untried."""
    monkeypatch.setattr(guard, "available_memory", lambda: 1 << 20)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("method", ["full", LORA], ids=["full", "lora with dropout"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_rehearsal_changes_nothing(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, precision: str
) -> None:
    settings = {"method": method, "precision": precision, "lr": 0.01, "max_steps": 6, "micro_tokens": 32,
                "valid": OTHERS, "eval_every": 2}  # fmt: skip
    rehearsed = make_trainer(folder="rehearsed", **settings)
    state = rehearsed.run()
    monkeypatch.setattr(Trainer, "_rehearse", lambda self: None)
    plain = make_trainer(folder="plain", **settings)
    plain_state = plain.run()
    plain_state.seconds = state.seconds
    assert plain_state == state
    assert same(weights(plain), weights(rehearsed))
    assert same(plain.optimizer.state(), rehearsed.optimizer.state())
    assert losses(tmp_path, "plain") == losses(tmp_path, "rehearsed")
    assert learned(tmp_path, "plain") == learned(tmp_path, "rehearsed")


@pytest.mark.usefixtures("little_memory")
def test_the_rehearsal_is_the_widest_micro_batch_before_the_first_step(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(micro_tokens=40, epochs=1)
    seen: list[tuple[int, int]] = []
    watch(trainer, lambda ids: seen.append((len(logged(tmp_path, "step")), ids.numel())))
    before = weights(trainer)
    trainer._rehearse()
    assert same(weights(trainer), before)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    ((_, rehearsed),) = seen
    trainer.run()
    assert rehearsed == max(size for _, size in seen[2:])
    assert [steps for steps, _ in seen[:3]] == [0, 0, 0]


def test_where_memory_is_plenty_nothing_is_rehearsed(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "available_memory", lambda: 1 << 40)
    trainer = make_trainer(micro_tokens=40)
    watch(trainer, lambda ids: pytest.fail("rehearsed"))
    trainer._rehearse()


@pytest.mark.usefixtures("little_memory")
def test_a_finished_run_is_not_rehearsed(make_trainer: MakeTrainer) -> None:
    make_trainer(max_steps=2).run()
    again = make_trainer(max_steps=2)
    seen: list[torch.Tensor] = []
    watch(again, seen.append)
    again.run()
    assert seen == []


# Numbers that are not finite


def nan_loss(logits: torch.Tensor) -> torch.Tensor:
    return logits * float("nan")


def nan_gradient(logits: torch.Tensor) -> torch.Tensor:
    return logits + (logits - logits.detach()).abs().sqrt()  # adds 0, whose slope is 0 * inf


@pytest.mark.parametrize(("change", "what"), [(nan_loss, "loss"), (nan_gradient, "gradient")])
@pytest.mark.parametrize(("precision", "micro_tokens"), [("fp32", 16), ("bf16", None)])
def test_a_bad_sample_stops_the_run_before_any_update_and_is_named(
    make_trainer: MakeTrainer,
    tmp_path: Path,
    change: Poison,
    what: str,
    precision: str,
    micro_tokens: int | None,
) -> None:
    trainer = make_trainer(
        precision=precision,
        save_every=1,
        max_steps=20,
        lr=0.01,
        tokens_per_batch=128,
        micro_tokens=micro_tokens,
    )
    poison(trainer, change, holds(trainer, 4))
    with pytest.raises(DivergedError) as caught:
        trainer.run()
    steps = len(losses(tmp_path))
    assert str(caught.value).startswith(f"step {steps + 1}: the {what} is not finite (gradient of ")
    assert "samples: table-train:5);" in str(caught.value)
    assert str(caught.value).endswith("nothing was updated")
    assert not trainer.optimizer.not_finite()
    assert all(bool(tensor.isfinite().all()) for tensor in weights(trainer).values())
    assert 4 in next(trainer.feed.from_step(steps)).tolist()
    assert list(learned(tmp_path)) == list(range(1, steps + 1))
    if steps:
        saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{steps:08d}" / "trainable.safetensors")
        assert same(saved, trainer.optimizer.weights())


def test_if_only_the_batch_as_a_whole_is_bad_all_its_samples_are_named(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=3, tokens_per_batch=128)
    poison(trainer, nan_loss, lambda ids: len(ids) > 2 and bool(len(logged_steps(trainer))))
    indices = next(trainer.feed.from_step(1))
    with pytest.raises(DivergedError) as caught:
        trainer.run()
    assert trainer.feed.names(indices) in str(caught.value)


def logged_steps(trainer: Trainer) -> list[events.Event]:
    return [event for event in events.read(trainer.folder / "events.jsonl") if event["kind"] == "step"]


@pytest.mark.parametrize("which", ["exp_avg", "exp_avg_sq"])
def test_bad_moments_stop_the_run_before_the_update(
    make_trainer: MakeTrainer, tmp_path: Path, which: str
) -> None:
    trainer = make_trainer(save_every=1, max_steps=9, lr=0.01)

    def spoil(event: events.Event) -> None:
        if event["kind"] == "checkpoint" and event["step"] == 3:
            trainer.optimizer.state()[f"model.norm.weight|{which}"][0] = float("nan")

    trainer.log.readers.append(spoil)
    with pytest.raises(DivergedError, match=rf"^step 4: not finite: {which} of model\.norm\.weight; nothing"):
        trainer.run()
    assert checkpoints(tmp_path)[-1] == "step-00000003"
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000003" / "trainable.safetensors")
    assert same(saved, trainer.optimizer.weights())


def test_no_checkpoint_is_kept_of_weights_that_are_not_finite(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(save_every=2, max_steps=4)

    def spoil(event: events.Event) -> None:
        if event["kind"] == "step" and event["step"] == 4:
            with torch.no_grad():
                trainer.optimizer.masters["model.norm.weight"][0] = float("inf")

    trainer.log.readers.append(spoil)
    with pytest.raises(DivergedError, match=r"step 4: not finite: weight model\.norm\.weight; no checkpoint"):
        trainer.run()
    assert checkpoints(tmp_path) == ["step-00000002"]


def test_under_fp16_a_gradient_that_no_scale_makes_finite_ends_the_run(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(precision="fp16", max_steps=60)
    poison(trainer, nan_gradient, lambda ids: True)
    with pytest.raises(DivergedError, match="gradient of "):
        trainer.run()


def test_a_step_that_fp16_skipped_is_not_said_to_be_learned_from(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(precision="fp16", max_steps=1)
    trainer.state.loss_scale = 2.0**60
    trainer.run()
    assert learned(tmp_path) == {1: []}


# Losses that jump


def far_off(logits: torch.Tensor) -> torch.Tensor:
    return logits * -8.0


SPIKES = {"lr": 0.01, "save_every": 12, "max_steps": 44, "keep": 9, "schedule": "constant"}


def test_a_spike_is_passed_over(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(**{**SPIKES, "save_every": 1, "max_steps": 40})
    poison(trainer, far_off, at_steps(trainer, 37))
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def keep(event: dict[str, Any]) -> None:
        if event["kind"] in ("step", "spike"):
            seen[event["step"]] = {n: t.clone() for n, t in trainer.optimizer.weights().items()}

    trainer.log.readers.append(keep)
    state = trainer.run()
    assert (state.step, state.skipped, state.spikes, state.rollbacks) == (40, 1, 0, 0)
    (event,) = logged(tmp_path, "spike")
    assert event["step"] == 37
    assert event["loss"] > event["recent"] == losses(tmp_path)[35]
    passed = next(trainer.feed.from_step(36))
    assert event["samples"] == trainer.feed.names(passed)
    assert len(losses(tmp_path)) == 39
    assert learned(tmp_path)[37] == []
    assert learned(tmp_path)[38] == next(trainer.feed.from_step(37)).tolist()
    assert same(seen[36], seen[37])
    assert not same(seen[37], seen[38])
    assert state.tokens == sum(
        trainer.feed.tokens(np.array(found)) for found in learned(tmp_path).values() if found
    )


def test_early_jumps_are_learned_from(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(**{**SPIKES, "max_steps": 12})
    poison(trainer, far_off, at_steps(trainer, 10))
    assert trainer.run().skipped == 0
    assert len(losses(tmp_path)) == 12


def test_three_spikes_in_a_row_go_back_to_the_checkpoint_before_them(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(**{**SPIKES, "save_every": 30})
    poison(trainer, far_off, at_steps(trainer, 37, 38, 39))
    state = trainer.run()
    assert (state.step, state.skipped, state.spikes, state.rollbacks) == (44, 3, 0, 1)
    assert [event["step"] for event in logged(tmp_path, "spike")] == [37, 38, 39]
    (event,) = logged(tmp_path, "rollback")
    assert (event["step"], event["to"]) == (39, 30)
    assert checkpoints(tmp_path) == ["step-00000030", "step-00000039", "step-00000044"]
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        one, other = (
            load_file(tmp_path / "run" / "checkpoints" / f"step-000000{n}" / name) for n in (30, 39)
        )
        assert same(one, other)
    found = learned(tmp_path)
    assert [step for step, samples in found.items() if not samples] == list(range(31, 40))
    assert list(found) == list(range(1, 45))


@pytest.mark.parametrize("save_every", [1, 10])
def test_three_spikes_do_not_end_a_run_that_has_checkpoints(
    make_trainer: MakeTrainer, save_every: int
) -> None:
    trainer = make_trainer(**{**SPIKES, "save_every": save_every, "keep": 2})
    poison(trainer, far_off, at_steps(trainer, 37, 38, 39))
    state = trainer.run()
    assert (state.step, state.skipped) == (44, 3)


def test_spikes_that_do_not_end_end_the_run_after_two_rollbacks(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(**{**SPIKES, "save_every": 34, "max_steps": 60})
    poison(trainer, far_off, at_steps(trainer, *range(37, 61)))
    with pytest.raises(
        DivergedError, match=r"^step 45: 3 losses in a row .* 2 rollbacks were made; lower train"
    ):
        trainer.run()
    assert len(logged(tmp_path, "rollback")) == 2
    assert len(logged(tmp_path, "spike")) == 9
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000034" / "trainable.safetensors")
    assert same(saved, trainer.optimizer.weights())


def test_without_a_checkpoint_to_go_back_to_three_spikes_end_the_run(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**{**SPIKES, "save_every": 0})
    poison(trainer, far_off, at_steps(trainer, 37, 38, 39))
    with pytest.raises(DivergedError, match=r"0 rollbacks were made; .* to have a checkpoint to go back to"):
        trainer.run()


def test_or_spikes_are_learned_from_where_that_is_asked(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(**SPIKES, on_spike="learn")
    poison(trainer, far_off, at_steps(trainer, 37, 38, 39))
    state = trainer.run()
    assert (state.step, state.skipped, state.rollbacks) == (44, 0, 0)
    assert len(losses(tmp_path)) == 44
    assert losses(tmp_path)[36] > 2 * losses(tmp_path)[35]
    assert learned(tmp_path)[37] == next(trainer.feed.from_step(36)).tolist()


@pytest.mark.parametrize(("kind", "step"), [("spike", 38), ("rollback", 39)])
def test_a_run_killed_among_spikes_ends_as_if_it_were_not(
    make_trainer: MakeTrainer, tmp_path: Path, kind: str, step: int
) -> None:
    settings = {**SPIKES, "save_every": 18, "method": LORA}

    def made(folder: str) -> Trainer:
        trainer = make_trainer(folder=folder, **settings)
        poison(trainer, far_off, at_steps(trainer, 37, 38, 39))
        return trainer

    def kill(event: events.Event) -> None:
        if (event["kind"], event.get("step")) == (kind, step):
            raise KeyboardInterrupt

    whole, killed = made("whole"), made("killed")
    state = whole.run()
    assert state.rollbacks == 1
    killed.log.readers.append(kill)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = made("killed")
    resumed_state = resumed.run()
    resumed_state.seconds = state.seconds
    assert resumed_state == state
    assert same(weights(resumed), weights(whole))
    assert learned(tmp_path, "killed") == learned(tmp_path, "whole")


def test_a_lost_ledger_does_not_claim_what_was_passed_over(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = {**SPIKES, "max_steps": 39}
    trainer = make_trainer(**settings)
    poison(trainer, far_off, at_steps(trainer, 37))
    assert trainer.run().skipped == 1
    before = learned(tmp_path)
    (tmp_path / "run" / "samples.jsonl").unlink()
    make_trainer(**settings).run()
    assert learned(tmp_path) == before


# Memory


class Allocator:
    """Wraps a model's forward pass: it fails above so many tokens while ``when`` says so."""

    def __init__(self, trainer: Trainer, limit: int, when: Callable[[], bool] = lambda: True) -> None:
        self.limit, self.when, self.forward = limit, when, trainer.model.forward
        self.largest = 0
        trainer.model.forward = self

    def __call__(self, *given: Any, **named: Any) -> Any:
        size = named["input_ids"].numel()
        if size > self.limit and self.when():
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        self.largest = max(self.largest, size)
        return self.forward(*given, **named)


MEMORY = {"lr": 0.01, "max_steps": 6, "tokens_per_batch": 128}


@pytest.mark.parametrize(("method", "limit"), [("full", 100), ("full", 45), ("lora", 60)])
def test_memory_that_ends_halves_the_micro_batch_and_changes_no_loss(
    make_trainer: MakeTrainer, tmp_path: Path, method: str, limit: int
) -> None:
    whole = make_trainer(method=method, folder="whole", **MEMORY)
    whole.run()
    small = make_trainer(method=method, folder="small", **MEMORY)
    allocator = Allocator(small, limit)
    state = small.run()
    told = [event["micro_tokens"] for event in logged(tmp_path, "out-of-memory", "small")]
    assert told == [128 >> n for n in range(1, len(told) + 1)]
    assert state.micro_tokens == told[-1]
    assert allocator.largest <= limit
    assert losses(tmp_path, "small") == pytest.approx(losses(tmp_path, "whole"), rel=1e-6)
    assert learned(tmp_path, "small") == learned(tmp_path, "whole")
    assert state.tokens == whole.state.tokens
    assert state.learned_tokens == whole.state.learned_tokens


@pytest.mark.parametrize("step", [2, 5])
def test_memory_that_ends_within_a_step_changes_no_loss(
    make_trainer: MakeTrainer, tmp_path: Path, step: int
) -> None:
    """As when another process takes memory for a moment: a part of the step's gradients is there already."""
    settings = {**MEMORY, "micro_tokens": 64}
    make_trainer(folder="whole", **settings).run()
    small = make_trainer(folder="small", **settings)
    passes: list[int] = []

    def at_the_second_pass_of_the_step() -> bool:
        passes.append(small.state.step + 1)
        return passes.count(step) == 2

    Allocator(small, 0, at_the_second_pass_of_the_step)
    assert small.run().micro_tokens == 32
    (event,) = logged(tmp_path, "out-of-memory", "small")
    assert event["step"] == step
    assert losses(tmp_path, "small") == pytest.approx(losses(tmp_path, "whole"), rel=1e-6)
    assert learned(tmp_path, "small") == learned(tmp_path, "whole")


def test_a_resumed_run_knows_what_fits(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    first = make_trainer(**{**MEMORY, "max_steps": 3})
    Allocator(first, 60)
    first.run()
    found = first.state.micro_tokens
    again = make_trainer(**MEMORY)
    Allocator(again, 60)
    assert again.run().micro_tokens == found
    assert len(logged(tmp_path, "out-of-memory")) == len({128 >> n for n in range(1, 8) if 128 >> n >= found})


def test_if_not_one_sample_fits_the_user_is_told(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(**{**MEMORY, "micro_tokens": 8})
    before = weights(trainer)
    Allocator(trainer, 4)
    longest = int(trainer.data.lengths.max())
    with pytest.raises(HardwareError, match=f"one sample alone is too much .* longest has {longest} tokens"):
        trainer.run()
    assert same(weights(trainer), before)
    assert losses(tmp_path) == []


def test_other_errors_of_the_model_are_not_taken_for_it(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(**MEMORY)

    def fail(*given: Any, **named: Any) -> Any:
        raise RuntimeError("shapes differ")

    trainer.model.forward = fail
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.run()
    assert logged(tmp_path, "out-of-memory") == []


def test_memory_that_ends_in_evaluation_changes_neither_its_loss_nor_the_training(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    settings = {**MEMORY, "method": LORA, "valid": OTHERS, "eval_every": 2}
    whole = make_trainer(folder="whole", **settings)
    whole.run()
    small = make_trainer(folder="small", **settings)
    Allocator(small, 30, lambda: not small.model.training)
    state = small.run()
    assert state.eval_tokens == [e["eval_tokens"] for e in logged(tmp_path, "out-of-memory", "small")][-1]
    assert state.micro_tokens == 0
    assert losses(tmp_path, "small") == losses(tmp_path, "whole")
    assert same(weights(small), weights(whole))
    measured = [[event["loss"] for event in logged(tmp_path, "eval", name)] for name in ("small", "whole")]
    # Products of fewer rows round otherwise, by a step of fp32 or two: one is 1e-6 of losses about 8.
    assert measured[0] == pytest.approx(measured[1], rel=2 * float(np.finfo(np.float32).eps))
