"""What a comparison tries: methods and swept options, each laid over the same one-stage recipe."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tunewright import jobs, recipes, sweeps
from tunewright.core import plugins, store
from tunewright.core.errors import Problem, UserError, nearest
from tunewright.jobs import Job
from tunewright.recipes import Recipe
from tunewright.sweeps import Sweep

Tree = dict[str, Any]
_LOSSLESS = re.compile(r"[A-Za-z0-9 ,.+]{1,60}")
_ONLY_STAGE = "stages.0."


@dataclass(frozen=True)
class Variant:
    """A method with the values of swept options, as a whole recipe; ``name`` is such as ``lora, rank 8``."""

    name: str
    recipe: Recipe

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return file_name(self.name)

    def at(self, output: str, evaluated: bool = True, **train: Any) -> Recipe:
        """The recipe of one run of it."""
        stage = self.recipe.stages[0]
        update: Tree = {"train": stage.train.model_copy(update=train)}
        if not evaluated:
            update["evaluate"] = stage.evaluate.model_copy(update={"enabled": False})
        return self.recipe.model_copy(update={"output": output, "stages": (stage.model_copy(update=update),)})


@dataclass(frozen=True)
class Trial:
    """A variant with a seed: one ordinary run."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.variant.folder}-seed-{self.seed}"


def file_name(name: str) -> str:
    """The name as a file can have it; more than words, numbers and commas adds a hash, so that names stay different."""
    plain = re.sub(r"[^A-Za-z0-9.+_]+", "-", name).strip("-.")[:60]
    return plain if _LOSSLESS.fullmatch(name) else f"{plain}-{store.sha256_json(name)[:6]}"


def unknown(methods: Iterable[str]) -> list[Problem]:
    """Methods that there are not."""
    known = plugins.names("methods")
    return [Problem("--method", f"no method is called {name!r}", nearest(name, known))
            for name in methods if name not in known]  # fmt: skip


def of(base: Recipe, methods: Sequence[str], sweep: Sweep) -> Iterator[Variant | Problem]:
    """Every method, with every combination of the swept options that it has; and what is wrong with any of them.

    A method that the recipe does not name has its own defaults, nothing of the options of another.
    """
    if len(base.stages) > 1:
        what = f"a comparison varies one stage, the recipe has {len(base.stages)}"
        fix = "run the earlier ones, then compare from their result: model=FOLDER"
        yield Problem("stages", what, fix)
        return
    for name in dict.fromkeys(methods):
        for values in sweeps.combinations(sweep, name):
            yield from _variant(base, name, values)


def _variant(base: Recipe, method: str, values: Tree) -> Iterator[Variant | Problem]:
    name = ", ".join([method, *(f"{_short(key)} {_told(value)}" for key, value in values.items())])
    tree = base.model_dump(mode="json", exclude={"eval"})
    if tree["stages"][0]["method"]["name"] != method:
        tree["stages"][0]["method"] = {"name": method}
    try:
        changes = {f"{_ONLY_STAGE}{key}": value for key, value in values.items()}
        yield Variant(name, recipes.load(tree, changes))
    except UserError as error:
        for problem in error.problems:
            yield Problem(f"{name}: {problem.where.removeprefix(_ONLY_STAGE)}", problem.what, problem.fix)


def _short(key: str) -> str:
    return key.removesuffix(".name").rpartition(".")[2].replace("_", " ")


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check(variants: Sequence[Variant]) -> dict[str, Job]:
    """Each variant's job by its name. UserError with every problem of every variant; what all share is told once."""
    made: dict[str, Job] = {}
    found: dict[Problem, list[str]] = {}
    for variant in variants:
        try:
            made[variant.name] = jobs.check(variant.recipe)[0]
            wrong = tuple(_unmeasured(made[variant.name]))
        except UserError as error:
            wrong = error.problems
        for problem in wrong:
            found.setdefault(problem, []).append(variant.name)
    if found:
        raise UserError(_of(names, problem, len(variants)) for problem, names in found.items())
    return made


def _of(names: Sequence[str], problem: Problem, all_of: int) -> Problem:
    if len(names) == all_of:
        return problem
    return Problem(f"{'; '.join(names)}: {problem.where}", problem.what, problem.fix)


def _unmeasured(job: Job) -> Iterator[Problem]:
    what = "what is not measured cannot be compared"
    if not job.stage.evaluate.enabled:
        yield Problem("evaluate.enabled", what, "set it to true")
    elif not len(job.valid):
        yield Problem("data.valid", what, "name a file of held-out rows, or give data.valid_share")
