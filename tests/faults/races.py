"""Several runs on one folder that begin at the same moment."""

import os
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lab import command_line, serve
from lab_more import until

from tunewright.core import store
from tunewright.core.disk import Disk

_HUNG = 120.0


class Holding(Disk):
    """A disk on which a run goes on, once it trains, only when it may."""

    def __init__(self, permit: Path) -> None:
        self.permit = permit

    def append(self, path: Path, data: bytes) -> None:
        """Append; wait where that was the first step of this run."""
        super().append(path, data)
        if path.name == "samples.jsonl":
            until(self.permit.exists)


def command_at_once(
    barrier: Any, permit: str, arguments: list[str], log: str, environment: Mapping[str, str]
) -> None:
    """``tunewright ARGUMENTS`` in a child, together with others; its log has its process id in its name."""
    store.disk = Holding(Path(permit))
    barrier.wait(_HUNG)
    command_line(arguments, f"{log}.{os.getpid()}.log", environment)


def at_once(count: int, recipe: Path, output: Path, *more: str) -> list[BaseProcess]:
    """So many runs on one folder that begin at the same moment; the winner waits for ``OUTPUT.go``."""
    context = serve()
    barrier = context.Barrier(count + 1)
    arguments = ["run", str(recipe), f"output={output}", *more]
    environment = {"TUNEWRIGHT_CACHE": os.environ["TUNEWRIGHT_CACHE"]}
    target = (barrier, f"{output}.go", arguments, str(output), environment)
    runs: list[BaseProcess] = [context.Process(target=command_at_once, args=target) for _ in range(count)]
    for run in runs:
        run.start()
    barrier.wait(_HUNG)
    return runs
