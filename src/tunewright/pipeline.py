"""Run a recipe: check all of it, then train, measure and save each stage, then report."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from tunewright import agenda, comparison, doctor, drifts, jobs, methods, recipes, shortage
from tunewright.auto import Advisor
from tunewright.comparison import Comparison
from tunewright.core import events, lock, machine, paths, store
from tunewright.core.errors import DamagedError, RecipeError, StorageError, UserError
from tunewright.evaluate import judge, report
from tunewright.jobs import Job
from tunewright.models.load import ModelSource, find
from tunewright.objectives import Other
from tunewright.recipes import Recipe, to_yaml
from tunewright.runs import Run
from tunewright.serve import speaker
from tunewright.stage_run import StageRun
from tunewright.train import guard, ledger, readers

Tree = dict[str, Any]
NO_WISH = agenda.Wish()
_TOLD = 20
"""Rows left out that are told during a run; the token table, results and report have them all."""
Source = str | Path | Mapping[str, Any]


ADVISOR = Advisor()


def load(
    source: Source, overrides: Iterable[str] | Mapping[str, Any] = (), advisor: Advisor = ADVISOR
) -> Recipe:
    """The recipe, what it leaves open (``method: auto``) chosen by the advisor. UserError tells its problems together
    with those of the model and data it names.
    """
    try:
        return recipes.load(source, overrides, advisor)
    except RecipeError as error:
        raise UserError([*error.problems, *jobs.look(error.trees)]) from None


def plan(recipe: Recipe, wish: agenda.Wish = NO_WISH, allow_drift: bool = False) -> list[agenda.Task]:
    """What :func:`run` would do, and why. Nothing is written but token tables."""
    folder, todo = paths.given(recipe.output, "output"), _todo(recipe)
    return _agenda(folder, todo, wish, allow_drift)[0]


def _foreign_code(recipe: Recipe) -> list[events.Event]:
    """Code of others that this run executes, each once."""
    models = [stage.model for stage in recipe.stages if stage.trust_remote_code]
    models += recipe.eval.models if recipe.eval and recipe.eval.trust_remote_code else ()
    rewards = [name for stage in recipe.stages for name in stage.objective.get("rewards", ())]
    rewards += [name for part in (*recipe.stages, recipe.eval) if part for name in part.evaluate.rewards]
    files = (name.rpartition(":")[0] for name in rewards if ".py:" in name)
    return [
        *({"kind": "remote-code", "model": model} for model in dict.fromkeys(models)),
        *({"kind": "own-code", "file": file} for file in dict.fromkeys(files)),
    ]


def _todo(recipe: Recipe, progress: jobs.Progress = lambda name, rows: None) -> list[drifts.Work]:
    """All that the recipe asks for, checked."""
    stages = jobs.check(recipe, progress)
    last = comparison.of(recipe, {job.name: job for job in stages})
    return [*stages, *([last] if last else [])]


def _agenda(
    folder: Path, todo: list[drifts.Work], wish: agenda.Wish, allow_drift: bool
) -> tuple[list[agenda.Task], drifts.Drift]:
    """A run of one stage is the stage: a change of it is refused. Of several, what changed is made anew."""
    rerun = len(todo) > 1 or bool(wish.start)
    drift = drifts.between(folder, todo, allow_drift or rerun)
    return agenda.tasks(folder, todo, drift, wish, insists=allow_drift), drift


def run(
    recipe: Recipe,
    quiet: bool = False,
    fresh: bool = False,
    allow_drift: bool = False,
    wish: agenda.Wish = NO_WISH,
    foresees: bool = True,
) -> Run:
    """Everything the recipe says; running it again reuses what is finished and resumes what is not. If it ``foresees``, it
    warns before a stage for which there is too little memory.

    Raises UserError with all problems before any compute; the run folder is untouched then. A signal ends the
    run with InterruptedRunError, a full disk with StorageError: what was finished stays.
    """
    with guard.Preemption() as preemption, readers.terminal(quiet) as terminal, ExitStack() as owned:
        for warning in _foreign_code(recipe):
            terminal(warning)
        todo = _todo(recipe, terminal.preparing)
        folder = paths.given(recipe.output, "output")
        owned.enter_context(lock.sole_owner(folder))
        if fresh and _is_begun(folder):
            _move_aside(folder)
            owned.enter_context(lock.sole_owner(folder))
        store.recover(folder)
        tasks, drift = _agenda(folder, todo, wish, allow_drift)
        found = doctor.examine(folder).damaged if drifts.is_begun(folder) else []
        log = events.EventLog(folder / "events.jsonl", terminal, *readers.named(recipe.logs, folder))
        try:
            for finding in found:
                log.emit("damaged", what=f"{folder / finding.path}: {finding.what}")
            return _Runner(recipe, folder, log, drift, preemption, foresees).run(tasks)
        finally:
            log.close()


def _is_begun(folder: Path) -> bool:
    return any(path.name != lock.OWNER for path in folder.iterdir())


def _move_aside(folder: Path) -> None:
    """Keep an older run under the next free number."""
    taken = (folder.with_name(f"{folder.name}.{n}") for n in range(1, 10_000))
    folder.rename(next(path for path in taken if not path.exists()))


class _Runner:
    """The jobs of one recipe, one after another, in one folder."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        log: events.EventLog,
        drift: drifts.Drift,
        preemption: guard.Preemption,
        foresees: bool,
    ) -> None:
        self.recipe, self.folder, self.log, self.drift = recipe, folder, log, drift
        self.preemption, self.foresees = preemption, foresees
        self.results: dict[str, Tree] = {}

    def run(self, tasks: list[agenda.Task]) -> Run:
        store.write_text(self.folder / "recipe.yaml", to_yaml(self.recipe))
        self._manifest("running")
        try:
            for task in tasks:
                self._stage(task)
        except BaseException as error:
            with suppress(StorageError):  # the disk may be what stopped it
                self._manifest("stopped", reason=type(error).__name__)
            raise
        status = "partial" if any(task.action == "leave" for task in tasks) else "finished"
        last = self.results.pop(recipes.EVAL, None)
        results: Tree = {"run": self.folder.name, "status": status, "stages": list(self.results.values())}
        results |= {recipes.EVAL: last} if last else {}
        store.write_record(self.folder / "results.json", results)
        report.write(self.folder)
        self._manifest(status)
        self.log.emit(
            "end", results=str(self.folder / "results.json"), report=str(self.folder / "report.html")
        )
        return Run(self.folder)

    def _manifest(self, status: str, **facts: Any) -> None:
        facts |= {"status": status, "versions": machine.versions(), "hardware": machine.hardware()}
        store.write_record(self.folder / "manifest.json", facts)

    def _stage(self, task: agenda.Task) -> None:
        """Reuse the stage's result if it is whole, else make it."""
        work, name, at = task.work, task.name, self.folder / "stages" / task.name
        self.log.context = {"stage": name}
        if task.action == "leave":
            return
        differences = self.drift.get(name, [])
        if task.action == "run anew":
            older = agenda.set_aside(self.folder, name)
            self.log.emit("anew", why=task.why, older=str(older or ""))
            differences = []
        if isinstance(work, Job) and task.is_work and (advised := work.stage.advised):
            self.log.emit("advised", **advised.model_dump(mode="json"))
        if self.foresees and isinstance(work, Job) and task.is_work and (short := shortage.of(work)):
            change = [f"{key}={str(value).lower()}" for key, value in short.change.items()]
            self.log.emit("shortage", need=short.need, free=short.free, change=change)
        if differences:
            self.log.emit("drift", differences=drifts.told(differences))
        made = self._made(work, at) if all(map(drifts.is_tolerated, differences)) else None
        drifted = drifts.history(at, differences)
        if isinstance(work, Job):
            self.results[name] = made or self._make(work, at, drifted)
        elif isinstance(work, Comparison):
            self.results[name] = made or self._compare(work, at, drifted)

    def _made(self, work: drifts.Work, at: Path) -> Tree | None:
        """What it found if it was finished before and every byte is as written."""
        artifact = at / work.method.folder if isinstance(work, Job) else at / "metrics.json"
        if not (at / "metrics.json").exists() and not artifact.exists():
            return None
        try:
            made = store.read_record(at / "metrics.json")
            if isinstance(work, Job):
                store.verify(artifact)
                ledger.check(at / "samples.jsonl", made["train"]["steps"])
        except DamagedError as error:
            self.log.emit("damaged", what=str(error))
            return None
        self.log.emit("reuse")
        return made

    def _make(self, job: Job, at: Path, drifted: list[str]) -> Tree:
        begun = partial(drifts.remember, at, job, drifted)
        if not (at / drifts.INPUTS).exists():
            begun()
        if job.earlier:
            job = jobs.with_source(job, self._result_of(job))
        for other in job.objective.others():
            job.objective.asked[other.name] = asked(job, other, self.folder)
        left_out = [str(problem) for problem in (*job.data.problems, *job.valid.problems)]
        if left_out:
            self.log.emit("skipped", count=len(left_out), rows=left_out[:_TOLD])
        metrics = StageRun(job, at, self.log, drifted, self.preemption).run(begun)
        store.write_record(at / "metrics.json", metrics)
        return metrics

    def _compare(self, last: Comparison, at: Path, drifted: list[str]) -> Tree:
        drifts.remember(at, last, drifted)

        def progress(model: str, done: int, of: int) -> None:
            self.log.emit("answering", when=model, done=done, of=of)

        found = last.make(self.folder, progress)
        for row in found["rows"]:
            self.log.emit("measure", when=row["model"], **row)
        store.write_record(at / "metrics.json", found)
        return found

    def _result_of(self, job: Job) -> ModelSource:
        """The earlier stage's model; an adapter is merged and saved as this stage's base."""
        earlier = self.folder / "stages" / job.earlier
        if (earlier / "model").is_dir():
            return find(str(earlier / "model"))
        base = self.folder / "stages" / job.stage.name / "base"
        adapter = store.sha256_file(earlier / "adapter" / store.MANIFEST)
        if not store.is_complete(base) or store.facts(base)["adapter_sha256"] != adapter:
            manifest = store.verify(earlier / "adapter")
            model, method = methods.load_adapter(
                earlier / "adapter", manifest, job.stage.precision, job.stage.trust_remote_code
            )
            with store.artifact(base, adapter_sha256=adapter) as target:
                method.merge(model).save_pretrained(target)
                job.codec.tokenizer.save_pretrained(target)
        return find(str(base))


def asked(job: Job, other: Other, folder: Path) -> Any:
    """Another model that a job's objective asks, loaded when it is asked first; stages are in the run's ``folder``."""
    kind, _, place = other.name.partition(":")
    name = str(folder / "stages" / place) if kind == "stage" else place
    load = cache(partial(speaker.load, name, job.stage.precision))
    if other.speaks:
        return cache(lambda: judge.Teacher(load(), job.others_sha256[other.name]))
    choice = job.asked_stages[other.name].stage.objective if kind == "stage" else {"name": "reward"}
    return judge.Judge(load, choice)
