"""More for the lab: a run that sends itself a signal at an exact place, runs in this process, many processes at
a time, what a run folder tells.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch
from lab import Lab, command_line, differences, ended, outcome, serve

from tunewright import pipeline
from tunewright.core import events, store
from tunewright.core.disk import Disk
from tunewright.train.checkpoint import step_of

Case = Generator[BaseProcess, int, None]
"""Yields processes; it is sent each one's exit code."""
_HUNG = 120.0


@dataclass(frozen=True)
class Stop:
    """Where a run sends itself a signal: after an event of a step, and so many backward passes more."""

    step: int
    number: int = SIGKILL
    kind: str = "step"
    passes: int = 0
    besides: tuple[str, ...] = ()
    """What else the recipe must say for this."""

    @property
    def exit_code(self) -> int:
        """Of the process that is stopped."""
        return -SIGKILL if self.number == SIGKILL else 128 + self.number

    def resumes_from(self, save_every: int) -> int:
        """The step of the checkpoint that there must be."""
        if self.number != SIGKILL:
            return self.step
        return (self.step if self.passes else self.step - 1) // save_every * save_every


class Stopping(Disk):
    """A disk that sends its process a signal at a place."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        self._left: int | None = None
        if stop.passes:
            torch.Tensor.backward = self._counting()  # type: ignore[assignment]

    def append(self, path: Path, data: bytes) -> None:
        """Append; if that was the event waited for, stop or begin to count."""
        super().append(path, data)
        if path.name == "events.jsonl" and self._is_it(json.loads(data)):
            self._left = self.stop.passes
            self._come()

    def _is_it(self, event: Mapping[str, Any]) -> bool:
        return (event["kind"], event.get("step")) == (self.stop.kind, self.stop.step)

    def _come(self) -> None:
        if self._left == 0:
            os.kill(os.getpid(), self.stop.number)

    def _counting(self) -> Callable[[torch.Tensor], None]:
        before: Callable[[torch.Tensor], None] = torch.Tensor.backward

        def backward(loss: torch.Tensor) -> None:
            before(loss)
            if self._left:
                self._left -= 1
                self._come()

        return backward


def command_that_stops(stop: Stop, arguments: list[str], stderr: str, environment: Mapping[str, str]) -> None:
    """``tunewright ARGUMENTS`` in a child that stops itself."""
    store.disk = Stopping(stop)
    command_line(arguments, stderr, environment)


def stopping(stop: Stop, recipe: Path, output: Path, *more: str) -> BaseProcess:
    """Start a run that stops itself."""
    arguments = ["run", str(recipe), f"output={output}", *more]
    environment = {"TUNEWRIGHT_CACHE": os.environ["TUNEWRIGHT_CACHE"]}
    target = (stop, arguments, f"{output}.log", environment)
    process = serve().Process(target=command_that_stops, args=target)
    process.start()
    return process


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute as the children do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def here(recipe: Path, output: Path, *more: str, stop: Stop | None = None, **flags: bool) -> None:
    """The run in this process, which is not to be killed."""
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        if stop:
            patch.setattr(store, "disk", Stopping(stop))
        pipeline.run(pipeline.load(recipe, [f"output={output}", *more]), quiet=True, **flags)


def together(cases: Iterable[Case], at_once: int = 1 + (os.cpu_count() or 1)) -> None:
    """Go through all the cases, so many of their processes at a time."""
    waiting, running = iter(cases), dict[int, tuple[BaseProcess, Case]]()
    while True:
        while len(running) < at_once and (case := next(waiting, None)):
            running |= _next(case, None)
        if not running:
            return
        ready = connection.wait(list(running), _HUNG)
        for sentinel in [s for s in list(running) if s in ready or not ready]:
            process, case = running.pop(sentinel)
            running |= _next(case, ended(process))


def _next(case: Case, code: int | None) -> dict[int, tuple[BaseProcess, Case]]:
    try:
        process = case.send(code)  # type: ignore[arg-type]
    except StopIteration:
        return {}
    return {process.sentinel: (process, case)}


def told(output: Path, kind: str) -> list[events.Event]:
    """The run's events of a kind."""
    return [event for event in events.read(output / "events.jsonl") if event["kind"] == kind]


def newest(output: Path) -> int:
    """The step of the newest checkpoint, whole to the last byte; 0 without one."""
    found = sorted(output.glob("stages/*/checkpoints/step-*"))
    if not found:
        return 0
    store.verify(found[-1])
    return step_of(found[-1])


def log_of(output: Path) -> str:
    """What the run's processes printed."""
    path = Path(f"{output}.log")
    return path.read_text() if path.exists() else ""


def copied(folder: Path, name: str) -> Path:
    """The run folder once more, beside it."""
    return Path(shutil.copytree(folder, folder.with_name(name)))


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look again and again until it is so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.0005)


def resumed(lab: Lab, recipe: Path, output: Path, whole: dict[str, object]) -> Case:
    """The same command again must give what was to come."""
    code = yield lab.start(recipe, output)
    assert code == 0, log_of(output)
    assert not differences(whole, outcome(output)), output.name
