"""A file that only grows: one JSON object a line, each with a checksum.

A line that a crash cut short is ended by the next one; readers pass over it, as over any line whose bytes are
not those that were written.
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunewright.core import store

_SEALED = re.compile(rb'(?P<body>\{.*), "crc": "(?P<crc>[0-9a-f]{8})"\}')


def line(value: Mapping[str, Any]) -> bytes:
    """The object as a line, ``crc`` its last key: the CRC-32 of what stands before it."""
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")[:-1]
    return body + b', "crc": "%08x"}\n' % zlib.crc32(body)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    found = _SEALED.fullmatch(raw.rstrip(b"\n"))
    if not found or zlib.crc32(found["body"]) != int(found["crc"], 16):
        return None
    value: dict[str, Any] = json.loads(found["body"] + b"}")
    return value


class Journal:
    """Appends to one file; it must have one writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with store.storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._torn = _is_torn(path)

    def append(self, value: Mapping[str, Any]) -> None:
        """Write one line. StorageError if the disk refuses it."""
        start, self._torn = b"\n" if self._torn else b"", True
        store.append(self.path, start + line(value))
        self._torn = False

    def settle(self) -> None:
        """Flush every line; they are not flushed one by one."""
        if self.path.exists():
            store.settle(self.path)


def _is_torn(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole object in the file, oldest first."""
    return (value for raw in _lines(path) if (value := _parsed(raw)) is not None)


def damaged(path: Path) -> int:
    """How many lines are not as they were written; one that a crash cut short counts as well."""
    return sum(_parsed(raw) is None for raw in _lines(path))


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            yield from file
