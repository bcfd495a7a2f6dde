"""The log of runs: a JSON line for each, written at once, so that a benchmark that was stopped goes on."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Tree = dict[str, Any]
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b")


def why(failed: str) -> str:
    """What says why a run failed: its output's last line that names an error, else how it ended, which comes first."""
    lines = [line.strip() for line in failed.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return errors[-1] if errors else lines[0]


@dataclass
class Journal:
    """Runs and held-out losses by their keys. A line that was cut off by a stop is left out."""

    path: Path
    runs: dict[str, Tree] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    rates: list[Tree] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines():
            try:
                self._take(json.loads(line))
            except ValueError:
                continue
        if not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as out:
                out.write("\n")

    def _take(self, entry: Tree) -> None:
        if entry["kind"] == "run":
            self.runs[entry["key"]] = entry
        elif entry["kind"] == "losses":
            self.losses[entry["key"]] = entry["losses"]
        else:
            self.rates.append(entry)

    def add(self, kind: str, **facts: Any) -> Tree:
        """Write an entry: ``run`` or ``losses``, with a ``key``, or ``rates``."""
        entry = {"kind": kind, **facts}
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")
        self._take(entry)
        return entry

    def has(self, key: str) -> bool:
        """Whether the run was made and ended well."""
        return "result" in self.runs.get(key, {})
