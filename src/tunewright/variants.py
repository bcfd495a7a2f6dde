"""What a comparison tries: methods and swept options, each laid over the same one-stage recipe."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from tunewright import jobs, recipes
from tunewright.core import plugins, store
from tunewright.core.errors import Problem, UserError, nearest
from tunewright.jobs import Job
from tunewright.recipes import Recipe, TrainConfig, reading

Tree = dict[str, Any]
Sweep = Mapping[str, Sequence[Any]]
_SWEPT = ("method", "optimizer", "precision", "fast", "train")
"""What may differ between variants: the rest decides what is learned and what is asked, which is the same for all."""
_SHARED = ("seed", "max_steps", "epochs")
"""Of train: every variant gets the same."""
_LOSSLESS = re.compile(r"[\w ,.+-]{1,60}", re.ASCII)


@dataclass(frozen=True)
class Variant:
    """A method with the values of swept options, as a whole recipe; ``name`` is such as ``lora, rank 8``."""

    name: str
    recipe: Recipe

    @property
    def method(self) -> str:
        """Its method's name."""
        return str(self.recipe.stages[0].method["name"])

    @property
    def folder(self) -> str:
        """The name as that of a file, different for different names."""
        plain = re.sub(r"[^A-Za-z0-9.+]+", "-", self.name).strip("-")[:60]
        return plain if _LOSSLESS.fullmatch(self.name) else f"{plain}-{store.sha256_json(self.name)[:6]}"

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


def sweep_of(texts: Iterable[str]) -> dict[str, list[Any]]:
    """``method.rank=4,8`` as a key with its values, which are written as in a recipe. UserError with all problems."""
    found: list[Problem] = []
    swept: dict[str, list[Any]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        try:
            parsed = reading.parse(f"[{values}]", "--sweep") if key and values else []
        except UserError as error:
            found += [Problem(f"--sweep {text[:80]}", p.what) for p in error.problems]
            continue
        if not parsed:
            found.append(Problem(f"--sweep {text[:80]}", "names no values", "--sweep method.rank=4,8,16"))
        swept[key] = parsed
    if found:
        raise UserError(found)
    return swept


def of(base: Recipe, methods: Sequence[str], sweep: Sweep) -> list[Variant]:
    """Every method, with every combination of the swept options that it has.

    A method that the recipe does not name has its own defaults, nothing of the options of another.

    Raises:
        UserError: several stages, unknown methods, options that cannot be swept, values that an option does not take.
    """
    names = list(dict.fromkeys(methods)) or [str(base.stages[0].method["name"])]
    strange = [name for name in names if name not in plugins.names("methods")]
    found = [
        Problem("--method", f"no method is called {n!r}", nearest(n, plugins.names("methods")))
        for n in strange
    ]
    names = [name for name in names if name not in strange]
    found += _stage_problems(base)
    found += [problem for key in sweep for problem in _key_problems(key, names)]
    if found:
        raise UserError(found)
    made = [_variant(base, name, dict(zip(keys, values, strict=True)), found)
            for name in names for keys in [[key for key in sweep if _has(name, key)]]
            for values in product(*(sweep[key] for key in keys))]  # fmt: skip
    if found:
        raise UserError(found)
    return list({variant.name: variant for variant in made if variant}.values())


def unknown(methods: Iterable[str]) -> list[Problem]:
    """Methods that there are not."""
    known = plugins.names("methods")
    return [
        Problem("--method", f"no method is called {n!r}", nearest(n, known))
        for n in methods
        if n not in known
    ]


def _stage_problems(base: Recipe) -> Iterator[Problem]:
    if len(base.stages) > 1:
        what = f"a comparison varies one stage, the recipe has {len(base.stages)}"
        yield Problem("stages", what, "run the earlier ones, then compare from their result: model=FOLDER")
    for stage in base.stages[:1]:
        if not stage.evaluate.enabled:
            yield Problem("evaluate.enabled", "what is not measured cannot be compared", "set it to true")


def _options(method: str) -> list[str]:
    return list(plugins.load("methods", method).Config.model_fields)


def _has(method: str, key: str) -> bool:
    """Whether the option is the method's; what is not of the method is every method's."""
    room, _, rest = key.partition(".")
    return room != "method" or rest.partition(".")[0] in _options(method)


def _key_problems(key: str, names: Sequence[str]) -> Iterator[Problem]:
    """Why a key cannot be swept."""
    where, (room, _, rest) = f"--sweep {key[:80]}", key.partition(".")
    if room not in _SWEPT or key in ("method", "method.name"):
        fix = (
            "give methods as --method a,b" if room == "method" else f"what may be swept: {', '.join(_SWEPT)}"
        )
        yield Problem(where, "is the same for all that is compared", fix)
    elif room == "train" and rest in _SHARED:
        yield Problem(
            where,
            "is the same for all that is compared",
            f"set it for all: {key}=VALUE, or --seeds, --budget",
        )
    elif room == "train" and rest not in TrainConfig.model_fields:
        yield Problem(where, "there is no such option", nearest(rest, TrainConfig.model_fields))
    elif room == "method" and names and not any(_has(name, key) for name in names):
        known = {option for name in names for option in _options(name)}
        yield Problem(where, f"none of {', '.join(names)} has this option", nearest(rest, known))


def _variant(base: Recipe, method: str, values: Tree, found: list[Problem]) -> Variant | None:
    name = ", ".join([method, *(f"{_short(key)} {_told(value)}" for key, value in values.items())])
    tree = base.model_dump(mode="json", exclude={"eval"})
    if tree["stages"][0]["method"]["name"] != method:
        tree["stages"][0]["method"] = {"name": method}
    try:
        recipe = recipes.load(tree, {f"stages.0.{key}": value for key, value in values.items()})
    except UserError as error:
        found += _in(name, error)
        return None
    return Variant(name, recipe)


def _in(name: str, error: UserError) -> list[Problem]:
    return [Problem(f"{name}: {p.where.removeprefix('stages.0.')}", p.what, p.fix) for p in error.problems]


def _short(key: str) -> str:
    return key.removesuffix(".name").rpartition(".")[2].replace("_", " ")


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check(variants: Sequence[Variant], progress: jobs.Progress = lambda name, rows: None) -> dict[str, Job]:
    """Each variant's job by its name. UserError with every problem of every variant, what all have in common once."""
    made: dict[str, Job] = {}
    by_problem: dict[Problem, list[str]] = {}
    for variant in variants:
        try:
            job = jobs.check(variant.recipe, progress)[0]
        except UserError as error:
            for problem in error.problems:
                by_problem.setdefault(problem, []).append(variant.name)
            continue
        made[variant.name] = job
        if not len(job.valid):
            lacking = Problem(
                "data.valid", "a comparison needs held-out rows", "name a file, or give data.valid_share"
            )
            by_problem.setdefault(lacking, []).append(variant.name)
    if by_problem:
        raise UserError(
            problem if len(names) == len(variants) else Problem(f"{', '.join(names)}: {problem.where}", problem.what, problem.fix)
            for problem, names in by_problem.items()
        )  # fmt: skip
    return made
