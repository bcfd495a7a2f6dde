"""Names that become paths: those read from files must stay in a folder, those of users may lead anywhere."""

import os
import re
from pathlib import Path

from tunewright.core.errors import Problem, UserError

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_SHOWN = 100


def inside(root: Path, name: str, where: str) -> Path:
    """``root / name``, for a name that someone else wrote; ``where`` is the place it was read from.

    Raises:
        UserError: the name is empty, absolute, no path at all, or leads out of ``root``, by ``..`` or a link.
    """
    if fault := _unreadable(name) or _outside(root, name):
        raise _refused(where, name, fault, f"name a file in {root}, by its path from there")
    return root / name


def given(name: str, where: str) -> Path:
    """The path that a user wrote, ``~`` replaced; nothing need be there.

    Raises:
        UserError: no file can have that name, or ``~`` is of an unknown user.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise _refused(where, name, "begins with an unknown user's ~", "check the path") from None
    if fault := _unreadable(name) or _impossible(path):
        raise _refused(where, name, fault, "check the path")
    return path


def folder_to_make(name: str, where: str) -> Path:
    """The folder that a user wants written: it is one already, or can be made.

    Raises:
        UserError: as :func:`given`; something else is in the way, or nothing may be written there.
    """
    path = given(name, where)
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise _refused(where, name, f"cannot be a folder: {there} is none", "give another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _refused(where, name, f"cannot be written: {there} is closed to you", "give another folder")
    return path


def check_plain(folder: Path, where: str) -> None:
    """UserError if opening what is in the folder could hang or never end: a pipe, a socket, a device."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise _refused(where, str(path), "is a pipe or a device, expected a file", "leave it out")


def _unreadable(name: str) -> str:
    """Why the name is none that a file could well have; empty if it may be one."""
    if not name:
        return "is no path"
    if found := _CONTROL.search(name):
        return f"holds the control character U+{ord(found[0]):04X}"
    return "" if name.isprintable() or _is_utf8(name) else "is not UTF-8"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _outside(root: Path, name: str) -> str:
    """How the name leads out of the folder; empty if it does not."""
    if Path(name).is_absolute():
        return "is an absolute path"
    try:
        if not (root / name).resolve().is_relative_to(root.resolve()):
            return f"leads out of {root}"
    except (OSError, RuntimeError) as error:  # a circle of links
        return f"is no path here ({_reason(error)})"
    return _impossible(root / name)


def _impossible(path: Path) -> str:
    """Why there can be no file of that name, as when it is too long; empty if there is or could be one."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
    except OSError as error:
        return f"is no path here ({_reason(error)})"
    return ""


def _reason(error: Exception) -> str:
    """The system's words without the path, which may be long."""
    return (isinstance(error, OSError) and error.strerror) or "it cannot be followed"


def _refused(where: str, name: str, fault: str, fix: str) -> UserError:
    shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    return UserError(Problem(where, f"{shown!r} {fault}", fix))


def cache_folder() -> Path:
    """``$TUNEWRIGHT_CACHE``, else ``~/.cache/tunewright``."""
    chosen = os.environ.get("TUNEWRIGHT_CACHE") or "~/.cache/tunewright"
    return Path(os.path.expanduser(chosen))  # noqa: PTH111 - Path's own fails where nobody has a home
