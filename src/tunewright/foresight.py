"""What a stage will take of memory, found by running its largest step on tensors without values.

It is the real step of the real model with the methods, objectives and techniques of the recipe, so that a new one of these
needs no formula of its own. Weights are not read: a config is enough.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tunewright.core import events
from tunewright.core.units import resident_bytes
from tunewright.jobs import Job
from tunewright.models.hollow import Hollow
from tunewright.stage_run import trainer_of
from tunewright.train import guard


@dataclass(frozen=True)
class Foreseen:
    """Bytes, by what they are for."""

    process: int
    """The interpreter, libraries and data."""
    weights: int
    optimizer: int
    """Masters in fp32 and moments."""
    training: int
    """Gradients, activations and logits, at their most."""
    evaluation: int
    """What measuring takes beside weights and optimizer."""

    @property
    def peak(self) -> int:
        """Resident memory at its most."""
        return self.process + self.weights + self.optimizer + max(self.training, self.evaluation)


def foresee(job: Job) -> Foreseen:
    """The stage on this machine."""
    process, most = resident_bytes(), dict[str, int]()
    with tempfile.TemporaryDirectory() as folder, Hollow() as hollow:
        model = job.method.apply(job.method.load_base(job.source, job.stage.precision))
        log = events.EventLog(Path(folder) / "events.jsonl")
        trainer = trainer_of(job, model, log, Path(folder), guard.Preemption())
        weights = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
        lasting = hollow.live

        def note(done: str) -> None:
            most[done], hollow.most = hollow.most, hollow.live

        hollow.most = hollow.live
        trainer.largest_step(note)
        log.close()
    training = max(most[done] for done in ("prepared", "begun", "passed", "updated")) - lasting
    return Foreseen(process, weights, lasting - weights, training, most["measured"] - lasting)
