"""From a recipe to jobs that can run: everything is looked at first, all problems are told together."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from tunewright import methods, objectives, optimizers
from tunewright.core import machine, store
from tunewright.core.errors import HardwareError, ModelError, Problem, UserError
from tunewright.core.paths import folder_to_make
from tunewright.core.units import human_bytes
from tunewright.data import lint, prepare
from tunewright.data.rows import Row
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import Mixture
from tunewright.models import inspect
from tunewright.models.load import ModelSource, best_device, find, fingerprint, load_tokenizer, outline
from tunewright.recipes import DataConfig, Recipe, Stage, plugin_config
from tunewright.recipes.schema import as_data
from tunewright.train import readers

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Job:
    """One stage with all it needs, checked. ``source`` is the base, or the base of the earlier stage."""

    stage: Stage
    source: ModelSource
    method: methods.Method
    objective: objectives.Objective
    optimizer: optimizers.Optimizer
    codec: ChatCodec
    data: Mixture
    valid: Mixture
    asked: Sequence[Row]
    parent: "Job | None" = None
    """The job whose result this one starts from."""

    @property
    def earlier(self) -> str:
        """The earlier stage whose result this one starts from, or an empty string."""
        return self.parent.stage.name if self.parent else ""

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """All that decides the outcome, for telling whether a run folder is still this job's.

        Made once: it reads every byte of the base model.
        """
        stage = self.stage.model_dump(mode="json", exclude={"evaluate": True, "train": {"keep"}})
        return {
            **stage,
            "parent_sha256": self.parent.sha256() if self.parent else "",
            "base_sha256": fingerprint(self.source),
            "tokenizer_sha256": store.sha256_json(self.codec.tokenizer.backend_tokenizer.to_str()),
            "template_sha256": store.sha256_json(self.codec.tokenizer.chat_template or ""),
            "data_sha256": [table.facts["sha256"] for table in self.data.tables],
            "valid_sha256": [table.facts["sha256"] for table in self.valid.tables],
            "versions": machine.versions(),
            "machine": machine.identity(),
        }

    def sha256(self) -> str:
        """Of all inputs but the machine, on which a run may go on as on another."""
        return store.sha256_json({key: value for key, value in self.inputs.items() if key != "machine"})


def check(recipe: Recipe, progress: Progress = lambda name, rows: None) -> list[Job]:
    """The recipe's jobs, data tokenized. UserError with every problem of model, data and machine."""
    found = [*readers.missing(recipe.logs), *_output_problems(recipe.output)]
    jobs: dict[str, Job] = {}
    for stage in recipe.stages:
        job = _job(stage, jobs, progress, found)
        if job:
            jobs[stage.name] = job
    if found:
        raise UserError(dict.fromkeys(found))
    return list(jobs.values())


def _output_problems(output: str) -> tuple[Problem, ...]:
    try:
        folder_to_make(output, "output")
    except UserError as error:
        return error.problems
    return ()


def look(trees: Iterable[dict[str, Any]]) -> list[Problem]:
    """What else is wrong with stages whose recipe is: their models and data, as far as those are readable."""
    found: list[Problem] = []
    for tree in trees:
        found += _model_problems(tree)
        with suppress(ValidationError):  # told already, as a problem of the recipe
            found += _lint_only(DataConfig.model_validate(as_data(tree.get("data"))))
    return list(dict.fromkeys(found))


def _model_problems(tree: dict[str, Any]) -> tuple[Problem, ...]:
    model = tree.get("model")
    if not isinstance(model, str) or model.startswith("stage:"):
        return ()
    try:
        find(model, bool(tree.get("trust_remote_code")))
    except ModelError as error:
        return error.problems
    return ()


