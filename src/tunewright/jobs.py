"""From a recipe to jobs that can run: everything is looked at first, all problems are told together."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from tunewright import comparison, methods, objectives, optimizers, regularizers
from tunewright.core import machine, store
from tunewright.core.errors import HardwareError, ModelError, Problem, UserError, nearest
from tunewright.core.paths import folder_to_make
from tunewright.core.units import human_bytes
from tunewright.data import formats, lint, prepare
from tunewright.data.rows import Row
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import Mixture
from tunewright.models import inspect
from tunewright.models.load import (
    ModelSource,
    begin_fingerprint,
    best_device,
    find,
    fingerprint,
    load_tokenizer,
    outline,
)
from tunewright.objectives import _rewards as rewards
from tunewright.recipes import DataConfig, Recipe, Stage, plugin_config
from tunewright.recipes.schema import as_data
from tunewright.regularizers import Regularizer
from tunewright.serve import speaker
from tunewright.train import readers

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Known:
    """Data that the model knew before, and the objective that tells how well."""

    objective: objectives.Objective
    samples: Mixture

    def sha256(self) -> list[str]:
        """Of its files."""
        return [table.facts["sha256"] for table in self.samples.tables]

    def batches(self, device: Any) -> Iterator[objectives.Batch]:
        """One sample each."""
        return (self.objective.batch([sample], device) for sample in self.samples)

    def batch(self, device: Any, indices: Sequence[int]) -> objectives.Batch:
        """Of these samples."""
        return self.objective.batch([self.samples[i] for i in indices], device)


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
    regularizers: Sequence[Regularizer] = ()
    looked_at: Sequence["Known | None"] = ()
    """Old data of each regularizer."""
    old: Mapping[str, "Known"] = field(default_factory=dict)
    """Old data that are measured, by what the recipe calls them."""
    asked_stages: Mapping[str, "Job"] = field(default_factory=dict)
    """Jobs whose results its objective asks, by what the recipe calls them: ``stage:NAME``."""
    asked_models: Mapping[str, str] = field(default_factory=dict)
    """Other models that it asks, ``model:FOLDER``, each with what tells it from others."""
    parent: "Job | None" = None
    """The job whose result this one starts from."""

    @property
    def name(self) -> str:
        """The stage's."""
        return self.stage.name

    @property
    def earlier(self) -> str:
        """The earlier stage whose result this one starts from, or an empty string."""
        return self.parent.stage.name if self.parent else ""

    @property
    def needs(self) -> list[str]:
        """The earlier stages whose results this one uses."""
        return [
            *([self.earlier] if self.earlier else []),
            *(job.name for job in self.asked_stages.values()),
        ]

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """All that decides the outcome, for telling whether a run folder is still this job's.

        Made once: it reads every byte of the base model.
        """
        stage = self.stage.model_dump(
            mode="json", exclude={"evaluate": True, "advised": True, "train": {"keep"}}
        )
        return {
            **stage,
            "parent_sha256": self.parent.sha256() if self.parent else "",
            "base_sha256": fingerprint(self.source),
            "tokenizer_sha256": store.sha256_json(self.codec.tokenizer.backend_tokenizer.to_str()),
            "template_sha256": store.sha256_json(self.codec.tokenizer.chat_template or ""),
            "data_sha256": [table.facts["sha256"] for table in self.data.tables],
            "rewards_sha256": rewards.files(self.stage.objective.get("rewards", ())),
            "others_sha256": self.others_sha256,
            "old_sha256": [known.sha256() if known else [] for known in self.looked_at],
            "valid_sha256": [table.facts["sha256"] for table in self.valid.tables],
            "versions": machine.versions(),
            "machine": machine.identity(),
        }

    @property
    def others_sha256(self) -> dict[str, str]:
        """What tells each model that the objective asks from others."""
        return {**{name: job.sha256() for name, job in self.asked_stages.items()}, **self.asked_models}

    def sha256(self) -> str:
        """Of all inputs but the machine, on which a run may go on as on another."""
        return store.sha256_json({key: value for key, value in self.inputs.items() if key != "machine"})


def check(recipe: Recipe, progress: Progress = lambda name, rows: None) -> list[Job]:
    """The recipe's jobs, data tokenized. UserError with every problem of model, data and machine."""
    found = [*readers.missing(recipe.logs), *output_problems(recipe.output)]
    jobs: dict[str, Job] = {}
    for stage in recipe.stages:
        job = _job(stage, jobs, progress, found)
        if job:
            jobs[stage.name] = job
    found += comparison.problems(recipe, {name: job.codec for name, job in jobs.items()})
    if found:
        raise UserError(dict.fromkeys(found))
    return list(jobs.values())


