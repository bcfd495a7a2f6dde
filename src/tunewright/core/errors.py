"""Everything Tunewright raises on purpose, and how it reads.

TunewrightError            exit 1
├── UserError              exit 2: the input is wrong; carries every problem found, not the first
│   ├── RecipeError        the recipe: unknown key, wrong type, impossible combination
│   ├── DataError          the data: bad row, unknown format, empty file
│   ├── ModelError         the model: not found, no template, wrong architecture
│   ├── HardwareError      the machine cannot do what the recipe asks
│   ├── DriftError         a run folder was started with other inputs
│   └── BusyError          a run folder is being written by another process
├── DamagedError           an artifact does not match its manifest
├── DivergedError          training produced a number that is not finite, or a loss that does not come back
└── StorageError           exit 74: the disk is full, read-only or broken

InterruptedRunError        a signal: exit 128 and its number (Ctrl-C 130, SIGTERM 143). Not an Exception, like
                           KeyboardInterrupt: a library's ``except Exception`` must not take it for its own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")


@dataclass(frozen=True)
class Problem:
    """One thing a user can mend: where it is, what was found, how to fix it."""

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; fix: {self.fix}" if self.fix else "")


class TunewrightError(Exception):
    """Base of the tree; ``exit_code`` is what the command line returns."""

    exit_code: int = 1


class UserError(TunewrightError):
    """Wrong input, with all its problems at once."""

    exit_code = 2

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def attempted(make: Callable[[], Made], found: list[Problem]) -> Made | None:
    """What is made, or None with its problems added to those that were found: the next thing is looked at, too."""
    try:
        return make()
    except UserError as error:
        found += error.problems
        return None


class RecipeError(UserError):
    """The recipe is wrong. ``trees`` are its stages as written, so that the rest can be checked, too."""

    def __init__(self, problems: Problem | Iterable[Problem], trees: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(problems)
        self.trees = tuple(trees)


class DataError(UserError):
    """The data is wrong."""


class ModelError(UserError):
    """The model cannot be used as asked."""


class HardwareError(UserError):
    """The machine cannot do what the recipe asks."""


class DriftError(UserError):
    """The run folder was started with other inputs."""


class BusyError(UserError):
    """The run folder has an owner already."""


class DamagedError(TunewrightError):
    """An artifact on disk does not match its manifest."""


class DivergedError(TunewrightError):
    """Training left the numbers it can go on with; the weights were not changed by it."""


class StorageError(TunewrightError):
    """The disk refused a write. What was complete before still is."""

    exit_code = 74  # EX_IOERR of sysexits.h

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path}: {reason}; what was saved before is whole: make room and run the same command again"
        )


class InterruptedRunError(BaseException):
    """A run was stopped by a signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def nearest(word: str, known: Iterable[str]) -> str:
    """A fix for a misspelt word: the closest known one, else all of them."""
    known = sorted(known)
    if not known:
        return "leave it out"
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"one of {', '.join(known)}"


def few(names: Sequence[str], told: int = 3) -> str:
    """The first names, and how many there are besides: ``a, b, c and 4 more``."""
    return ", ".join(names[:told]) + (f" and {len(names) - told} more" if len(names) > told else "")
