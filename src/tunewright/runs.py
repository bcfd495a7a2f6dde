"""A finished run folder."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright.core import store
from tunewright.data.rows import Message
from tunewright.serve import speaker


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path

    @cached_property
    def results(self) -> dict[str, Any]:
        """What ``results.json`` says."""
        return store.read_record(self.folder / "results.json")

    @property
    def report(self) -> Path:
        """The report page."""
        return self.folder / "report.html"

    @property
    def artifact(self) -> Path:
        """The last stage's adapter or model folder."""
        return speaker.result_of(self.folder)

    @cached_property
    def speaker(self) -> speaker.Speaker:
        """The last stage's model, loaded."""
        return speaker.load(str(self.folder))

    def generate(self, prompt: str, max_new_tokens: int = 128) -> str:
        """The trained model's greedy answer to one user turn."""
        return self.speaker.reply((Message("user", prompt),), max_new_tokens)
