"""What a system is asked to do and what it tells: one JSON file in, one out."""

import importlib.metadata
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Tree = dict[str, Any]
_TOLD = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory", "tunewright")

PEER_SETTINGS = {"args", "env", "load", "bf16_adapter", "flatten"}
"""What a peer's variant may set: training arguments, environment variables (set by the runner), arguments of
``from_pretrained``, the adapter in the model's own precision, and batches flattened to one row."""


@dataclass
class Work:
    """One run: all times are seconds since the process was started by the runner."""

    asked: Tree
    result: Path
    steps: list[tuple[float, int]] = field(default_factory=list)
    """When each optimizer step ended, and the tokens without padding that it learned from."""
    first_step: float = 0.0
    """When the first step began."""
    snapshots: list[tuple[float, str]] = field(default_factory=list)
    """When a snapshot was whole, and its folder."""

    @classmethod
    def read(cls) -> "Work":
        """The work that the command line names: ``python -m benchmarks.systems.NAME WORK.json RESULT.json``."""
        return cls(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

    def __getitem__(self, key: str) -> Any:
        return self.asked[key]

    @property
    def settings(self) -> Tree:
        """What this variant of the system sets."""
        found: Tree = self.asked.get("settings", {})
        return found

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.since(time.time())

    def since(self, moment: float) -> float:
        """Seconds from the start to a moment of the wall clock."""
        return moment - float(self.asked["started"])

    def finish(self, saved: float, artifact: str | Path, **more: Any) -> None:
        """Write the figures; ``saved`` is when the artifact was whole."""
        found = {
            "steps": self.steps, "first_step": self.first_step, "saved": saved, "artifact": str(artifact),
            "snapshots": self.snapshots, "versions": versions(), **gpu(), **more,
        }  # fmt: skip
        self.result.write_text(json.dumps(found))


def versions() -> dict[str, str]:
    """Versions of the libraries that this run has used."""
    return {name: importlib.metadata.version(name) for name in _TOLD if name in sys.modules}


def gpu() -> Tree:
    """The GPU's name and the most memory that was taken on it, if there is one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(), "gpu_memory": torch.cuda.max_memory_reserved()}
