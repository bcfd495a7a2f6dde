"""Methods, or finished runs and models, head to head: the same for all but what is compared, and one report.

Methods are tried: every variant with every seed is a run of its own under ``trials/``, and what is there already is
reused. Runs and models are only asked: the same held-out rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright import comparison, pipeline, sweeps, trials, variants
from tunewright.auto import Advisor
from tunewright.comparison import Comparison
from tunewright.core import events, lock, paths, plugins, store
from tunewright.core.errors import Problem, UserError, attempted
from tunewright.core.units import human_seconds, parse_seconds
from tunewright.evaluate import compare, latency
from tunewright.evaluate.compare import Subject
from tunewright.evaluate.standings import Entrant, Try
from tunewright.jobs import Job
from tunewright.recipes import Eval, Recipe
from tunewright.serve import speaker as speakers
from tunewright.sweeps import Sweep
from tunewright.train import guard
from tunewright.trials import Plan, Tell
from tunewright.variants import Trial, Variant

Tree = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """What is tried of a recipe."""

    methods: Sequence[str] = ()
    """The recipe's own if there is none."""
    seeds: int = 1
    """The recipe's and those after it."""
    budget: str = ""
    """Training time of each trial, such as 5m; without it the recipe's own number of steps."""
    sweep: Sweep | Sequence[str] = ()
    """Keys with their values, or as text: ``method.rank=4,8``."""


@dataclass(frozen=True)
class Compared:
    """A finished comparison."""

    folder: Path

    @cached_property
    def results(self) -> Tree:
        """What ``comparison.json`` says."""
        return store.read_record(self.folder / compare.RECORD)

    @property
    def report(self) -> Path:
        """The report page."""
        return self.folder / "report.html"


def of_anything(what: Sequence[str], choice: Choice, data: Sequence[str], out: str, tell: Tell) -> Compared:
    """As on the command line: a recipe file with overrides, or with held-out ``data`` the names of runs and models."""
    if data:
        given = [name for name in ("methods", "budget", "sweep") if getattr(choice, name)]
        given += ["seeds"] if choice.seeds != Choice.seeds else []
        if given:
            fix = "leave out --data; a recipe's held-out rows are data.valid=FILE"
            raise UserError(Problem(f"--{name}", "is for a recipe, --data for models", fix) for name in given)
        return of_models(what, data, out, tell)
    if len(what) > 1 and not any("=" in word for word in what[1:]):
        raise UserError(Problem("compare", "models are compared on held-out rows", "name them: --data FILE"))
    return of_methods(what[0], what[1:], choice, out, tell)


def of_methods(
    source: pipeline.Source,
    overrides: Iterable[str] | Mapping[str, Any],
    choice: Choice,
    out: str,
    tell: Tell,
) -> Compared:
    """Try every variant of a recipe with every seed.

    Raises:
        UserError: all that is wrong with recipe, methods, sweep, budget, data and machine, before anything runs.
        InterruptedRunError: a signal; the same command goes on from there.
    """
    name = "recipe" if isinstance(source, Mapping) else Path(source).stem
    field = _field(source, overrides, choice, out or f"runs/compare-{name}", tell)
    folder, tried = field.folder, field.variants
    with guard.Preemption(), lock.sole_owner(folder, "--out"):
        store.recover(folder, ".*")
        begun = trials.planned(folder, tried, field.budget)
        trials.check_begun(begun, field.trials, field.jobs)
        plan, refused = trials.plan(begun, tried, tell)
        failed = trials.run_all(plan, field.trials, refused, tell)
        entrants = [_entrant(folder, variant, field.of(variant), failed, tell) for variant in tried]
        compare.write(folder, _subject(name, field, plan), entrants)
    return Compared(folder)


@dataclass(frozen=True)
class _Field:
    """All that is tried, checked; ``budget`` is in seconds, 0 if there is none."""

    folder: Path
    variants: Sequence[Variant]
    jobs: Mapping[str, Job]
    trials: Sequence[Trial]
    budget: float

    def of(self, variant: Variant) -> list[Trial]:
        return [trial for trial in self.trials if trial.variant is variant]


def _field(
    source: pipeline.Source,
    overrides: Iterable[str] | Mapping[str, Any],
    choice: Choice,
    out: str,
    tell: Tell,
) -> _Field:
    """UserError with all that is wrong with any of it."""
    found: list[Problem] = []
    if choice.seeds < 1:
        found.append(Problem("--seeds", f"{choice.seeds} is none", "1 or more"))
    folder = attempted(lambda: paths.folder_to_make(out, "--out"), found)
    budget = attempted(lambda: _seconds(choice.budget), found)
    base = attempted(lambda: pipeline.load(source, overrides, Advisor(tell=tell)), found)
    sweep = (
        choice.sweep
        if isinstance(choice.sweep, Mapping)
        else attempted(lambda: sweeps.parse(choice.sweep), found)
    )
    strange = variants.unknown(choice.methods)
    methods = [name for name in choice.methods if name in plugins.names("methods")]
    if base and not choice.methods:
        methods = [str(base.stages[-1].method["name"])]
    refused = sweeps.problems(sweep or {}, methods)
    found += [*strange, *refused.values()]
    made = (
        list(variants.of(base, methods, {k: v for k, v in (sweep or {}).items() if k not in refused}))
        if base
        else []
    )
    found += [one for one in made if isinstance(one, Problem)]
    good = [one for one in made if isinstance(one, Variant)]
    checked = attempted(lambda: variants.check(good), found)
    if found or folder is None or budget is None or checked is None:
        raise UserError(found)
    first = good[0].recipe.stages[0].train.seed
    todo = [Trial(variant, first + number) for number in range(choice.seeds) for variant in good]
    return _Field(folder, good, checked, todo, budget)


