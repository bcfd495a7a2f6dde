"""One folder, one owner; the lock goes with its process."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tunewright.core.errors import BusyError, StorageError, UserError
from tunewright.core.lock import OWNER, is_owned, sole_owner, turn

OWNS = """
import sys
from pathlib import Path
from tunewright.core.lock import sole_owner
with sole_owner(Path(sys.argv[1])):
    print("owned", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns the folder until its input ends."""
    command = [sys.executable, "-c", OWNS, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        yield process


def test_the_folder_is_made_and_owned_as_long_as_that_lasts(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    assert not is_owned(folder)
    with sole_owner(folder):
        assert is_owned(folder)
        owner = json.loads((folder / OWNER).read_text())
        assert owner["process"] == os.getpid()
    assert not is_owned(folder)
    with sole_owner(folder):
        assert is_owned(folder)


def test_a_second_owner_is_told_who_the_first_is(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        with pytest.raises(BusyError) as caught, sole_owner(tmp_path, "here"):
            raise AssertionError("two owners")
        (problem,) = caught.value.problems
        assert problem.where == "here"
        assert f"is being written by process {process.pid} on " in problem.what
        assert is_owned(tmp_path)
    with sole_owner(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["process"] == os.getpid()


def test_a_second_owner_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with sole_owner(tmp_path), pytest.raises(BusyError, match=str(os.getpid())), sole_owner(tmp_path):
        raise AssertionError("two owners")


def test_the_lock_goes_with_a_killed_process(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_owned(tmp_path)
        with sole_owner(tmp_path):
            assert is_owned(tmp_path)


def test_what_an_owner_that_died_while_naming_itself_left_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text('{"process": 1')
    assert not is_owned(tmp_path)
    with sole_owner(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("told", ["", '{"process": 1'])
def test_an_owner_that_has_not_named_itself_yet_is_an_owner(tmp_path: Path, told: str) -> None:
    with sole_owner(tmp_path):
        (tmp_path / OWNER).write_text(told)
        with pytest.raises(BusyError, match="is being written by another process"), sole_owner(tmp_path):
            raise AssertionError("two owners")


def test_a_folder_moved_aside_by_its_owner_can_be_owned_anew(tmp_path: Path) -> None:
    folder, aside = tmp_path / "run", tmp_path / "run.1"
    with ExitStack() as stack:
        stack.enter_context(sole_owner(folder))
        folder.rename(aside)
        assert not is_owned(folder)
        stack.enter_context(sole_owner(folder))
        assert is_owned(folder)
        assert is_owned(aside)


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "nul\0"])
def test_a_folder_that_cannot_be_made_is_the_users_problem(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as caught, sole_owner(tmp_path / name, "there"):
        raise AssertionError("no such folder")
    assert not isinstance(caught.value, BusyError)
    assert [problem.where for problem in caught.value.problems] == ["there"]
    assert caught.value.problems[0].fix == "give another folder"


def test_a_disk_that_takes_no_name_is_a_storage_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # every write says "File too large"
    try:
        with pytest.raises(StorageError, match="File too large"), sole_owner(tmp_path / "run"):
            raise AssertionError("nothing can be written here")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WAITS = """
import sys
from pathlib import Path
from tunewright.core.lock import turn
path = Path(sys.argv[1])
for _ in range(200):
    with turn(path / "deep" / "lock"):
        count = int((path / "count").read_text())
        (path / "count").write_text(str(count + 1))
"""


def test_turns_are_taken_one_after_another(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "800"


def test_a_turn_ends_with_an_error_too(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError), turn(tmp_path / "lock"):
            raise RuntimeError("within")
