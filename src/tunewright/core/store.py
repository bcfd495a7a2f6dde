"""The only writer. An artifact is a folder that is complete or absent; a record is a JSON file that knows its
own hash.

An artifact's files are written into a hidden sibling folder, flushed, hashed into ``manifest.json``, and the
folder is renamed into place. Readers trust a folder only if its manifest is there and agrees with every file.
Whoever owns a folder calls :func:`recover` on it first: that mends what a kill left behind.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunewright.core.disk import Disk
from tunewright.core.errors import DamagedError, StorageError, UserError
from tunewright.core.paths import inside

MANIFEST = "manifest.json"
_SEAL = "sha256"
_LEFTOVER = re.compile(r"^\.(?P<name>.+)\.\d+\.(?P<kind>partial|tmp|old)$")
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
"""What a disk says; other errors of a body that writes are that body's own."""

disk = Disk()
"""Tests put another one here."""


def sha256_file(path: Path) -> str:
    """The file's SHA-256 as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _errno(error: BaseException) -> int | None:
    """What the system said, also where a library only quotes it."""
    if isinstance(error, OSError):
        return error.errno
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    return int(quoted[1]) if quoted else None


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """StorageError, naming the path, if the disk refuses what is done within."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageError) or (number := _errno(error)) not in _STORAGE:
            raise
        raise StorageError(_shown(path), os.strerror(number)) from error


def _shown(path: Path) -> Path:
    """The path as it is named once it is whole."""
    return Path(*(found["name"] if (found := _LEFTOVER.match(part)) else part for part in path.parts))


def append(path: Path, data: bytes) -> None:
    """Add bytes to a file that only grows."""
    with storing(path):
        disk.append(path, data)


def settle(path: Path) -> None:
    """Flush what was appended to a file, so that what is written next is never on disk without it."""
    with storing(path):
        disk.settle(path)


def write_text(path: Path, text: str) -> None:
    """Replace one file atomically: a reader sees the old text or the new one, never a part."""
    _write(path, [text.encode()])


def write_bytes(path: Path, data: bytes) -> None:
    """Replace one file atomically, such as a picture."""
    _write(path, [data])


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Replace one JSONL file atomically, a value a line."""
    _write(path, (json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values))


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    partial = _hidden(path, "tmp")
    with storing(path):
        disk.make_folder(path.parent)
        try:
            disk.write(partial, pieces)
            disk.rename(partial, path)
        finally:
            disk.remove(partial)
        disk.settle(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace one JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Replace one JSON object atomically, with its own hash inside it."""
    plain = json.loads(json.dumps(value))  # as it will be read: keys are text, tuples are lists
    write_json(path, {**plain, _SEAL: sha256_json(plain)})


def read_record(path: Path) -> dict[str, Any]:
    """What :func:`write_record` wrote; DamagedError if it is absent or not the same."""
    value = read_json(path)
    seal = value.pop(_SEAL, None) if isinstance(value, dict) else None
    if not isinstance(value, dict) or seal != sha256_json(value):
        raise DamagedError(f"{path}: it differs from what was written")
    return value


def read_json(path: Path) -> Any:
    """Parse a JSON file; DamagedError if it is absent or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{path}: missing") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: not readable as JSON ({error})") from error


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


@contextmanager
def artifact(folder: Path, /, **facts: Any) -> Iterator[Path]:
    """Write into the folder that is yielded; on leaving it becomes ``folder``, whole and hashed.

    ``facts`` are kept in the manifest. If the body raises, nothing appears and nothing is left behind.
    """
    partial = _hidden(folder, "partial")
    try:
        with storing(folder):
            disk.make_folder(folder.parent)
            disk.remove_folder(partial)
            disk.make_folder(partial)
            yield partial
            _seal(partial, facts)
            _replace(partial, folder)
    finally:
        with storing(folder):
            disk.remove_folder(partial)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    """Flush every file, then write the manifest that names them all."""
    hashes = {}
    for path in _files(folder):
        disk.settle(path)
        hashes[path.relative_to(folder).as_posix()] = sha256_file(path)
    for inner in sorted(p for p in folder.rglob("*") if p.is_dir()):
        disk.settle(inner)
    write_record(folder / MANIFEST, {"files": hashes, **facts})


def _replace(partial: Path, folder: Path) -> None:
    """Rename into place. An older artifact of that name is moved aside first; at the end it is put back if the
    new one did not arrive, else removed.
    """
    old = _hidden(folder, "old")
    if folder.exists():
        disk.rename(folder, old)
    try:
        disk.rename(partial, folder)
        disk.settle(folder.parent)
    finally:
        recover(folder.parent, old.name)


def remove(folder: Path) -> None:
    """Remove an artifact; killed on the way, what is left has no manifest and is trusted by nobody."""
    with storing(folder):
        disk.remove(folder / MANIFEST)
        disk.remove_folder(folder)


def leftovers(folder: Path, pattern: str = "**/.*") -> list[Path]:
    """What writers that were killed left in a folder."""
    return sorted(p for p in folder.glob(pattern) if _LEFTOVER.match(p.name))


def recover(folder: Path, pattern: str = "**/.*") -> None:
    """Put back what a kill caught between two renames, and remove what was half written.

    Only for a folder (or names in it) that has no writer now.
    """
    with storing(folder):
        for path in leftovers(folder, pattern):
            found = _LEFTOVER.match(path.name)
            whole = path.with_name(found["name"]) if found else path
            if found and found["kind"] == "old" and not whole.exists():
                disk.rename(path, whole)
            elif path.is_dir():
                disk.remove_folder(path)
            else:
                disk.remove(path)


def is_complete(folder: Path) -> bool:
    """True if the folder was sealed and holds exactly the bytes its manifest names."""
    try:
        return verify(folder) is not None
    except DamagedError:
        return False


def verify(folder: Path) -> dict[str, Any]:
    """The folder's manifest; DamagedError names the first file that is missing or differs."""
    manifest = facts(folder)
    for name, expected in manifest["files"].items():
        try:
            file = inside(folder, name, str(folder / MANIFEST))
        except UserError as error:
            raise DamagedError(str(error)) from None
        if not file.is_file():
            raise DamagedError(f"{file}: missing; the manifest of {folder} names it")
        if sha256_file(file) != expected:
            raise DamagedError(f"{file}: its bytes differ from the manifest of {folder}")
    return manifest


def facts(folder: Path) -> dict[str, Any]:
    """The folder's manifest, its files not looked at; DamagedError if there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedError(f"{folder}: no {MANIFEST}; the folder was never completed")
    manifest = read_record(path)
    if not isinstance(manifest.get("files"), dict):
        raise DamagedError(f"{path}: not a manifest")
    return manifest
