"""SHA-256 of large files that are there to be read: each once in a process, and beside what else it does.

A model's weights are hashed while its libraries are imported, which takes one core. For files that may be damaged, whose
bytes are to be looked at each time, there is ``store.sha256_file``.
"""

import hashlib
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from threading import Lock, Thread
from typing import NamedTuple

_PIECE = 16 << 20
"""Bytes at a time. After each the interpreter is waited for, up to 5 ms where it is busy."""
_FRESH_NS = 1_000_000_000
"""A file that was written so lately may be written again and look the same: whoever asks next reads it anew."""


class _File(NamedTuple):
    """A file as it is now; once it is written again it is another one."""

    path: Path
    inode: int
    size: int
    modified_ns: int


_known: dict[_File, Future[str]] = {}
_alone = Lock()


def begin(paths: Iterable[Path]) -> list[Future[str]]:
    """Hash these one after another meanwhile; each file's SHA-256 as hex, once it is known.

    OSError if one is not there; a future has it if one cannot be read.
    """
    files = [_now(path) for path in paths]
    with _alone:
        new = {file: Future[str]() for file in files if file not in _known}
        _known.update(new)
        found = [_known[file] for file in files]
    if new:
        Thread(target=_read, args=(new,), daemon=True).start()
    return found


def sha256(path: Path) -> str:
    """The file's, as hex; OSError if it cannot be read."""
    return begin([path])[0].result()


def _now(path: Path) -> _File:
    found = path.stat()
    return _File(path.absolute(), found.st_ino, found.st_size, found.st_mtime_ns)


def _read(files: dict[_File, Future[str]]) -> None:
    for file, found in files.items():
        try:
            digest = _hashed(file.path)
        except Exception as error:  # whatever it is, somebody waits for an answer
            _forget(file)
            found.set_exception(error)
            continue
        if time.time_ns() - file.modified_ns < _FRESH_NS:
            _forget(file)
        found.set_result(digest)


def _forget(file: _File) -> None:
    with _alone:
        del _known[file]


def _hashed(path: Path) -> str:
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()
