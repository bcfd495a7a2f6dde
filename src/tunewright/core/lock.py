"""One folder, one owner. The lock belongs to the process and goes with it, however it ends."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tunewright.core import store
from tunewright.core.errors import BusyError, Problem, UserError

OWNER = ".owner"
_PATIENCE = 1.0
"""Seconds in which a new owner has written its name."""


@contextmanager
def sole_owner(folder: Path, where: str = "output") -> Iterator[None]:
    """Make the folder if need be, and own it.

    Raises:
        BusyError: another process does.
        UserError: the folder cannot be made or written to.
        StorageError: the disk has no room for it.
    """
    try:
        with store.storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / OWNER).open("a+")
    except OSError as error:
        what = f"{str(folder)[:200]!r} cannot be written ({error.strerror})"
        raise UserError(Problem(where, what, "give another folder")) from None
    except ValueError as error:
        raise UserError(
            Problem(where, f"{str(folder)!r} is no path ({error})", "give another folder")
        ) from None
    with file:
        _take(file, folder, where)
        try:
            yield
        finally:
            os.ftruncate(file.fileno(), 0)  # an owner that is gone must not be taken for the next one


def _take(file: Any, folder: Path, where: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(folder, where, _told(file)) from None
    if not _is_at(file, folder / OWNER):  # the folder was moved aside between open and lock
        raise _busy(folder, where, "has just been moved aside")
    owner = {"process": os.getpid(), "host": platform.node(), "since": time.time()}
    with store.storing(folder / OWNER):  # unbuffered, so that closing it cannot fail again
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), json.dumps(owner).encode())


def _is_at(file: Any, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _told(file: Any) -> str:
    """Who owns it. A new owner is just about to write its name; until then nothing stands there, or one that died."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        file.seek(0)
        with suppress(ValueError):
            owner = json.loads(file.read())
            if owner["host"] != platform.node() or _is_alive(owner["process"]):
                return f"is being written by process {owner['process']} on {owner['host']}"
        time.sleep(0.01)
    return "is being written by another process"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's, and alive
        return True
    return True


def _busy(folder: Path, where: str, what: str) -> BusyError:
    fix = "wait until it is done or stop it, or give another output=FOLDER"
    return BusyError(Problem(where, f"{folder} {what}", fix))


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Wait until no one else is within, of all that use this lock file."""
    with store.storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def once(folder: Path, make: Callable[[], None]) -> None:
    """Make an artifact of the cache unless it is there and whole; who comes second waits and finds it made."""
    if store.is_complete(folder):
        return
    with turn(folder.with_name(f"{folder.name}.lock")):
        store.recover(folder.parent, f".{folder.name}.*")
        if not store.is_complete(folder):
            make()


def is_owned(folder: Path) -> bool:
    """Whether a process owns the folder now."""
    if not (folder / OWNER).is_file():
        return False
    with (folder / OWNER).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
