"""Row 4: a disk that is full, or broken, at any moment: a named error, nothing half written is left, what was
complete stays, and with room the same command goes on to the exact end.
"""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from disks import (
    Tree,
    Whole,
    clear,
    content,
    go,
    is_finished,
    lay_out,
    newest_checkpoint,
    spread,
    told,
    whole,
)
from lab import differences, ended, outcome

from tunewright.core import store
from tunewright.core.disk import Disk
from tunewright.core.errors import DamagedError, StorageError

PAGE = 4096
ROOM = "size=64m,nr_inodes=4096"


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_model_folder) -> Whole:
    return whole(tmp_path_factory.mktemp("full"), tiny_model_folder)


def damaged(workspace: Path) -> list[str]:
    """Checkpoints and results that a failed write did harm to, and what it left."""
    found = [str(path) for path in store.leftovers(workspace)]
    run = workspace / "run" / "stages"
    for folder in (*run.glob("*/checkpoints/*"), *run.glob("*/adapter"), *workspace.glob("cache/tokens/*")):
        if folder.is_dir():
            try:
                store.verify(folder)
            except DamagedError as error:
                found.append(str(error))
    return found


def wrong_resume(workspace: Path, left: Tree) -> list[str]:
    """Whether the run after ``left`` went on from the newest checkpoint in it."""
    since = len(left.get("run/events.jsonl") or b"")
    resumed = [event["step"] for event in told(workspace, since) if event["kind"] == "resume"]
    newest = None if is_finished(left) else newest_checkpoint(left)
    good = [] if newest is None else [newest]
    return [] if resumed == good else [f"it went on from {resumed}, the newest checkpoint is {newest}"]


