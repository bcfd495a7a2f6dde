"""Problems read as place, finding and fix; one exception carries them all."""

import os
import signal
from pathlib import Path

import pytest

from tunewright.core import errors
from tunewright.core.errors import DataError, Problem, TunewrightError, UserError, nearest


def test_a_problem_reads_as_place_finding_and_fix() -> None:
    assert (
        str(Problem("a.jsonl:3", "the row is empty", "fill it in"))
        == "a.jsonl:3: the row is empty; fix: fill it in"
    )
    assert str(Problem("a.jsonl:3", "the row is empty")) == "a.jsonl:3: the row is empty"


def test_an_error_tells_every_problem_a_line_each() -> None:
    error = DataError(Problem(f"rows.jsonl:{line}", "bad") for line in (1, 2, 3))
    assert str(error) == "rows.jsonl:1: bad\nrows.jsonl:2: bad\nrows.jsonl:3: bad"
    assert [problem.where for problem in error.problems] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]


def test_a_single_problem_needs_no_list() -> None:
    assert DataError(Problem("a", "b")).problems == (Problem("a", "b"),)


@pytest.mark.parametrize(
    "name", ["RecipeError", "DataError", "ModelError", "HardwareError", "DriftError", "BusyError"]
)
def test_wrong_input_exits_with_2(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, UserError)
    assert error.exit_code == 2


@pytest.mark.parametrize("error", [errors.DamagedError, errors.DivergedError])
def test_what_is_not_the_users_doing_exits_with_1(error: type[TunewrightError]) -> None:
    assert not issubclass(error, UserError)
    assert error.exit_code == 1


def test_a_disk_that_refuses_has_a_code_of_its_own() -> None:
    error = errors.StorageError(Path("runs/one"), "No space left on device")
    assert error.exit_code == os.EX_IOERR == 74
    assert str(error).startswith("runs/one: No space left on device; what was saved before is whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_exits_as_the_shell_would_say(number: int, code: int) -> None:
    error = errors.InterruptedRunError(number, "stopped")
    assert (error.exit_code, str(error)) == (code, "stopped")
    assert not isinstance(error, UserError)
    assert errors.TunewrightError.exit_code == 1


def test_nearest_offers_the_closest_spelling_or_all_there_are() -> None:
    assert nearest("rnak", ["alpha", "rank"]) == "did you mean 'rank'?"
    assert nearest("zzz", ["rank", "alpha"]) == "one of alpha, rank"
