"""The training loop. Methods decide what has gradients, objectives what the loss is; all else is here."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from tunewright import fast
from tunewright.core.errors import DivergedError, few
from tunewright.core.events import EventLog
from tunewright.core.units import peak_memory_bytes
from tunewright.data.tokens import Mixture, Sample, take
from tunewright.methods import Clock, Method, Setting
from tunewright.models.memory import fitting
from tunewright.objectives import Batch, Objective, Turn
from tunewright.optimizers import Optimizer
from tunewright.recipes import TrainConfig
from tunewright.regularizers import Old, Regularizer, Start
from tunewright.train import guard
from tunewright.train.blame import Blame, bad_weights
from tunewright.train.feed import Feed
from tunewright.train.lesson import Lesson
from tunewright.train.measure import HeldOut
from tunewright.train.optimizer import Masters
from tunewright.train.passes import Accumulator, Pass
from tunewright.train.record import Record
from tunewright.train.rehearsal import Rehearsal
from tunewright.train.schedule import rate
from tunewright.train.state import TrainState

Result = TypeVar("Result")
_ON_CPU = 2048
"""Tokens in one forward pass where nobody said or measured how many: enough to fill a processor's matrix units."""


@dataclass
class Trainer:
    """One stage's training: ``run`` goes from the newest checkpoint to the last step.

    ``folder`` gets ``checkpoints/`` and the ledger of samples.
    """

    model: Any
    method: Method
    objective: Objective
    data: Mixture
    valid: Sequence[Sample]
    config: TrainConfig
    precision: str
    log: EventLog
    folder: Path
    preemption: guard.Preemption = field(default_factory=guard.Preemption)
    algorithm: Optimizer | None = None
    """How the masters are stepped; AdamW if not given."""
    switches: fast.Switches = True
    """Speed techniques."""
    regularizers: Sequence[Regularizer] = ()
    old: Sequence[Old | None] = ()
    """What each of them may look at."""

    def __post_init__(self) -> None:
        self.feed = Feed(self.data, self.objective, self.config, self.device)
        self.steps = self.feed.steps
        self.state = TrainState()
        self.method.begin(self.model, Setting(self.objective.codec, self._look, self.clock))
        self.objective.attach(self.model)
        for one in self.regularizers:
            one.attach(self.model)
        lr = self.config.lr or self.method.default_lr
        self.optimizer = Masters(
            self.model, self.config, lr, self.algorithm, self.method.lr_scale,
            lambda: self.method.before_step(self.model, self.clock),
        )  # fmt: skip
        self.passes = Accumulator(
            self.model,
            self.method,
            self.objective,
            self.optimizer,
            self.regularizers,
            self.precision == "fp16",
        )
        if self.regularizers or self.objective.needs_start:
            # before anything is restored: the model is as it starts
            start = self.objective.start = Start(self.model, self.optimizer.parameters)
            for one, old in zip(self.regularizers, self.old, strict=True):
                one.begin(start, old)
        self.record = Record(
            self.folder, self.config, self.feed, self.optimizer,
            {"objective": self.objective, "method": self.method}, self.log,
        )  # fmt: skip
        self.techniques: list[str] = []
        self.held_out = HeldOut(self.objective, self.valid, self.config.held_out_tokens)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def clock(self) -> Clock:
        """The step that is being taken."""
        return Clock(self.state.step, self.steps, self.config.seed)

    def _look(self) -> Iterator[Batch]:
        """The first epoch's batches, for a method that looks at data before it begins."""
        lessons = (Lesson(self.feed, indices) for indices in self.feed.from_step(0))
        return (batch for lesson in lessons for batch in lesson.batches(self._budget))

    def run(self, resumed: Callable[[], object] = lambda: None) -> TrainState:
        """Train to the end (or to an early stop), restore the best weights, return the final state.

        ``resumed`` is called once the checkpoint to go on from is loaded.

        Raises:
            DivergedError: a number is not finite, or the loss does not come back from a spike.
            HardwareError: not even one sample fits in memory.
            InterruptedRunError: a signal came; the checkpoint of the last step is saved.
        """
        with self.preemption.patient():
            self._resume()
            resumed()
            self._prepare()
            with fast.using(not self._finished() and self.switches, self._work(), self._tell_techniques):
                if not self.state.step:
                    self._fitted(self._begin)
                self._rehearse()
                share = {"padding_share": self.padding_share(), "micro_tokens": self._budget}
                self.log.emit(
                    "train", steps=self.steps, step=self.state.step, samples=len(self.data), **share
                )
                self._train()
        self.record.restore_best(self.state)
        self.objective.release(self.model)
        for one in self.regularizers:
            one.release(self.model)
        self.method.finish(self.model)
        return self.state

    def largest_step(self, told: Callable[[str], object] = lambda done: None) -> None:
        """One step on the samples that take most memory, and the largest part of what is held out, measured.

        ``told`` hears what is done. For those who run it on tensors without values.
        """
        self._prepare()
        with fast.using(self.switches, self._work(), self._tell_techniques):
            told("prepared")
            indices = self.feed.widest(self._budget)
            samples = self.feed.batch(indices)
            self.objective.begin(self.model, _Again(lambda: iter([samples])))
            lesson = self._lesson(indices)
            told("begun")
            again = (
                2 if self._budget < self.config.tokens_per_batch else 1
            )  # gradients of the one beside the other
            self.passes.over(lesson.batches(self._budget) * again, self.clock, self._scale)
            told("passed")
            self.optimizer.gather(self._scale)
            self._update(1.0, overflowed=False)
            told("updated")
            if self.config.eval_every and len(self.held_out):
                self.held_out.rehearse(self.model, self._tell_smaller)
            told("measured")

    def _work(self) -> fast.Work:
        tokens = self.steps * self.config.tokens_per_batch
        given = self.state.micro_tokens or self.config.micro_tokens
        if self.objective.explores:  # sizes cannot be tried on answers that are yet to be drawn
            given = given or self._budget
        portion = fast.Portion(
            self.config.tokens_per_batch, given, self._rehearsal.seconds, self._take, self.feed.share
        )
        return fast.Work(
            self.model,
            self.steps,
            tokens,
            self.feed.epochs,
            self._in_order,
            self.folder / "fast",
            portion,
            self.precision == "fp16",
            self.objective.is_changing,
            self.objective.explores or self.objective.rows > 1,
        )

    @property
    def _rehearsal(self) -> Rehearsal:
        return Rehearsal(self.feed, self.objective, self.passes, self.clock)

    def _take(self, budget: int) -> None:
        self.state.micro_tokens = budget

    def _in_order(self) -> Iterator[Batch]:
        """Every sample once, the shortest first."""
        return map(self.feed.batch, self.feed.in_order(self._budget))

    def _tell_techniques(self, reasons: dict[str, str]) -> None:
        on = [name for name, reason in reasons.items() if not reason]
        self.techniques = on
        self.log.emit("fast", on=on, off={name: reason for name, reason in reasons.items() if reason})

    def _train(self) -> None:
        began, before = time.monotonic(), self.state.seconds
        self._began, self._tokens_before = began, self.state.tokens
        for indices in self.feed.from_step(self.state.step):
            if self._finished() or self.preemption.asked:
                break
            self._step(indices)
            self.state.seconds = before + time.monotonic() - began
            self._after_step()
        self.record.save(self.state)

    def _resume(self) -> None:
        self.state = self.record.resume(self.state)
        self.held_out.budget = self.state.eval_tokens or self.held_out.budget

    def _prepare(self) -> None:
        self.model.train()
        if bad := bad_weights(self.model):
            raise DivergedError(f"the model to start from is not finite: {few(bad)}")
        if self.config.gradient_checkpointing:
            self.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
            self.model.enable_input_require_grads()

    def _rehearse(self) -> None:
        """Do once, before the first step, what will need most memory: learn from the widest micro-batch, measure
        on held-out samples. If either does not fit, it is cut smaller now and not after hours. Where memory is
        plenty nothing is tried, and training begins at once.
        """
        if self._finished():
            return
        if not guard.is_roomy(self.model, self._budget) and not self.objective.explores:
            self._fitted(self._rehearsal.widest)
        if self.config.eval_every and len(self.held_out):
            self.held_out.rehearse(self.model, self._tell_smaller)

    def padding_share(self) -> float:
        """Padded positions of the first epoch, or of the steps where they are fewer, as a share of all."""
        return self.feed.padding_share(self._budget)

    @property
    def _budget(self) -> int:
        """Tokens in one forward pass."""
        most = _ON_CPU if self.device.type == "cpu" else self.config.tokens_per_batch
        return self.state.micro_tokens or self.config.micro_tokens or min(most, self.config.tokens_per_batch)

    def _finished(self) -> bool:
        patience = self.config.early_stop
        return self.state.step >= self.steps or bool(patience and self.state.evals_since_best >= patience)

    def _step(self, indices: np.ndarray) -> None:
        """One optimizer step on one global batch, in as many forward passes as fit in memory."""
        lesson = self._lesson(indices)
        seen = self._fitted(partial(self._pass, lesson), lesson.longest)
        if not math.isfinite(seen.loss):
            self._stop_at("loss", indices)
        factor = rate(self.config, self.state.step, self.steps)
        norm = self.optimizer.gather(self._scale)
        overflowed = not math.isfinite(norm)
        if overflowed and (self.precision != "fp16" or self.state.loss_scale <= 1.0):
            self._stop_at("gradient", indices)
        if self.config.on_spike == "skip" and guard.is_spike(self.state.recent, seen.loss):
            self._pass_over(indices, seen.loss)
            return
        self._update(factor, overflowed)
        self.state.learned(seen.loss)
        self._count(lesson, seen)
        self.record.ledger.learned(self.state.step, [] if overflowed else indices)
        self._emit_step(seen, None if overflowed else norm, factor)

    def _pass(self, lesson: Lesson, budget: int) -> Pass:
        return self.passes.over(lesson.batches(budget), self.clock, self._scale)

    def _lesson(self, indices: np.ndarray) -> Lesson:
        """The step's samples; an objective that explores draws the model's answers to them."""
        if not self.objective.explores:
            return Lesson(self.feed, indices)
        asked = list(take(self.data, indices))
        turn = Turn(self.state.step, self.config.seed)
        return Lesson(self.feed, indices, self.objective.explore(self.model, asked, turn))

    def _count(self, lesson: Lesson, seen: Pass) -> None:
        self.state.step += 1
        self.state.tokens += lesson.tokens
        self.state.learned_tokens += int(seen.weight)

    def _begin(self, budget: int) -> None:
        """Let the objective look at all that will be learned or measured, so many tokens at a time."""

        def every() -> Iterator[Batch]:
            learned = map(self.feed.batch, self.feed.in_order(budget))
            return chain(learned, self.held_out.batches(self.device, budget))

        self.objective.begin(self.model, _Again(every))

    def _fitted(self, work: Callable[[int], Result], longest: int = 0) -> Result:
        """The pass at the micro-batch size in use, or at the largest half of it that memory allows."""

        def tell(budget: int) -> None:
            self.optimizer.drop()
            self.state.micro_tokens = budget
            self.log.emit("out-of-memory", step=self.state.step + 1, micro_tokens=budget)

        fix = "lower data.max_length, or set train.gradient_checkpointing: true"
        with guard.one_sample_fits("train", longest or int(self.data.lengths.max()), fix):
            return fitting(self._budget, 1, work, tell)

    def _update(self, factor: float, overflowed: bool) -> None:
        """One step of the optimizer. Under fp16 an overflow skips it and lowers the loss scale."""
        if bad := self.optimizer.not_finite():
            raise DivergedError(f"step {self.state.step + 1}: not finite: {few(bad)}; nothing was updated")
        if overflowed:
            self.optimizer.drop()
        else:
            clock = self.clock
            after = partial(self.method.after_update, self.model, clock)
            self.optimizer.step(factor, after, self.method.reads_gradients)
        if self.precision == "fp16":
            self.state.rescale(overflowed)

    def _stop_at(self, what: str, indices: np.ndarray) -> None:
        fault = Blame(self.model, self.optimizer, self.feed, self._alone).named(what, indices)
        step = self.state.step + 1
        raise DivergedError(f"step {step}: the {what} is not finite ({fault}); nothing was updated")

    def _alone(self, indices: np.ndarray) -> Pass:
        return self._pass(self._lesson(indices), self._budget)

    def _pass_over(self, indices: np.ndarray, loss: float) -> None:
        """The loss stands out: the batch is not learned from. Several in a row are the weights' fault."""
        self.optimizer.drop()
        self.state.step += 1
        self.state.passed_over()
        self.record.ledger.skipped(self.state.step, indices)
        names = self.feed.names(indices)
        self.log.emit("spike", step=self.state.step, loss=loss, recent=self.state.recent[-1], samples=names)
        if self.state.spikes >= guard.PATIENCE:
            self.record.roll_back(self.state)

    @property
    def _scale(self) -> float:
        return self.state.loss_scale if self.precision == "fp16" else 1.0

    def _emit_step(self, seen: Pass, norm: float | None, factor: float) -> None:
        tokens = self.state.tokens - self._tokens_before
        self.log.emit(
            "step", step=self.state.step, steps=self.steps, loss=seen.loss, grad_norm=norm,
            lr=self.optimizer.lr * factor, tokens=self.state.tokens, memory=peak_memory_bytes(),
            tokens_per_second=tokens / max(1e-9, time.monotonic() - self._began), **seen.metrics,
        )  # fmt: skip

    def _after_step(self) -> None:
        every, step = self.config, self.state.step
        if every.eval_every and step % every.eval_every == 0 and len(self.held_out):
            loss = self.held_out_loss()
            best = self.state.measured(loss)
            self.log.emit("eval", step=step, loss=loss, best=best)
            if best:
                self.record.save_best(self.state)
        if every.save_every and step % every.save_every == 0 and not self.state.spikes:
            self.record.save(self.state)  # while spikes come in a row, those from before them are kept

    def held_out_loss(self) -> float:
        """Mean loss over the held-out samples, in nats per supervised token."""
        return self.held_out.loss(self.model, self._tell_smaller)

    def _tell_smaller(self, budget: int) -> None:
        self.state.eval_tokens = budget
        self.log.emit("out-of-memory", step=self.state.step, eval_tokens=budget)


@dataclass(frozen=True)
class _Again:
    """Batches that can be gone through more than once."""

    made: Callable[[], Iterator[Batch]]

    def __iter__(self) -> Iterator[Batch]:
        return self.made()
