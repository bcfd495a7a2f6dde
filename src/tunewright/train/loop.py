"""The training loop. Methods decide what has gradients, objectives what the loss is; all else is here."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tunewright.core.errors import DivergedError
from tunewright.core.events import EventLog
from tunewright.core.rng import derive
from tunewright.core.units import peak_memory_bytes
from tunewright.data.batching import BatchPlan, cut
from tunewright.data.tokens import Mixture, Sample, take
from tunewright.fast import regional_compile
from tunewright.objectives import Batch, Objective
from tunewright.recipes import TrainConfig
from tunewright.train.checkpoint import Checkpoints
from tunewright.train.optimizer import MasterAdamW
from tunewright.train.schedule import rate
from tunewright.train.state import TrainState


@dataclass
class Trainer:
    """One stage's training: ``run`` goes from the newest checkpoint to the last step."""

    model: Any
    objective: Objective
    data: Mixture
    valid: Sequence[Sample]
    config: TrainConfig
    precision: str
    log: EventLog
    checkpoints: Checkpoints
    default_lr: float

    def __post_init__(self) -> None:
        self.optimizer = MasterAdamW(self.model, self.config, self.config.lr or self.default_lr)
        seed, budget = self.config.seed, self.config.tokens_per_batch
        self.plan = BatchPlan(self.data.epoch, self.data.lengths, budget, seed)
        self.steps = self.config.max_steps or self.plan.steps(self.config.epochs)
        self.state = TrainState()
        self._saved = 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def run(self) -> TrainState:
        """Train to the end (or to an early stop), restore the best weights, return the final state."""
        torch.set_flush_denormal(True)
        try:
            return self._run()
        finally:
            torch.set_flush_denormal(False)

    def _run(self) -> TrainState:
        self._resume()
        self._prepare()
        began, before = time.monotonic(), self.state.seconds
        self._began, self._tokens_before = began, self.state.tokens
        for indices in self.plan.start_at(self.state.step):
            if self._finished():
                break
            self._step(indices)
            self.state.seconds = before + time.monotonic() - began
            self._after_step()
        if self._saved != self.state.step:
            self._save()
        self._restore_best()
        return self.state

    def _resume(self) -> None:
        restored = self.checkpoints.restore(self.optimizer)
        if restored:
            self.state, self._saved = restored, restored.step
            self.log.emit("resume", step=restored.step)

    def _prepare(self) -> None:
        self.model.train()
        if self.config.gradient_checkpointing:
            self.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
            self.model.enable_input_require_grads()
        if self.config.compile:
            regional_compile.apply(self.model)
        share = {"padding_share": self.padding_share()}
        self.log.emit("train", steps=self.steps, step=self.state.step, samples=len(self.data), **share)

    def padding_share(self) -> float:
        """Padded positions of the first epoch as a share of all."""
        batches = self.plan.batches(0)
        micro = [m for b in batches for m in self._micro_batches(b)]
        padded = sum(len(m) * int(self.data.lengths[m].max()) for m in micro)
        return 1.0 - sum(int(self.data.lengths[b].sum()) for b in batches) / padded

    def _finished(self) -> bool:
        patience = self.config.early_stop
        return self.state.step >= self.steps or bool(patience and self.state.evals_since_best >= patience)

    def _micro_batches(self, indices: np.ndarray) -> list[np.ndarray]:
        return cut(indices, self.data.lengths, self.config.micro_tokens or self.config.tokens_per_batch)

    def _step(self, indices: np.ndarray) -> None:
        """One optimizer step on one global batch, in as many forward passes as micro_tokens asks for."""
        batches = [self._batch(list(take(self.data, m))) for m in self._micro_batches(indices)]
        weights = [self.objective.weight(b) for b in batches]
        loss, metrics = self._accumulate(batches, weights)
        if not np.isfinite(loss):
            raise DivergedError(
                f"the loss at step {self.state.step + 1} is {loss}; nothing was updated with it"
            )
        factor = rate(self.config, self.state.step, self.steps)
        norm = self._update(factor)
        self.state.step += 1
        self.state.tokens += int(self.data.lengths[indices].sum())
        self.state.learned_tokens += int(sum(weights))
        self._emit_step(loss, norm, factor, metrics)

    def _accumulate(self, batches: list[Batch], weights: list[float]) -> tuple[float, dict[str, float]]:
        """Gradients of the mean over the whole global batch: each part counts by its weight."""
        whole, loss = sum(weights), 0.0
        metrics: dict[str, float] = {}
        for i, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            torch.manual_seed(derive(self.config.seed, f"micro-{i}", self.state.step))
            with self._autocast():
                part, metrics = self.objective.loss(self.model, batch)
            (part * (weight / whole * self._scale)).backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach()) * weight / whole
        return loss, metrics

    def _update(self, factor: float) -> float:
        """Clip and step; returns the gradient norm. Under fp16 an overflow skips the update."""
        try:
            norm = self.optimizer.gather(self._scale)
        except DivergedError:
            if self.precision != "fp16":
                raise
            self.optimizer.drop()
            self.state.rescale(overflowed=True)
            return float("inf")
        self.optimizer.step(factor)
        if self.precision == "fp16":
            self.state.rescale(overflowed=False)
        return norm

    @property
    def _scale(self) -> float:
        return self.state.loss_scale if self.precision == "fp16" else 1.0

    def _batch(self, samples: list[Sample]) -> Batch:
        return {k: v.to(self.device) for k, v in self.objective.collate(samples).items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.float16) if self.precision == "fp16" else nullcontext()

    def _emit_step(self, loss: float, norm: float, factor: float, metrics: dict[str, float]) -> None:
        tokens = self.state.tokens - self._tokens_before
        self.log.emit(
            "step", step=self.state.step, steps=self.steps, loss=loss,
            grad_norm=norm if np.isfinite(norm) else None,
            lr=self.optimizer.lr * factor, tokens=self.state.tokens, memory=peak_memory_bytes(),
            tokens_per_second=tokens / max(1e-9, time.monotonic() - self._began), **metrics,
        )  # fmt: skip

    def _after_step(self) -> None:
        every, step = self.config, self.state.step
        if every.eval_every and step % every.eval_every == 0 and len(self.valid):
            loss = self.held_out_loss()
            best = self.state.measured(loss)
            self.log.emit("eval", step=step, loss=loss, best=best)
            if best and every.restore_best:
                self.checkpoints.save_best(self.optimizer, self.state)
        if every.save_every and step % every.save_every == 0:
            self._save()

    def _save(self) -> None:
        path = self.checkpoints.save(self.optimizer, self.state)
        self._saved = self.state.step
        self.log.emit("checkpoint", step=self.state.step, path=path.name)

    def _restore_best(self) -> None:
        """Without ``eval_every`` nothing was measured, and the last weights are the result."""
        if self.config.restore_best and 0 < self.state.best_step < self.state.step:
            self.checkpoints.restore_best(self.optimizer)
            self.log.emit("restore", step=self.state.best_step, loss=self.state.best_loss)

    def held_out_loss(self) -> float:
        """Mean loss over the held-out samples, in nats per supervised token."""
        return held_out_loss(self.model, self.objective, self.valid, self.config.tokens_per_batch)


@torch.no_grad()
def held_out_loss(model: Any, objective: Objective, samples: Sequence[Sample], budget: int) -> float:
    """Mean loss in nats per supervised token, over batches of at most ``budget`` tokens."""
    lengths = np.array([len(s["input_ids"]) for s in samples])
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = weights = 0.0
    for indices in cut(np.argsort(lengths, kind="stable"), lengths, budget):
        batch = {k: v.to(device) for k, v in objective.collate(list(take(samples, indices))).items()}
        weight = objective.weight(batch)
        total += float(objective.loss(model, batch)[0]) * weight
        weights += weight
    model.train(was_training)
    return total / weights
