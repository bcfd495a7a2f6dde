"""One stream of events: ``events.jsonl``. The terminal, TensorBoard and the report are its readers."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunewright.core.journal import Journal, read

__all__ = ["Event", "EventLog", "Reader", "read"]

Event = dict[str, Any]
Reader = Callable[[Event], None]


class EventLog:
    """Appends each event as a JSON line and hands it to every reader.

    ``kind`` says what happened (``start``, ``step``, ``eval``, ``checkpoint``, ``sample``, ``end`` ...);
    ``time`` is seconds since the epoch.
    """

    def __init__(self, path: Path, *readers: Reader) -> None:
        self._journal = Journal(path)
        self.readers = list(readers)
        self.context: dict[str, Any] = {}
        """What every event is marked with, such as its stage."""

    def emit(self, kind: str, **facts: Any) -> Event:
        """Record one event."""
        event = {"kind": kind, "time": time.time(), **self.context, **facts}
        self._journal.append(event)
        for reader in self.readers:
            reader(event)
        return event

    def close(self) -> None:
        """Close the readers that have a ``close``."""
        for reader in self.readers:
            getattr(reader, "close", lambda: None)()
