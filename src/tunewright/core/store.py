"""The only writer. An artifact is a folder that is complete or absent.

Files are written into a hidden sibling folder, flushed, hashed into ``manifest.json``, and the folder is
renamed into place. Readers trust a folder only if its manifest is there and agrees with every file.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunewright.core.errors import DamagedError

MANIFEST = "manifest.json"


def sha256_file(path: Path) -> str:
    """The file's SHA-256 as hex, read in 1 MB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace one file atomically: a reader sees the old text or the new one, never a part."""
    _write_pieces(path, [text])


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Replace one JSONL file atomically, a value a line."""
    _write_pieces(path, (json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def _write_pieces(path: Path, pieces: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace one JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; DamagedError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path}: not readable as JSON ({error})") from error


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


@contextmanager
def artifact(folder: Path, **facts: Any) -> Iterator[Path]:
    """Write into the folder that is yielded; on leaving it becomes ``folder``, whole and hashed.

    ``facts`` are kept in the manifest. If the body raises, nothing appears and nothing is left behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _seal(partial, facts)
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    """Flush every file, then write the manifest that names them all."""
    hashes = {}
    for path in _files(folder):
        _fsync(path)
        hashes[path.relative_to(folder).as_posix()] = sha256_file(path)
    for inner in sorted(p for p in folder.rglob("*") if p.is_dir()):
        _fsync(inner)
    write_json(folder / MANIFEST, {"files": hashes, **facts})


def _replace(partial: Path, folder: Path) -> None:
    """Rename into place. An older artifact of that name is moved aside first and removed last."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """True if the folder was sealed and holds exactly the bytes its manifest names."""
    try:
        return verify(folder) is not None
    except DamagedError:
        return False


def verify(folder: Path) -> dict[str, Any]:
    """The folder's manifest; DamagedError names each file that is missing or differs."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedError(f"{folder}: no {MANIFEST}; the folder was never completed")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DamagedError(f"{path}: not a manifest")
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"{file}: missing; the manifest of {folder} names it")
        if sha256_file(file) != expected:
            raise DamagedError(f"{file}: its bytes differ from the manifest of {folder}")
    return manifest
