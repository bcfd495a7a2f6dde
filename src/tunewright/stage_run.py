"""One stage of a run: measure, train, measure, save."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tunewright import jobs
from tunewright.core import events, machine, store
from tunewright.core.errors import DamagedError
from tunewright.core.rng import sow
from tunewright.core.units import peak_memory_bytes
from tunewright.data.prepare import statistics
from tunewright.evaluate import card
from tunewright.evaluate.harness import Examination
from tunewright.fast import arena
from tunewright.jobs import Job
from tunewright.models.announce import announced
from tunewright.regularizers import Old
from tunewright.train import guard
from tunewright.train.loop import Trainer
from tunewright.train.measure import HeldOut
from tunewright.train.state import TrainState

Tree = dict[str, Any]


def _loss(objective: Any, model: Any, batch: Any) -> Any:
    with announced(model, batch):
        return objective.loss(model, batch)[0]


def trainer_of(
    job: Job, model: Any, log: events.EventLog, folder: Path, preemption: guard.Preemption
) -> Trainer:
    """What trains the model, to which the job's method has been applied."""
    stage = job.stage
    return Trainer(
        model, job.method, job.objective, job.data, job.valid, stage.train, stage.precision, log, folder,
        preemption, job.optimizer, stage.fast, job.regularizers, _old(job, model),
    )  # fmt: skip


def _old(job: Job, model: Any) -> list[Old | None]:
    """What each regularizer may look at."""
    device = next(model.parameters()).device

    def of(known: jobs.Known) -> Old:
        loss = partial(_loss, known.objective)
        return Old(partial(known.batches, device), loss, len(known.samples), partial(known.batch, device))

    return [of(known) if known else None for known in job.looked_at]


class StageRun:
    """One stage: measure, train, measure, save."""

    def __init__(
        self, job: Job, folder: Path, log: events.EventLog, drifted: list[str], preemption: guard.Preemption
    ) -> None:
        self.job, self.folder, self.log, self.drifted = job, folder, log, drifted
        self.preemption = preemption
        stage = job.stage
        self.exam = Examination(
            job.objective, job.codec, job.valid, job.asked, stage.evaluate, stage.train.held_out_tokens
        )

    def run(self, resumed: Callable[[], None]) -> Tree:
        """The metrics; ``resumed`` is called once it is clear that training can go on."""
        with arena.around(self.job.stage.fast):
            return self._run(resumed)

    def _run(self, resumed: Callable[[], None]) -> Tree:
        stage = self.job.stage
        sow(stage.train.seed, "init")
        model = self.job.method.load_base(self.job.source, stage.precision)
        before = self._measure(model, "before")
        arena.let_go()
        sow(stage.train.seed, "method")
        model = self.job.method.apply(model)
        trainer = trainer_of(self.job, model, self.log, self.folder, self.preemption)
        state = trainer.run(resumed)
        trainer.optimizer.release()  # what fitted beside it before training fits after it
        after = self._measure(model, "after")
        metrics = self._metrics(model, trainer, state, before, after)
        self._save(model, metrics)
        return metrics

    def _measure(self, model: Any, when: str) -> Tree:
        """Scores, from the file if this stage measured them before a kill."""
        if not self.job.stage.evaluate.enabled:
            return {}
        path = self.folder / f"{when}.json"
        if when == "before" and path.exists():
            try:
                scores = store.read_record(path)
                if scores.pop("asked", None) == self._asked():
                    return scores
            except DamagedError as error:
                self.log.emit("damaged", what=f"{error}; measured again")
        scores = self.exam.take(model, lambda done, of: self._progress(when, done, of))
        old = {name: self._on(known, model) for name, known in self.job.old.items()}
        scores |= {"old": old} if old else {}
        store.write_record(path, {**scores, "asked": self._asked()})
        self.log.emit("measure", when=when, **{k: v for k, v in scores.items() if k != "answers"})
        return scores

    def _on(self, known: jobs.Known, model: Any) -> float:
        """Loss on old data, nats a token."""
        return HeldOut(known.objective, known.samples, self.job.stage.train.held_out_tokens).loss(model)

    def _asked(self) -> str:
        """What decides the scores of the model to start from."""
        return store.sha256_json([self.job.stage.evaluate.model_dump(mode="json"), self.drifted])

    def _progress(self, when: str, done: int, of: int) -> None:
        self.log.emit("answering", when=when, done=done, of=of)

    def _metrics(self, model: Any, trainer: Trainer, state: TrainState, before: Tree, after: Tree) -> Tree:
        from tunewright.models.quantized_layers import parameter_count

        stage, total = self.job.stage, parameter_count(model)
        trained = sum(p.numel() for p in trainer.optimizer.parameters.values())
        samples, wins = self.exam.side_by_side(before, after), self.exam.wins(before, after)
        after |= {"wins": wins} if wins else {}
        if stage.evaluate.kl and self.exam.asks:
            reference = self.job.method.load_base(self.job.source, stage.precision)
            after["kl"] = self.exam.kl(model.eval(), reference.eval())
            self.log.emit("kl", nats=after["kl"])
        for scores in (before, after):
            scores.pop("answers", None)
        advised = {"advised": stage.advised.model_dump(mode="json")} if stage.advised else {}
        return {
            **advised, "name": stage.name, "model": stage.model, "method": stage.method, "objective": stage.objective,
            "optimizer": stage.optimizer, "precision": stage.precision,
            "train_config": stage.train.model_dump(mode="json"), "fast": trainer.techniques,
            "parameters": {"total": total, "trainable": trained, "share": trained / total},
            "method_report": self.job.method.report(model),
            "data": {"train": statistics(self.job.data), "valid": statistics(self.job.valid),
                     "padding_share": trainer.padding_share()},
            "before": before, "after": after, "samples": samples,
            "train": {"steps": state.step, "planned_steps": trainer.steps, "tokens": state.tokens,
                      "learned_tokens": state.learned_tokens, "seconds": state.seconds,
                      "tokens_per_second": state.tokens / max(state.seconds, 1e-9),
                      "best_step": state.best_step or state.step,
                      "skipped": state.skipped, "rollbacks": state.rollbacks, "peak_memory": peak_memory_bytes()},
            "artifact": f"stages/{stage.name}/{self.job.method.folder}",
            "lineage": self._lineage(),
        }  # fmt: skip

    def _lineage(self) -> Tree:
        return {
            "base": self.job.source.name, "base_sha256": self.job.inputs["base_sha256"],
            "license": card.licence_of(self.job.source),
            "drift": self.drifted,
            "inputs_sha256": store.sha256_json(self.job.inputs), "seed": self.job.stage.train.seed,
            "versions": machine.versions(), "hardware": machine.hardware(),
        }  # fmt: skip

    def _save(self, model: Any, metrics: Tree) -> None:
        """The artifact: weights, tokenizer with its template, model card; and its size into the metrics."""
        stage, method = self.job.stage, self.job.method
        facts = {
            "method": stage.method["name"], "base": self.job.source.reference, "precision": stage.precision,
            "base_sha256": metrics["lineage"]["base_sha256"], "trust_remote_code": stage.trust_remote_code,
            "max_length": self.job.codec.max_length,
        }  # fmt: skip
        target = self.folder / method.folder
        with store.artifact(target, **facts) as whole:
            method.export(model, whole)
            self.job.codec.tokenizer.save_pretrained(whole)
            weights = [p.stat().st_size for p in whole.rglob("*.safetensors")]
            metrics["artifact_bytes"] = sum(weights)
            store.write_text(whole / "README.md", card.text(metrics))
        self.log.emit("saved", path=str(target), bytes=metrics["artifact_bytes"])