def output_problems(output: str) -> tuple[Problem, ...]:
    """What is wrong with a run folder's place."""
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
    try:
        objective = objectives.create(stage.objective, plugin_config("objectives", stage.objective), codec)
        held = regularizers.create(stage.regularizers, lambda choice: plugin_config("regularizers", choice))
        data, valid = _data(stage, objective, codec, progress, held)
        looked_at, old = _old(stage, codec, progress, held)
        rewards.find(stage.evaluate.rewards)  # all that is wrong with them is told now
        asked = prepare.held_out_rows(stage.data, stage.evaluate.limit) if _asks(stage, codec) else []
    except UserError as error:
        found += error.problems
        return None
    stages, models = _others(objective, codec, earlier, found)
    parent = earlier.get(stage.model.removeprefix("stage:")) if stage.model.startswith("stage:") else None
    optimizer = optimizers.create(stage.optimizer, plugin_config("optimizers", stage.optimizer))
    return Job(
        stage, source, method, objective, optimizer, codec, data, valid, asked, held, looked_at, old, stages,
        models, parent,
    )  # fmt: skip


def _others(
    objective: objectives.Objective, codec: ChatCodec, earlier: dict[str, Job], found: list[Problem]
) -> tuple[dict[str, Job], dict[str, str]]:
    """The stages that make the models an objective asks, and fingerprints of models that are there already."""
    stages, models = dict[str, Job](), dict[str, str]()
    for other in objective.others():
        kind, _, place = other.name.partition(":")
        try:
            if kind == "stage":
                stages[other.name] = job = _asked_stage(other, place, earlier)
                words = job.codec.tokenizer
            else:
                words = speaker.tokenizer(place)
                models[other.name] = speaker.fingerprint(place)
        except UserError as error:
            found += [Problem(other.place, problem.what, problem.fix) for problem in error.problems]
            continue
        if other.speaks and words.get_vocab() != codec.tokenizer.get_vocab():
            what = f"{other.name} has another tokenizer than the model: what it says is of other words"
            found.append(Problem(other.place, what, "choose models of one family"))
    return stages, models


def _asked_stage(other: objectives.Other, name: str, earlier: dict[str, Job]) -> Job:
    job = earlier.get(name)
    if job is None or (not other.speaks and job.stage.objective["name"] != "reward"):
        what = f"{other.name} is no earlier stage" + ("" if other.speaks else " with objective: reward")
        raise UserError(Problem(other.place, what, nearest(name, earlier) if earlier else ""))
    return job


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
    if objectives.kind(stage.objective["name"]).wants != "texts":
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
        source = find(stage.model, stage.trust_remote_code)
    except ModelError as error:
        raise ModelError([*problems, *error.problems]) from None
    begin_fingerprint(source)
    return source


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
    need, free = int(count * (held + trained)), machine.available_memory()
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
    stage: Stage, objective: objectives.Objective, codec: ChatCodec, progress: Progress,
    held: Iterable[Regularizer],
) -> tuple[Mixture, Mixture]:  # fmt: skip
    key = codec.key() | {"objective": stage.objective}
    preparation = prepare.Preparation(objective.encode, key, stage.data.on_bad_row, progress)
    replayed = [prepare.Replayed(one.old, one.share()) for one in held if one.share()]
    if sum(old.share for old in replayed) >= 1:
        raise UserError(
            Problem("regularizers", "nothing new is left beside what is replayed", "lower the ratios")
        )
    return prepare.mixture(preparation, stage.data, stage.train.seed, replayed)


def _old(
    stage: Stage, codec: ChatCodec, progress: Progress, held: Sequence[Regularizer]
) -> tuple[tuple[Known | None, ...], dict[str, Known]]:
    """What regularizers look at, and what is measured before and after. UserError for all that is wrong with it."""
    problems: list[Problem] = []

    def made(files: Any) -> Known | None:
        try:
            return _known(files, stage, codec, progress)
        except UserError as error:
            problems.extend(error.problems)
            return None

    for place, one in enumerate(held):
        if one.wants_old and not one.old:
            what = f"{stage.regularizers[place]['name']} needs old data"
            problems.append(Problem(f"regularizers.{place}.data", what, "name files"))
    looked_at = tuple(made(one.old) if one.old and not one.share() else None for one in held)
    measured = stage.evaluate.old if stage.evaluate.enabled else {}
    known = {name: made(files) for name, files in measured.items()}
    if problems:
        raise UserError(problems)
    return looked_at, {name: old for name, old in known.items() if old}


def _known(files: Any, stage: Stage, codec: ChatCodec, progress: Progress) -> Known:
    """Conversations are told by ``sft``, texts by ``pretrain``."""
    data = DataConfig(train=files, valid_share=0, on_bad_row=stage.data.on_bad_row)
    rows = (row for source in prepare.sources(data.train) for row in formats.read(source))
    first = next((row for row in rows if isinstance(row, Row)), None)
    choice = {"name": "sft" if first and first.messages else "pretrain"}
    objective = objectives.create(choice, plugin_config("objectives", choice), codec)
    preparation = prepare.Preparation(
        objective.encode, codec.key() | {"objective": choice}, data.on_bad_row, progress
    )
    return Known(objective, prepare.mixture(preparation, data, 0)[0])


def _asks(stage: Stage, codec: ChatCodec) -> bool:
    speaks = objectives.kind(stage.objective["name"]).speaks
    return speaks and stage.evaluate.enabled and stage.evaluate.generate and codec.has_template


def with_source(job: Job, source: ModelSource) -> Job:
    """The job on another base: the result of the earlier stage, once it is there."""
    return replace(job, source=source)
