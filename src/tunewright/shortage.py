"""Whether a stage will run out of memory, told before it begins, with the cheapest change that keeps it from that."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from tunewright import foresight, methods
from tunewright.core.machine import available_memory, own_limit
from tunewright.core.units import own_bytes, reserved_bytes
from tunewright.jobs import Job
from tunewright.models import anatomy
from tunewright.models.load import best_device, outline
from tunewright.recipes import plugin_config

Change = dict[str, Any]
_SURELY = 0.9
"""Of what is free a change that is named may need: what is foreseen may be a few percent off."""
_LEAST = 256
"""Tokens at a time that are not cut further."""
_STATE = 16
"""Bytes of a number that is trained: weight, master, two moments, gradient."""
_LOGIT = 10
"""Bytes of a logit where all are made: bf16, fp32 and the gradient of that."""


@dataclass(frozen=True)
class Shortage:
    """More is needed than is free; both in bytes, with what this process holds already."""

    stage: str
    need: int
    free: int
    change: Change
    """Dials of the recipe with which it fits, the cheapest first tried; empty if none of those tried does."""


def of(job: Job) -> Shortage | None:
    """What a stage lacks on a CPU; None if it fits, or if nothing can be foreseen."""
    free = min(available_memory() + own_bytes(), own_limit() - reserved_bytes())
    if best_device() != "cpu" or foresight.why_not(job) or _bound(job) < free:
        return None
    need = _need(job)
    if need is None or need <= free:
        return None
    surely = _SURELY * free
    others = ((change, other) for change, other in _changes(job) if other.stage != job.stage)
    fitting = (change for change, other in others if (_need(other) or free) <= surely)
    return Shortage(job.name, need, free, next(fitting, {}))


def _need(job: Job) -> int | None:
    with suppress(RuntimeError):  # an architecture that shapes alone do not allow to run
        return foresight.foresee(job).peak
    return None


def _bound(job: Job) -> float:
    """Bytes that it will hardly exceed, in a moment: what linear layers read and write counts as kept, twice."""
    stage, shape = job.stage, outline(job.source)
    held = 2 if stage.precision == "bf16" else 4
    tokens = min(stage.train.micro_tokens or stage.train.tokens_per_batch, stage.train.tokens_per_batch)
    kept = 2 * tokens * held * anatomy.numbers_per_token(anatomy.linears(shape))
    vocabulary = int(getattr(shape.config.get_text_config(), "vocab_size", 0))
    weights = held * sum(p.numel() for p in shape.parameters())
    stacked = (
        8 if any(p.dim() > 2 for p in shape.parameters()) else 1
    )  # experts in one tensor are no linear layers
    trained = _STATE * job.method.at_once(shape)
    return float(2 * weights + trained + stacked * kept + tokens * vocabulary * _LOGIT + (1 << 29))


def _changes(job: Job) -> Iterator[tuple[Change, Job]]:
    """The cheapest in time first; other methods than the recipe's last."""
    train = job.stage.train
    most = train.micro_tokens or train.tokens_per_batch
    for size in (most >> 1, most >> 2):
        if size >= _LEAST:
            yield from _with(job, {"train.micro_tokens": size})
    yield from _with(job, {"train.gradient_checkpointing": True})
    yield from _with(
        job, {"train.gradient_checkpointing": True, "train.micro_tokens": max(_LEAST, most >> 3)}
    )
    for name in ("lora", "qlora"):
        if job.stage.method["name"] != name and job.method.folder == "model":
            yield from _with(job, {"method": name, "train.micro_tokens": max(_LEAST, most >> 2)})


def _with(job: Job, change: Change) -> Iterator[tuple[Change, Job]]:
    own = {key.removeprefix("train."): value for key, value in change.items() if key.startswith("train.")}
    stage = job.stage.model_copy(update={"train": job.stage.train.model_copy(update=own)})
    method = job.method
    if "method" in change:
        choice = {"name": change["method"]}
        method = methods.create(choice, plugin_config("methods", choice))
        stage = stage.model_copy(update={"method": choice})
        if method.problems(outline(job.source)):
            return
    yield change, replace(job, stage=stage, method=method)