def _job(stage: Stage, earlier: dict[str, Job], progress: Progress, found: list[Problem]) -> Job | None:
    method = methods.create(stage.method, plugin_config("methods", stage.method))
    found += method.data_problems(stage.data)
    try:
        source, codec = _model(stage, earlier, method)
    except UserError as error:
        found += error.problems
        found += _lint_only(stage.data)
        return None
    objective = objectives.create(stage.objective, plugin_config("objectives", stage.objective), codec)
    try:
        data, valid = _data(stage, objective, codec, progress)
        asked = prepare.held_out_rows(stage.data, stage.evaluate.limit) if _asks(stage, codec) else []
    except UserError as error:
        found += error.problems
        return None
    parent = earlier.get(stage.model.removeprefix("stage:")) if stage.model.startswith("stage:") else None
    optimizer = optimizers.create(stage.optimizer, plugin_config("optimizers", stage.optimizer))
    return Job(stage, source, method, objective, optimizer, codec, data, valid, asked, parent)


def _model(stage: Stage, earlier: dict[str, Job], method: methods.Method) -> tuple[ModelSource, ChatCodec]:
    """Where the model is and how it reads; raises all that is wrong with model and machine."""
    problems: list[Problem] = []
    if stage.precision == "fp16" and best_device() == "cpu":
        problems.append(Problem("precision", "fp16 needs a GPU and there is none", "use precision: bf16"))
    if stage.model.startswith("stage:"):
        before = earlier.get(stage.model.removeprefix("stage:"))
        if before is None:  # its own problems are already told
            raise HardwareError(problems)
        source = before.source
        problems += _kept_apart(before)
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
    if objectives.kind(stage.objective["name"]).wants_conversations:
        codec.require_template()
    return source, codec


def _kept_apart(before: Job) -> list[Problem]:
    """Why nothing can start from an earlier stage's result: its adapter does not merge."""
    reason = before.method.keeps_apart(outline(before.source))
    if reason is None:
        return []
    name = before.stage.method["name"]
    what = f"stage {before.stage.name!r} is trained by {name}, which cannot be merged: {reason.en}"
    return [Problem("model", what, "choose a method for it that merges: tunewright list methods")]


def _found(stage: Stage, problems: list[Problem]) -> ModelSource:
    try:
        return find(stage.model, stage.trust_remote_code)
    except ModelError as error:
        raise ModelError([*problems, *error.problems]) from None


def _longest(stage: Stage, source: ModelSource, method: methods.Method) -> int:
    """The recipe's max_length, or what the method leaves of the model's context if that is shorter."""
    context = inspect.context_length(source)
    return min(stage.data.max_length, context - method.virtual_tokens()) if context else stage.data.max_length


def _memory(stage: Stage, source: ModelSource, method: methods.Method, shape: Any) -> list[Problem]:
    """A problem if the weights alone (and the optimizer's part, if all are trained) exceed what is free."""
    count = inspect.parameter_count(source)
    if count is None or best_device() != "cpu":
        return []
    trained = 0.0
    if method.folder == "model":
        trained = 16 * method.at_once(shape) / count  # fp32 master, two moments, gradient
    held = method.base_bytes if stage.precision == "bf16" or method.base_bytes < 2 else 4
    need, free = int(count * (held + trained)), inspect.available_memory()
    if need <= free:
        return []
    what = f"{source.name} needs at least {human_bytes(need)} of memory, {human_bytes(free)} is free"
    return [Problem("model", what, "use precision: bf16, method: lora, or a smaller model")]


def _lint_only(data: DataConfig) -> list[Problem]:
    """What is wrong with the data, when there is no tokenizer to go further."""
    problems: list[Problem] = []
    for files in (data.train, data.valid):
        try:
            report = lint.lint(prepare.sources(files))
        except UserError as error:
            problems += error.problems
            continue
        problems += report.problems if data.on_bad_row == "stop" else ()
    return problems


def _data(
    stage: Stage, objective: objectives.Objective, codec: ChatCodec, progress: Progress
) -> tuple[Mixture, Mixture]:
    key = codec.key() | {"objective": stage.objective}
    preparation = prepare.Preparation(objective.encode, key, stage.data.on_bad_row, progress)
    return prepare.mixture(preparation, stage.data, stage.train.seed)


def _asks(stage: Stage, codec: ChatCodec) -> bool:
    return stage.evaluate.enabled and stage.evaluate.generate and codec.has_template


def with_source(job: Job, source: ModelSource) -> Job:
    """The job on another base: the result of the earlier stage, once it is there."""
    return replace(job, source=source)
