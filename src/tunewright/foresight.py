"""What a stage will take of memory, found by running its largest step on tensors without values.

It is the real step of the real model with the methods, objectives and techniques of the recipe, so that a new one of these
needs no formula of its own. Weights are not read: a config is enough.
"""

import gc
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tunewright.core import events
from tunewright.core.units import resident_bytes
from tunewright.jobs import Job
from tunewright.models.hollow import Hollow
from tunewright.stage_run import trainer_of
from tunewright.train import guard
from tunewright.train.measure import HeldOut

_AT_WORK = 112 << 20
"""Bytes that libraries come to hold as they compute: kernels made for shapes, scratch space, room in the heap."""
_COMPILING = 105 << 20
"""More of these where blocks are compiled."""


@dataclass(frozen=True)
class Foreseen:
    """Bytes, by what they are for."""

    process: int
    """The interpreter, what it has loaded, and data: there before the stage begins."""
    libraries: int
    """What libraries come to hold as they compute."""
    weights: int
    optimizer: int
    """Masters in fp32 and moments."""
    training: int
    """Gradients, activations and logits, at their most."""
    evaluation: int
    """What measuring takes before training, beside the weights."""

    @property
    def peak(self) -> int:
        """Resident memory at its most."""
        return (
            self.process
            + self.libraries
            + self.weights
            + max(self.optimizer + self.training, self.evaluation)
        )


def why_not(job: Job) -> str:
    """Why nothing can be foreseen of a stage; empty if it can."""
    if job.objective.others():
        return "it asks other models"
    return "" if next(iter(job.data.lengths), None) else "it has no data"


def foresee(job: Job) -> Foreseen:
    """The stage on this machine. In a process of its own: what is made without values stays out of all caches here.

    Raises:
        RuntimeError: the step cannot be taken without values; the message says why.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = resident_bytes()  # a child shares pages of files, which do not count as its own
    child = context.Process(target=_tell, args=(job, process, theirs), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: it uses one of its own
        child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = "the process that was to foresee it died"
    child.join()
    if isinstance(found, dict):
        return Foreseen(**found)
    raise RuntimeError(found)


def _tell(job: Job, process: int, to: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        to.send(vars(replace(foreseen(job), process=process)))
    except Exception as error:  # whatever an architecture does that shapes alone do not allow
        to.send(f"{type(error).__name__}: {error}")


def foreseen(job: Job, make: Callable[[], Hollow] = Hollow) -> Foreseen:
    """As :func:`foresee`, in this process; ``make`` gives what counts."""
    process, most, on = resident_bytes(), dict[str, int](), list[str]()
    with tempfile.TemporaryDirectory() as folder, make() as hollow:

        def note(done: str) -> None:
            most[done], hollow.most = hollow.most, hollow.live

        base = job.method.load_base(job.source, job.stage.precision)
        hollow.most = before = hollow.live
        if job.stage.evaluate.enabled and len(job.valid):
            HeldOut(job.objective, job.valid, job.stage.train.held_out_tokens).rehearse(base)
        evaluation = hollow.most - before
        model = job.method.apply(base)
        del base
        gc.collect()
        log = events.EventLog(Path(folder) / "events.jsonl", lambda event: on.extend(_techniques(event)))
        trainer = trainer_of(job, model, log, Path(folder), guard.Preemption())
        weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
        lasting = hollow.most = hollow.live
        trainer.largest_step(note)
        log.close()
    training = max(most[done] for done in ("prepared", "begun", "passed", "updated", "measured")) - lasting
    libraries = _AT_WORK + (_COMPILING if "compile" in on else 0)
    return Foreseen(process, libraries, weights, lasting - weights, training, evaluation)


def _techniques(event: Any) -> list[str]:
    return list(event["on"]) if event["kind"] == "fast" else []
