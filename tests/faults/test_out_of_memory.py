"""Row 10: where memory ends, the micro-batch halves; the global batch and its samples stay, and so does the loss."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lab import Lab, passed_once

from tunewright.core.errors import HardwareError
from tunewright.core.events import Event
from tunewright.train import ledger
from tunewright.train.loop import Trainer

SIZES = {"max_steps": 6, "tokens_per_batch": 192, "micro_tokens": None, "save_every": 2, "eval_every": 2,
         "lr": 1e-3}  # fmt: skip


class Limit:
    """An allocator that gives up above so many tokens, in the forward or the backward pass."""

    def __init__(self, trainer: Trainer, tokens: int, backward: bool = False, from_step: int = 0) -> None:
        self.trainer, self.tokens, self.backward, self.from_step = trainer, tokens, backward, from_step
        self.failures = 0
        trainer.model.register_forward_pre_hook(self._forward, with_kwargs=True)
        trainer.model.register_forward_hook(self._after)

    def _forward(self, _: Any, __: Any, given: dict[str, Any]) -> None:
        self.size = given["input_ids"].numel()
        if self._exceeds() and not (self.backward and torch.is_grad_enabled()):
            self._fail()

    def _after(self, _: Any, __: Any, output: Any) -> None:
        if self._exceeds() and self.backward and output.logits.requires_grad:
            output.logits.register_hook(lambda grad: self._fail())

    def _exceeds(self) -> bool:
        return self.size > self.tokens and self.trainer.state.step >= self.from_step

    def _fail(self) -> None:
        self.failures += 1
        size = self.size * 1_000_000
        raise RuntimeError(f"DefaultCPUAllocator: not enough memory: you tried to allocate {size} bytes.")


def losses(events: list[Event]) -> list[float]:
    """Of all steps."""
    return [event["loss"] for event in events if event["kind"] == "step"]


def trained(
    lab: Lab, name: str, limit: Callable[[Trainer], Any] = lambda trainer: None, **choices: Any
) -> Any:
    """A run's trainer, its events and whatever limited it."""
    events: list[Event] = []
    train = {**SIZES, **choices.pop("train", {})}
    data = {"max_length": 32}  # also pretraining's blocks are so short then
    trainer = lab.trainer(name, events.append, method="full", data=data, train=train, **choices)
    limited = limit(trainer)
    trainer.run()
    return trainer, events, limited


def warmed(lab: Lab, objective: str) -> str:
    """A model that has learned a little: at a loss of 8 one unit in the last place is 1e-6 already."""
    train = {"max_steps": 40, "eval_every": 0, "save_every": 0}
    trainer = lab.trainer("warm", objective=objective, method="full", data={"max_length": 32}, train=train)
    trainer.run()
    folder = lab.folder / "warm-model"
    shutil.copytree(lab.model, folder)
    trainer.model.save_pretrained(folder)
    return str(folder)


@pytest.mark.row(10)
@pytest.mark.parametrize(("objective", "precision"), passed_once())
def test_the_micro_batch_halves_and_nothing_else_changes(lab: Lab, tally, times, objective, precision):
    choices = {"objective": objective, "precision": precision, "model": warmed(lab, objective)}
    plain, plain_events, _ = trained(lab, "plain", **choices)
    limits = [
        (tokens, *at) for at in ((False, 0), (True, 3), (True, 0), (False, 3)) for tokens in (60, 100, 40)
    ]
    for limit in limits[:: times(12, 1)]:
        seen = trained(lab, f"{limit}", lambda t: Limit(t, *limit), **choices)  # noqa: B023
        check(tally, f"{limit}", plain, plain_events, seen, precision)


def check(
    tally: Any, name: str, plain: Trainer, plain_events: list[Event], seen: Any, precision: str
) -> None:
    """Memory did end, and the run equals the plain one."""
    trainer, events, limit = seen
    halved = [event for event in events if event["kind"] == "out-of-memory"]
    tally.add(limit.failures > 0 and bool(halved), f"{name}: memory never ended")
    same = ledger.read(trainer.record.ledger.path) == ledger.read(plain.record.ledger.path)
    tally.add(same, f"{name}: other samples than in the plain run")
    bound = 1e-6 if precision == "fp32" else 2e-2  # bf16 sums in another order; the next test is exact
    far = max(abs(a - b) for a, b in zip(losses(events), losses(plain_events), strict=True))
    tally.add(far <= bound, f"{name}: losses differ by {far:.2e}")
    if precision == "fp32":
        tally.note(f"largest difference in loss, {name}", far)


@pytest.mark.row(10)
@pytest.mark.parametrize(("objective", "precision"), passed_once())
def test_it_is_the_run_that_had_the_smaller_micro_batch_from_the_start(lab: Lab, tally, objective, precision):
    choices: dict[str, Any] = {"objective": objective, "precision": precision}
    limited, _, limit = trained(lab, "limited", lambda t: Limit(t, 60), **choices)
    smaller = {"micro_tokens": limited.state.micro_tokens}
    chosen, _, _ = trained(lab, "chosen", train=smaller, **choices)
    weights = limited.optimizer.weights()
    same = all(torch.equal(weights[name], tensor) for name, tensor in chosen.optimizer.weights().items())
    tally.add(limit.failures > 0 and same, f"{objective} {precision}: other weights")


@pytest.mark.row(10)
def test_a_resumed_run_keeps_the_size_that_fitted(lab: Lab, tally):
    whole, _, _ = trained(lab, "whole", lambda t: Limit(t, 60, from_step=1))
    trained(lab, "parts", lambda t: Limit(t, 60, from_step=1), train={"max_steps": 4, "schedule": "constant"})
    trainer, _, limit = trained(lab, "parts", lambda t: Limit(t, 60), train={"schedule": "constant"})
    tally.add(limit.failures == 0, "memory ended again at the size that had already failed")
    same = ledger.read(trainer.record.ledger.path) == ledger.read(whole.record.ledger.path)
    tally.add(same, "other samples after resuming")


@pytest.mark.row(10)
def test_evaluation_fits_because_it_was_tried_before_training(lab: Lab, tally):
    events: list[Event] = []
    trainer = lab.trainer("eval", events.append, method="full", train=SIZES)
    lengths = [len(sample["input_ids"]) for sample in trainer.valid]
    Limit(trainer, max(lengths))
    trainer.run()
    smaller = [event for event in events if event["kind"] == "out-of-memory" and "eval_tokens" in event]
    first_step = next(i for i, event in enumerate(events) if event["kind"] == "step")
    told_before = bool(smaller) and all(events.index(event) < first_step for event in smaller)
    tally.add(told_before, "held-out batches were not cut before the first step")
    tally.add(any(event["kind"] == "eval" for event in events), "nothing was evaluated")


@pytest.mark.row(10)
@pytest.mark.parametrize(("measured", "said"), [(0, "gradient_checkpointing"), (2, "data.valid")])
def test_a_sample_that_is_too_long_alone_is_named_as_such(lab: Lab, tally, measured, said):
    """One to learn from at the first step, one that is held out before it."""
    trainer = lab.trainer("hopeless", method="full", train={**SIZES, "eval_every": measured})
    Limit(trainer, 4)
    with pytest.raises(HardwareError, match="one sample alone is too much") as stopped:
        trainer.run()
    tally.add(said in str(stopped.value) and trainer.state.step == 0, str(stopped.value))
