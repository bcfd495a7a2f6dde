"""Runs in processes of their own. Nothing here loads more than it takes to start them and to read what they tell."""

import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from tunewright.core import events, store

_FEW = 5
"""Steps that are made however long they take."""
_COLD = 3
"""Steps that also warm up."""
_LOOKED = 0.1
"""Seconds between looks at a run that has begun."""
_TOLD = 240
"""Characters of a reason; the log has all of it."""


def run(recipe: str, folder: Path, name: str, *options: str) -> str:
    """Run a recipe, its YAML, in a child process; why it failed, or nothing. What it says of itself goes to ``logs/``."""
    with _started(recipe, folder, name, *options) as child:
        try:
            out, _ = child.communicate()
        except BaseException:
            child.send_signal(
                signal.SIGTERM
            )  # it ends with a checkpoint; one that Ctrl-C has reached ignores this
            child.wait()
            raise
    return _reason(child.returncode, out.decode("utf-8", "replace"), _log(folder, name))


def first_steps(
    recipe: str,
    output: Path,
    folder: Path,
    name: str,
    count: int,
    patience: float = math.inf,
    memory: int = 0,
) -> "Begun":
    """Run a recipe, its YAML, until it has made ``count`` steps, or a few in ``patience`` seconds, and end it. ``output`` is the
    run folder that it names.

    It begins as the whole run would, with all techniques that pay in that one, but foresees nothing: what it takes is
    measured. ``memory`` bytes are what it can get of the system (RLIMIT_DATA), if they are given.
    """
    log = output / "events.jsonl"
    with _started(recipe, folder, name, "--no-foresight") as child:
        if memory:
            resource.prlimit(child.pid, resource.RLIMIT_DATA, (memory, memory))
        try:
            while child.poll() is None and not _is_enough(log, count, patience):
                time.sleep(_LOOKED)
        finally:
            ended_itself = child.poll() is not None
            child.kill()
            out, _ = child.communicate()
    reason = (
        _reason(child.returncode, out.decode("utf-8", "replace"), _log(folder, name)) if ended_itself else ""
    )
    return Begun(list(events.read(log)), reason)


@dataclass(frozen=True)
class Begun:
    """How a run began."""

    log: Sequence[events.Event]
    reason: str
    """Why it failed; nothing if it did not."""

    def of(self, kind: str) -> list[events.Event]:
        """Its events of a kind."""
        return [event for event in self.log if event["kind"] == kind]

    def pace(self) -> "Pace":
        """Of a run from its beginning, which has made a step or more; of all of them where there are few, since they differ
        by what is in their batches.
        """
        train = self.of("train")[0]
        marks = [{**train, "step": 0, "tokens": 0}, *self.of("step")]
        warm = marks[_COLD if len(marks) > _FEW else 0 :]
        seconds, steps = (warm[-1][of] - warm[0][of] for of in ("time", "step"))
        cold = warm[0]["time"] - train["time"] - warm[0]["step"] * seconds / steps
        rate = (warm[-1]["tokens"] - warm[0]["tokens"]) / max(1e-9, seconds)
        return Pace(rate, seconds / steps, max(0.0, cold))


@dataclass(frozen=True)
class Pace:
    """How fast a run goes once it is warm."""

    tokens_per_second: float
    each: float
    """Seconds of a step."""
    cold: float
    """Seconds that the first steps took beyond that."""


def _is_enough(log: Path, count: int, patience: float) -> bool:
    steps = [event["time"] for event in events.read(log) if event["kind"] == "step"]
    return len(steps) >= count or (len(steps) >= _FEW and steps[-1] - steps[0] > patience)


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


@contextmanager
def _started(recipe: str, folder: Path, name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """The same program in a process of its own, which has ended when the context does."""
    path, log = folder / "recipes" / f"{name}.yaml", _log(folder, name)
    store.write_text(path, recipe)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "tunewright", "run", str(path), "--json", *options]
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as child:  # noqa: S603 this program itself
        yield child


def _reason(status: int, out: str, log: Path) -> str:
    if status == 0:
        return ""
    lines = [line for line in out.splitlines() if line.startswith("{")]
    told = json.loads(lines[-1]).get("problems", []) if lines else []
    if told:
        return shorten("; ".join(told), _TOLD, placeholder=" ...")
    if status == -signal.SIGKILL:
        return "killed by the system, as happens when memory ends"
    ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return shorten(": ".join([ended, *last]), _TOLD, placeholder=" ...")
