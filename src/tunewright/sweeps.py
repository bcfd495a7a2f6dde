"""Options that a comparison varies besides the method: keys of the recipe with the values that are tried."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from tunewright.core import plugins
from tunewright.core.errors import Problem, UserError, nearest
from tunewright.recipes import TrainConfig, reading

Sweep = Mapping[str, Sequence[Any]]
_SWEPT = ("method", "optimizer", "precision", "fast", "train")
"""What may differ between variants: the rest decides what is learned and what is asked, which is the same for all."""
_SHARED = ("seed", "max_steps", "epochs")
"""Of train: every variant gets the same."""


def parse(texts: Iterable[str]) -> Sweep:
    """``method.rank=4,8`` as a key with its values, which are written as in a recipe. UserError with all problems."""
    found: list[Problem] = []
    swept: dict[str, list[Any]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        where = f"--sweep {text[:80]}"
        try:
            swept[key] = reading.parse(f"[{values}]", where) if key else []
        except UserError as error:
            found += error.problems
            continue
        if not swept[key]:
            found.append(Problem(where, "names no values", "write it like --sweep method.rank=4,8,16"))
    if found:
        raise UserError(found)
    return swept


def combinations(sweep: Sweep, method: str) -> Iterator[dict[str, Any]]:
    """Every choice of a value for each key that the method has; one empty choice if it has none."""
    keys = [key for key in sweep if _has(method, key)]
    for values in product(*(sweep[key] for key in keys)):
        yield dict(zip(keys, values, strict=True))


def problems(sweep: Sweep, methods: Sequence[str]) -> dict[str, Problem]:
    """Keys that cannot be swept for these methods, with the reason."""
    return {key: reason for key in sweep if (reason := _problem(key, methods))}


def _options(method: str) -> list[str]:
    return list(plugins.load("methods", method).Config.model_fields)


def _has(method: str, key: str) -> bool:
    """Whether the option is the method's; what is not of the method is every method's."""
    room, _, rest = key.partition(".")
    return room != "method" or rest.partition(".")[0] in _options(method)


def _problem(key: str, methods: Sequence[str]) -> Problem | None:
    where, (room, _, rest) = f"--sweep {key[:80]}", key.partition(".")
    same = "is the same for all that is compared"
    if key in ("method", "method.name"):
        return Problem(where, "methods are not swept", "name them: --method lora,houlsby")
    if room not in _SWEPT:
        return Problem(where, same, f"what may be swept: {', '.join(_SWEPT)}")
    if room == "train" and rest in _SHARED:
        return Problem(where, same, f"set it for all, by {key}=VALUE, or use --seeds and --budget")
    if room == "train" and rest not in TrainConfig.model_fields:
        return Problem(where, "there is no such option", nearest(rest, TrainConfig.model_fields))
    if room == "method" and methods and not any(_has(name, key) for name in methods):
        known = {option for name in methods for option in _options(name)}
        return Problem(where, f"none of {', '.join(methods)} has this option", nearest(rest, known))
    return None
