"""What an answer is worth: by name, or by a Python function of the user's."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.core import answers, store
from tunewright.core.errors import Problem, RecipeError, nearest
from tunewright.core.paths import given
from tunewright.objectives import OTHERS


@dataclass(frozen=True)
class Asked:
    """A question and what its row says of it."""

    question: str
    """The last user turn."""
    reference: str
    """The row's own answer; empty if it has none."""


Reward = Callable[[Asked, str], float]


def exact_match(asked: Asked, answer: str) -> float:
    """1 for the row's own answer, as evaluation scores it."""
    return answers.exact_match(answer, asked.reference)


def contains(asked: Asked, answer: str) -> float:
    """1 if the row's own answer stands somewhere in it."""
    return float(answers.normalised(asked.reference) in answers.normalised(answer))


def brevity(asked: Asked, answer: str) -> float:
    """1 for an answer no longer than the row's own, falling to 0 at twice its length."""
    most = max(1, len(asked.reference))
    return min(1.0, max(0.0, 2 - len(answer) / most))


Judge = Callable[[Sequence[Asked], Sequence[str]], Sequence[float]]

_NAMED: dict[str, Reward] = {f.__name__: f for f in (exact_match, contains, brevity)}


def find(names: Sequence[str], judges: bool = False) -> dict[str, Reward]:
    """The functions; RecipeError for each that there is not. ``FILE.py:FUNCTION`` is the user's own code.

    ``judges`` says that names may also be those of reward models, which are left out here.
    """
    found, problems = dict[str, Reward](), list[Problem]()
    for name in names:
        if judges and name.startswith(OTHERS):
            continue
        try:
            found[name] = _own(name) if ".py:" in name else _NAMED[name]
        except KeyError:
            fix = nearest(name, _NAMED) or "name FILE.py:FUNCTION"
            problems.append(Problem("objective.rewards", f"there is no reward {name!r}", fix))
        except (OSError, ImportError, SyntaxError, AttributeError) as error:
            what = f"{name} cannot be loaded: {type(error).__name__}: {error}"
            problems.append(Problem("objective.rewards", what, "name FILE.py:FUNCTION"))
    if problems:
        raise RecipeError(problems)
    return found


def files(names: Iterable[str]) -> dict[str, str]:
    """The user's own files among these rewards, each by its hash: what they say decides what is learned."""
    paths = {name.rpartition(":")[0] for name in names if ".py:" in name}
    return {path: store.sha256_file(given(path, "objective.rewards")) for path in sorted(paths)}


def _own(name: str) -> Reward:
    path, _, function = name.rpartition(":")
    file: Path = given(path, "objective.rewards")
    spec = importlib.util.spec_from_file_location(f"tunewright_reward_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own: Any = getattr(module, function)
    if not callable(own):
        raise AttributeError(f"{function} is no function")  # noqa: TRY004 told with those it has not
    return own  # type: ignore[no-any-return]


def worth(
    names: Sequence[str], rewards: Mapping[str, Reward], judges: Mapping[str, Judge], asked: Sequence[Asked],
    said: Sequence[str],
) -> np.ndarray:  # fmt: skip
    """Rewards [N, R] of every answer to its question.

    Raises:
        RecipeError: a user's function fails, or gives no finite number.
    """
    pairs = list(zip(asked, said, strict=True))
    columns = [
        judges[name](asked, said)
        if name in judges
        else [_asked_of(rewards[name], name, *pair) for pair in pairs]
        for name in names
    ]
    return np.array(columns, np.float64).T


def _asked_of(reward: Reward, name: str, question: Asked, answer: str) -> float:
    try:
        value = float(reward(question, answer))
    except Exception as error:  # the user's code
        what = f"{name} fails on the answer {answer[:60]!r}: {type(error).__name__}: {error}"
        raise RecipeError(Problem("objective.rewards", what, "mend the function")) from error
    if not np.isfinite(value):
        raise RecipeError(
            Problem("objective.rewards", f"{name} gives {value} for {answer[:60]!r}", "give a finite number")
        )
    return value
