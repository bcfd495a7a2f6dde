"""From a recipe to jobs that can run: everything is looked at first, all problems are told together."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from tunewright import comparison, methods, objectives, optimizers, regularizers
from tunewright.bases import base
from tunewright.core import machine, store
from tunewright.core.errors import ModelError, Problem, UserError, nearest
from tunewright.core.paths import folder_to_make
from tunewright.data import formats, lint, prepare
from tunewright.data.rows import Row
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import Mixture
from tunewright.models.load import ModelSource, find, fingerprint
from tunewright.objectives import _rewards as rewards
from tunewright.recipes import EARLIER, DataConfig, Recipe, Stage, plugin_config
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
    if not isinstance(model, str) or model.startswith(EARLIER):
        return ()
    try:
        find(model, bool(tree.get("trust_remote_code")))
    except ModelError as error:
        return error.problems
    return ()


def _job(stage: Stage, earlier: dict[str, Job], progress: Progress, found: list[Problem]) -> Job | None:
    method = methods.create(stage.method, plugin_config("methods", stage.method))
    found += method.data_problems(stage.data)
    parent = earlier.get(stage.model.removeprefix(EARLIER)) if stage.model.startswith(EARLIER) else None
    try:
        source, codec = base(stage, parent, method)
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