class FailingDisk(Disk):
    """Refuses its ``at``-th operation that could need room, and from then on all that do.

    What it refuses to write is half written. A rename or a flush is refused only if it is that operation.
    """

    def __init__(self, at: int, number: int = errno.ENOSPC) -> None:
        self.at, self.number = at, number
        self.count = 0

    def _check(self, path: Path, lasting: bool) -> None:
        self.count += 1
        if self.count == self.at or (lasting and self.count > self.at):
            raise OSError(self.number, os.strerror(self.number), str(path))

    def make_folder(self, path: Path) -> None:
        if not path.exists():
            self._check(path, lasting=True)
        super().make_folder(path)

    def write(self, path: Path, pieces: Iterable[bytes]) -> None:
        data = b"".join(pieces)
        try:
            self._check(path, lasting=True)
        except OSError:
            path.write_bytes(data[: len(data) // 2])
            raise
        super().write(path, [data])

    def append(self, path: Path, data: bytes) -> None:
        try:
            self._check(path, lasting=True)
        except OSError:
            super().append(path, data[: len(data) // 2] if self.count == self.at else b"")
            raise
        super().append(path, data)

    def settle(self, path: Path) -> None:
        self._check(path, lasting=False)
        super().settle(path)

    def rename(self, path: Path, target: Path) -> None:
        self._check(path, lasting=False)
        super().rename(path, target)


class ReadOnlyDisk(FailingDisk):
    """From its ``at``-th operation on nothing can be changed, not even removed."""

    def _check(self, path: Path, lasting: bool) -> None:
        super()._check(path, lasting=True)

    def write(self, path: Path, pieces: Iterable[bytes]) -> None:
        self._check(path, lasting=True)
        Disk.write(self, path, pieces)

    def append(self, path: Path, data: bytes) -> None:
        self._check(path, lasting=True)
        Disk.append(self, path, data)

    def remove(self, path: Path) -> None:
        if path.exists():
            self._check(path, lasting=True)
        super().remove(path)

    def remove_folder(self, path: Path) -> None:
        if path.exists():
            self._check(path, lasting=True)
        super().remove_folder(path)


def refused(recipe: Path, workspace: Path, disk: FailingDisk) -> list[str]:
    """What is not as it must be after a run on a disk that fails."""
    try:
        go(recipe, workspace, disk)
    except StorageError as error:
        named = os.strerror(disk.number) in str(error) and str(workspace) in str(error)
        return [] if named and error.exit_code == 74 else [f"the error is {error.exit_code}: {error}"]
    except OSError as error:
        return [f"not a StorageError: {error!r}"]
    return ["it did not fail"]


def wrong_after(plain: Whole, workspace: Path, disk: FailingDisk) -> list[str]:
    """All that is not as it must be: at the failure, and when the recipe is run with room again."""
    found = refused(plain.recipe, workspace, disk)
    if not isinstance(disk, ReadOnlyDisk):
        found += damaged(workspace)
    left = content(workspace)
    go(plain.recipe, workspace)
    found += differences(plain.outcome, outcome(workspace / "run")) + wrong_resume(workspace, left)
    found += damaged(workspace)
    clear(workspace)
    return found


def count_operations(recipe: Path, workspace: Path) -> int:
    disk = FailingDisk(at=10**9)
    go(recipe, workspace, disk)
    clear(workspace)
    return disk.count


@pytest.fixture(scope="module")
def operations(plain, tmp_path_factory) -> int:
    """How many there are in a run."""
    return count_operations(plain.recipe, tmp_path_factory.mktemp("counted"))


@pytest.mark.row(4)
def test_a_disk_that_is_full_at_any_operation(plain, operations, tmp_path, tally, times):
    for at in spread(range(1, operations + 1), times(6, operations)):
        wrong = wrong_after(plain, tmp_path / "full", FailingDisk(at))
        tally.add(not wrong, f"operation {at} of {operations}: {wrong}")


@pytest.mark.row(4)
def test_a_disk_that_is_full_while_an_older_result_is_replaced(plain, tmp_path, tally, times):
    before = {name: data for name, data in plain.tree.items() if name != "run/stages/sft/metrics.json"}
    count = count_operations(plain.recipe, lay_out(before, tmp_path / "counted"))
    for at in spread(range(1, count + 1), times(4, count)):
        wrong = wrong_after(plain, lay_out(before, tmp_path / "full"), FailingDisk(at))
        tally.add(not wrong, f"operation {at} of {count}: {wrong}")


@pytest.mark.row(4)
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, FailingDisk), (errno.EDQUOT, FailingDisk), (errno.EROFS, ReadOnlyDisk)]
)
def test_a_disk_that_breaks(plain, operations, tmp_path, tally, times, number, kind):
    places = range(1, operations + 1)
    for at in spread(places, times(3, 40))[1 : times(2, 40)]:
        wrong = wrong_after(plain, tmp_path / "broken", kind(at, number))
        tally.add(not wrong, f"{os.strerror(number)} at operation {at} of {operations}: {wrong}")


# A real file system that is too small


@contextmanager
def mounted(at: Path, options: str) -> Iterator[None]:
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


def works(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def elsewhere(request, tmp_path_factory) -> dict[str, Any]:
    """Empty where this process may mount; else what the tests that mount counted in a namespace where one may."""
    folder = tmp_path_factory.mktemp("mount")
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if works(mount):
        subprocess.run(["umount", str(folder)], check=True)
        return {}
    if not works(["unshare", "-rm", *mount]):
        pytest.skip("this system lets nobody mount a file system, not even in a namespace of its own")
    counts = folder / "counts.json"
    command = ["unshare", "-rm", sys.executable, "-m", "pytest", str(request.path), "-k", "file_system"]
    environment = {**os.environ, "TUNEWRIGHT_FAULTS_JSON": str(counts)}
    subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=request.path.parents[2], env=environment, check=False
    )
    return {count["test"]: count for count in map(json.loads, counts.read_text().splitlines())}


def is_counted(elsewhere: dict[str, Any], tally) -> bool:
    """Whether a namespace was needed; ``tally`` has its counts then."""
    if elsewhere:
        found = elsewhere[tally.test]
        tally.held, tally.broken, tally.notes = found["held"], found["broken"], found["notes"]
    return bool(elsewhere)


def run_there(plain: Whole, disk: Path, cache: Path) -> tuple[int, str]:
    """The command's exit code and what it said."""
    log = plain.lab.folder / "said.log"
    log.unlink(missing_ok=True)
    arguments = ["run", str(plain.recipe), f"output={disk / 'run'}"]
    return ended(plain.lab.command(arguments, log, TUNEWRIGHT_CACHE=str(cache))), log.read_text()


def wrong_on(plain: Whole, disk: Path, cache: Path) -> list[str]:
    """All that is not as it must be when a run does not fit on a file system that has room later."""
    code, said = run_there(plain, disk, cache)
    named = f"error: {disk}" in said and "No space left on device" in said and "Traceback" not in said
    found = [] if code == 74 and named else [f"exit code {code}: {said}"]
    found += damaged(disk)
    left = content(disk)
    subprocess.run(["mount", "-o", f"remount,{ROOM}", str(disk)], check=True)
    code, said = run_there(plain, disk, cache)
    if code:
        return [*found, f"with room again, exit code {code}: {said}"]
    found += differences(plain.outcome, outcome(disk / "run")) + wrong_resume(disk, left)
    return found + damaged(disk)


def too_small(tree: Tree, count: int) -> Iterable[str]:
    """File systems that have too few pages or too few names for all that is in a workspace."""
    pages = sum(-(-len(data) // PAGE) for data in tree.values() if data)
    yield from (f"size={n * PAGE}" for n in spread(range(1, pages), count))
    yield from (f"nr_inodes={n}" for n in spread(range(2, len(tree) + 1), count))


@pytest.mark.row(4)
def test_a_file_system_that_is_too_small(elsewhere, plain, tmp_path, tally, times):
    if is_counted(elsewhere, tally):
        return
    for number, options in enumerate(too_small(plain.tree, times(2, 40))):
        disk = tmp_path / f"disk-{number}"
        with mounted(disk, options):
            wrong = wrong_on(plain, disk, disk / "cache")
        tally.add(not wrong, f"{options}: {wrong}")


@pytest.mark.row(4)
def test_a_file_system_without_any_room(elsewhere, plain, tmp_path, tally):
    if is_counted(elsewhere, tally):
        return
    disk = tmp_path / "disk"
    with mounted(disk, f"size={PAGE}"):
        (disk / "filler").write_bytes(bytes(PAGE))
        wrong = wrong_on(plain, disk, tmp_path / "cache")
    tally.add(not wrong, f"no room at all: {wrong}")


@pytest.mark.row(4)
@pytest.mark.parametrize("holds", [True, False])
def test_a_file_system_that_is_read_only(elsewhere, plain, tmp_path, tally, holds):
    if is_counted(elsewhere, tally):
        return
    disk = tmp_path / "disk"
    with mounted(disk, ROOM):
        lay_out(plain.tree if holds else {}, disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code, said = run_there(plain, disk, disk / "cache")
    reason = {2: "cannot be written", 74: "Read-only file system"}.get(code, "neither")
    good = str(disk) in said and reason in said and "Traceback" not in said
    tally.add(good, f"exit code {code}: {said}")