def _seconds(budget: str) -> float:
    try:
        return parse_seconds(budget) if budget else 0.0
    except ValueError as error:
        raise UserError(Problem("--budget", str(error))) from None


def _entrant(
    folder: Path, variant: Variant, todo: Sequence[Trial], failed: Mapping[str, str], tell: Tell
) -> Entrant:
    """What the variant's trials left, and how fast the first of its models answers."""
    tries = [_try(trials.place(folder, trial), trial.seed, failed.get(trial.name, "")) for trial in todo]
    run = next((trials.place(folder, trial) for trial in todo if trial.name not in failed), None)
    timed = _latency(folder, run.name, str(run), tell) if run else {}
    return Entrant(variant.name, tries, timed)


def _try(run: Path, seed: int, reason: str) -> Try:
    if reason:
        return Try(seed, {}, reason=reason)
    stage = store.read_record(run / "results.json")["stages"][-1]
    return Try(seed, stage, [e for e in events.read(run / "events.jsonl") if e.get("stage") == stage["name"]])


def _latency(folder: Path, name: str, model: str, tell: Tell) -> Tree:
    """Measured after merging, where that is possible; kept, and measured again for another model of that name."""
    path, made = folder / "latency" / f"{name}.json", speakers.fingerprint(model)
    if path.exists() and (known := store.read_record(path))["model_sha256"] == made:
        return known
    tell(f"timing answers of {name}")
    speaker = speakers.load(model)
    whole, merged = speaker.model, True
    if speaker.method:
        merged = speaker.method.keeps_apart(whole) is None
        whole = speaker.method.merge(whole) if merged else whole
    found = {"seconds": latency.seconds(whole, speaker.codec), "tokens": latency.TOKENS, "merged": merged}
    store.write_record(path, {**found, "model_sha256": made})
    return {**found, "model_sha256": made}


_LATENCY = (
    f"Latency: {latency.TOKENS} tokens after one prompt, batch of 1, median of five; an adapter is merged first, where "
    "that is possible."
)


def _subject(name: str, field: _Field, plan: Plan) -> Subject:
    stage = field.variants[0].recipe.stages[0]
    seeds = sorted({trial.seed for trial in field.trials})
    facts = [
        ("model", stage.model), ("data", ", ".join(file.path for file in stage.data.train)),
        ("seeds", str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"),
    ]  # fmt: skip
    notes = [_LATENCY]
    if len({variant.recipe.stages[0].train.lr for variant in field.variants}) == 1:
        rate = (
            f"{stage.train.lr:g} for all, from the recipe" if stage.train.lr else "each method's own default"
        )
        notes.append(f"Learning rate: {rate}.")
    if plan.budget:
        facts.append(("budget", f"{human_seconds(plan.budget)} of training each"))
        told = "; ".join(f"{v.name}: {plan.steps[v.name]:,}" for v in field.variants if v.name in plan.steps)
        notes.append(
            "Budget: a run of a few steps was timed for each, and the number of steps that fits is what each trial "
            f"makes, so that it comes out the same again. Steps: {told}."
        )
    return Subject(f"{name}: {len(field.variants)} variants", facts, notes)


def of_models(models: Sequence[str], data: Sequence[str], out: str, tell: Tell) -> Compared:
    """Put the same held-out rows to finished runs, adapters and models; what a run cost is told from its results.

    Raises:
        UserError: all that keeps a model from being asked.
    """
    config = Eval.model_validate({"models": tuple(dict.fromkeys(models)), "data": tuple(data)})
    folder = paths.folder_to_make(out or "runs/compare-models", "--out")
    found = list(comparison.problems(Recipe(output=str(folder), stages=(), eval=config), {}))
    if len(config.models) < 2:
        found.append(Problem("compare", "one model alone cannot be compared", "name two or more"))
    if found:
        raise UserError(_named(found, config.models))
    with guard.Preemption(), lock.sole_owner(folder, "--out"):
        asked = Comparison(config, config.models, {}).make(
            folder, lambda model, done, of: tell(f"{model}: {done}/{of} answered")
        )
        names = _names(config.models)
        entrants = [_asked(folder, name, row, tell) for name, row in zip(names, asked["rows"], strict=True)]
        facts = [("data", ", ".join(data)), ("held-out samples", f"{asked['rows'][0]['samples']:,}")]
        compare.write(folder, Subject("Models side by side", facts, [_LATENCY]), entrants)
    return Compared(folder)


def _named(found: Iterable[Problem], models: Sequence[str]) -> Iterable[Problem]:
    """Places among ``models`` as the names that were given."""
    places = {f"eval.models.{number}": model for number, model in enumerate(models)}
    return [Problem(places.get(p.where, p.where.replace("eval.", "--")), p.what, p.fix) for p in found]


def _names(models: Sequence[str]) -> list[str]:
    """The last parts of their paths, if those tell them apart."""
    short = [Path(model).name for model in models]
    return short if len(set(short)) == len(models) else list(models)


def _asked(folder: Path, name: str, row: Tree, tell: Tell) -> Entrant:
    """A model with its scores now, and what making it took, if it is a run."""
    run = Path(row["model"])
    made = _try(run, 0, "") if (run / "results.json").is_file() else Try(0, {})
    stage = {**made.stage, "before": {}, "after": row}
    return Entrant(
        name, [Try(0, stage, made.log)], _latency(folder, variants.file_name(name), row["model"], tell)
    )
