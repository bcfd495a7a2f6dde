"""The same held-out rows put to several models: what each scores, side by side."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from tunewright import objectives
from tunewright.core import machine, store
from tunewright.core.errors import DataError, Problem, UserError
from tunewright.data import formats, lint, prepare
from tunewright.data.rows import Row
from tunewright.data.template import ChatCodec
from tunewright.evaluate.harness import Examination, spread
from tunewright.objectives import _rewards as rewards
from tunewright.recipes import EARLIER, EVAL, DataConfig, Eval, EvaluateConfig, Recipe, Stage, plugin_config
from tunewright.recipes.schema import DataFiles
from tunewright.serve import speaker as speakers
from tunewright.serve.speaker import Speaker

Tree = dict[str, Any]
Progress = Callable[[str, int, int], None]
"""Model, questions answered, questions in all."""


@dataclass(frozen=True)
class Questions:
    """Held-out files, and how any model is asked what is in them."""

    files: DataFiles
    config: EvaluateConfig

    def exam(self, speaker: Speaker) -> Examination:
        """The questions in this model's tokens: conversations are answered, texts are read; of two answers to choose
        from the better one counts. UserError for bad rows.
        """
        data = DataConfig(train=self.files, valid=self.files)
        name = "sft" if self.are_conversations() else "pretrain"
        objective = objectives.create(
            {"name": name}, plugin_config("objectives", {"name": name}), speaker.codec
        )
        if objective.wants != "texts":
            speaker.codec.require_template()
        key = speaker.codec.key() | {"objective": name, "of_pairs": "chosen"}
        preparation = prepare.Preparation(lambda rows: objective.encode(map(_preferred, rows)), key, "stop")
        samples, _ = prepare.mixture(preparation, data, seed=0)
        rows = prepare.held_out_rows(data, self.config.limit) if name == "sft" else []
        return Examination(objective, speaker.codec, samples, rows, self.config)

    def are_conversations(self) -> bool:
        """Whether the first good row is one. DataError if no row is good."""
        for source in prepare.sources(self.files):
            for row in formats.read(source):
                if isinstance(row, Row):
                    return bool(row.messages)
        raise DataError(Problem("data", "no row can be read", "see tunewright lint"))


def _preferred(row: Row) -> Row:
    return row if row.answered or not row.compares else row.answering(row.chosen)


class Made(Protocol):
    """A job whose result is among the models."""

    def sha256(self) -> str:
        """What tells its result from others."""


@dataclass(frozen=True)
class Comparison:
    """The measurement that ends a run: a job like the stages, of whose results it is made."""

    config: Eval
    models: Sequence[str]
    jobs: Mapping[str, Made]
    """By stage."""

    name = EVAL

    @property
    def needs(self) -> list[str]:
        """Stages that are among the models."""
        return [model.removeprefix(EARLIER) for model in self.models if model.startswith(EARLIER)]

    @cached_property
    def inputs(self) -> Tree:
        """All that decides the outcome."""
        config = self.config
        made = {model: self._sha256(model) for model in self.models}
        return {
            **config.model_dump(mode="json"), "models": list(self.models), "models_sha256": made,
            "data_sha256": [store.sha256_file(source.path) for source in prepare.sources(config.data)],
            "rewards_sha256": rewards.files(config.evaluate.rewards),
            "versions": machine.versions(),
        }  # fmt: skip

    def _sha256(self, model: str) -> str:
        if model.startswith(EARLIER):
            return self.jobs[model.removeprefix(EARLIER)].sha256()
        return speakers.fingerprint(model, self.config.trust_remote_code)

    def make(self, run: Path, progress: Progress) -> Tree:
        """Scores of each model, and some questions with all answers; ``run`` holds the stages' results."""
        rows: list[Tree] = []
        shown: list[Tree] = []
        first: Tree = {}
        for model in self.models:
            exam, taken = self._put(model, run, partial(progress, model))
            if not rows:
                first, shown = taken, [{**asked, "answers": []} for asked in exam.questions() if exam.asks]
            for question, answer in zip(shown, taken.get("answers", ()), strict=True):
                question["answers"].append(answer)
            scores = {key: value for key, value in taken.items() if key != "answers"}
            won = exam.wins(first, taken) if rows else {}
            scores |= {"wins": won} if won else {}
            rows.append({"model": model, "samples": len(exam.samples), **scores})
        return {"name": EVAL, "rows": rows, "samples": spread(shown, self.config.evaluate.samples)}

    def _put(self, model: str, run: Path, progress: Callable[[int, int], None]) -> tuple[Examination, Tree]:
        """What the model was asked and what it scored; the model itself is let go of before the next is loaded."""
        config, place = self.config, self._place(run, model)
        speaker = speakers.load(place, config.precision, config.template, config.trust_remote_code)
        exam = Questions(config.data, config.evaluate).exam(speaker)
        return exam, exam.take(speaker.model, progress)

    @staticmethod
    def _place(run: Path, model: str) -> str:
        stage = model.removeprefix(EARLIER)
        return model if stage == model else str(run / "stages" / stage)


def of(recipe: Recipe, jobs: Mapping[str, Made]) -> Comparison | None:
    """The recipe's measurement of all, if it has one."""
    return Comparison(recipe.eval, _models(recipe, recipe.eval), jobs) if recipe.eval else None


def _models(recipe: Recipe, config: Eval) -> list[str]:
    if config.models:
        return list(dict.fromkeys(config.models))
    return [recipe.stages[0].model, *(f"{EARLIER}{stage.name}" for stage in recipe.stages if _answers(stage))]


def _answers(stage: Stage) -> bool:
    return objectives.kind(stage.objective["name"]).speaks


def problems(recipe: Recipe, codecs: Mapping[str, ChatCodec]) -> Iterator[Problem]:
    """What keeps the models from being asked, as far as it can be known before they are made; ``codecs`` by stage."""
    if recipe.eval is None:
        return
    config, stages = recipe.eval, {stage.name: stage for stage in recipe.stages}
    yield from _raised(lambda: rewards.find(config.evaluate.rewards))
    bad = _bad_rows(config.data) if config.data else ()
    yield from bad
    converse = not bad and Questions(config.data, config.evaluate).are_conversations()
    for place, model in enumerate(_models(recipe, config)):
        at = f"{EVAL}.models.{place}" if config.models else EVAL
        stage = stages.get(model.removeprefix(EARLIER)) if model.startswith(EARLIER) else None
        if stage and not _answers(stage):
            what = f"stage {stage.name!r} learns {stage.objective['name']} and does not answer"
            yield Problem(at, what, "leave it out; its own scores tell how good it is")
            continue
        try:
            if stage:
                codec = codecs.get(stage.name)
            else:
                codec = ChatCodec(speakers.tokenizer(model, config.trust_remote_code), config.template)
        except UserError as error:
            yield from (Problem(at, problem.what, problem.fix) for problem in error.problems)
            continue
        if converse and codec and not codec.has_template:
            what = f"{model} has no chat template, and the rows are conversations"
            yield Problem(at, what, f"name one as {EVAL}.template: tunewright list templates")


def _bad_rows(files: DataFiles) -> Sequence[Problem]:
    try:
        return lint.lint(prepare.sources(files)).problems
    except UserError as error:  # no such file
        return error.problems


def _raised(look: Callable[[], object]) -> Sequence[Problem]:
    try:
        look()
    except UserError as error:
        return error.problems
    return ()
