"""What a stage starts from: a model that is there, or what an earlier stage makes of one; all that is wrong is told."""

from typing import Any, Protocol

from tunewright import objectives
from tunewright.core import machine
from tunewright.core.errors import HardwareError, ModelError, Problem
from tunewright.core.units import human_bytes
from tunewright.data.template import ChatCodec
from tunewright.methods import Method
from tunewright.models import inspect
from tunewright.models.load import (
    ModelSource,
    begin_fingerprint,
    best_device,
    find,
    load_tokenizer,
    outline,
)
from tunewright.recipes import EARLIER, Stage


class Before(Protocol):
    """An earlier stage, checked."""

    @property
    def stage(self) -> Stage:
        """As the recipe has it."""

    @property
    def source(self) -> ModelSource:
        """What it starts from itself, in the end."""

    @property
    def method(self) -> Method:
        """How it is trained."""


def base(stage: Stage, before: Before | None, method: Method) -> tuple[ModelSource, ChatCodec]:
    """Where the model is and how it reads. ``before`` is the stage that it names, if that one can be run.

    Raises:
        UserError: with all that is wrong with model and machine; with nothing if it is told of ``before`` already.
    """
    problems: list[Problem] = []
    if stage.precision == "fp16" and best_device() == "cpu":
        problems.append(Problem("precision", "fp16 needs a GPU and there is none", "use precision: bf16"))
    if before:
        source = before.source
        problems += _kept_apart(before)
    elif stage.model.startswith(EARLIER):
        raise HardwareError(problems)
    else:
        source = _found(stage, problems)
    try:
        shape = outline(source)
        problems += [*_memory(stage, source, method, shape), *method.problems(shape)]
    except ModelError as error:
        problems += error.problems
    if problems:
        raise HardwareError(problems)
    codec = ChatCodec(load_tokenizer(source), stage.data.template, _longest(stage, source, method))
    if objectives.kind(stage.objective["name"]).wants != "texts":
        codec.require_template()
    return source, codec


def _kept_apart(before: Before) -> list[Problem]:
    """Why nothing can start from an earlier stage's result: its adapter does not merge."""
    reason = before.method.keeps_apart(outline(before.source))
    if reason is None:
        return []
    name = before.stage.method["name"]
    what = f"stage {before.stage.name!r} is trained by {name}, which cannot be merged: {reason.en}"
    return [Problem("model", what, "choose a method for it that merges: tunewright list methods")]


def _found(stage: Stage, problems: list[Problem]) -> ModelSource:
    try:
        source = find(stage.model, stage.trust_remote_code)
    except ModelError as error:
        raise ModelError([*problems, *error.problems]) from None
    begin_fingerprint(source)
    return source


def _longest(stage: Stage, source: ModelSource, method: Method) -> int:
    """The recipe's max_length, or what the method leaves of the model's context if that is shorter."""
    context = inspect.context_length(source)
    return min(stage.data.max_length, context - method.virtual_tokens()) if context else stage.data.max_length


def _memory(stage: Stage, source: ModelSource, method: Method, shape: Any) -> list[Problem]:
    """A problem if the weights alone (and the optimizer's part, if all are trained) exceed what is free."""
    count = inspect.parameter_count(source)
    if count is None or best_device() != "cpu":
        return []
    trained = 0.0
    if method.folder == "model":
        trained = 16 * method.at_once(shape) / count  # fp32 master, two moments, gradient
    held = method.base_bytes if stage.precision == "bf16" or method.base_bytes < 2 else 4
    need, free = int(count * (held + trained)), machine.available_memory()
    if need <= free:
        return []
    what = f"{source.name} needs at least {human_bytes(need)} of memory, {human_bytes(free)} is free"
    return [Problem("model", what, "use precision: bf16, method: lora, or a smaller model")]
