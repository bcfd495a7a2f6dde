"""Which samples each step learned from, in order: ``samples.jsonl``, which only grows.

A step that is done again after a kill stands there again; the later line counts, and undoes those of later
steps. A rollback undoes the steps after the checkpoint it goes back to.
"""

from collections.abc import Iterable
from pathlib import Path

from tunewright.core import journal, store
from tunewright.core.errors import DamagedError

Steps = dict[int, list[int]]
"""Step (from 1) -> indices of its samples, in the order of the steps; none if it was skipped."""


class Ledger:
    """One stage's ledger; it must have one writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = journal.Journal(path)

    def learned(self, step: int, samples: Iterable[int]) -> None:
        """The weights were updated with these."""
        self._journal.append({"step": step, "samples": [int(i) for i in samples]})

    def skipped(self, step: int, samples: Iterable[int]) -> None:
        """These were passed over: their loss was a spike."""
        self._journal.append({"step": step, "samples": [], "skipped": [int(i) for i in samples]})

    def rolled_back(self, step: int, to: int) -> None:
        """At ``step`` the weights became those of step ``to`` again."""
        self._journal.append({"rollback": to, "step": step})

    def settle(self) -> None:
        """Flush it: a checkpoint must not know of steps that a loss of power takes from here."""
        self._journal.settle()

    def mend(self, steps: Steps) -> None:
        """Write it anew, damaged or missing lines told by the caller."""
        store.write_text(self.path, b"".join(
            journal.line({"step": step, "samples": samples}) for step, samples in steps.items()
        ).decode())  # fmt: skip
        self._journal = journal.Journal(self.path)


def lost(path: Path, steps: int) -> int:
    """How many of the first ``steps`` are not in the ledger."""
    return steps - len(read(path).keys() & set(range(1, steps + 1)))


def check(path: Path, steps: int) -> None:
    """DamagedError if one of the first ``steps`` is not in the ledger."""
    if missing := lost(path, steps):
        raise DamagedError(f"{path}: {missing} steps are lost")


def read(path: Path) -> Steps:
    """What the weights have learned from, in order."""
    steps: Steps = {}
    for line in journal.read(path):
        if "rollback" in line:
            steps |= {step: [] for step in steps if step > line["rollback"]}
        else:
            if steps and line["step"] <= next(reversed(steps)):
                steps = {step: samples for step, samples in steps.items() if step < line["step"]}
            steps[line["step"]] = line["samples"]
    return steps
