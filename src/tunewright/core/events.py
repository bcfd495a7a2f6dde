"""One stream of events: ``events.jsonl``. The terminal, TensorBoard and the report are its readers."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Reader = Callable[[Event], None]


class EventLog:
    """Appends each event as a JSON line and hands it to every reader.

    ``kind`` says what happened (``start``, ``step``, ``eval``, ``checkpoint``, ``sample``, ``end`` ...);
    ``time`` is seconds since the epoch. A line cut by a crash is skipped by :func:`read`.
    """

    def __init__(self, path: Path, *readers: Reader) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        if self._file.tell() and not _ends_with_newline(self._file):
            self._file.write(b"\n")
        self.readers = list(readers)
        self.context: dict[str, Any] = {}
        """What every event is marked with, such as its stage."""

    def emit(self, kind: str, **facts: Any) -> Event:
        """Record one event."""
        event = {"kind": kind, "time": time.time(), **self.context, **facts}
        self._file.write(json.dumps(event, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        for reader in self.readers:
            reader(event)
        return event

    def close(self) -> None:
        """Close the file; readers that have a ``close`` are closed too."""
        self._file.close()
        for reader in self.readers:
            getattr(reader, "close", lambda: None)()


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")


def read(path: Path) -> Iterator[Event]:
    """Every whole event in the file, oldest first."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue
