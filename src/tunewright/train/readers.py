"""Readers of the event stream: the terminal, and TensorBoard."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tunewright.core import figures
from tunewright.core.errors import Problem
from tunewright.core.events import Event, Reader
from tunewright.core.units import human_bytes, human_count, human_seconds


class Terminal(Protocol):
    """Shows events to a person; ``preparing`` is told of rows read before there is a run folder."""

    def __call__(self, event: Event) -> None:
        """Show one event."""

    def preparing(self, name: str, rows: int) -> None:
        """So many rows of a file are tokenized."""


class Silent:
    """Shows nothing."""

    def __call__(self, event: Event) -> None:
        """Ignore it."""

    def preparing(self, name: str, rows: int) -> None:
        """Ignore it."""


def step_line(event: Event) -> str:
    """``loss 1.234  lr 2.0e-04  5.1k tok/s  1.2 GB``."""
    own = "".join(f"{figure}  " for figure in figures.told(event, 1))
    return (f"loss {event['loss']:.4f}  {own}lr {event['lr']:.1e}  "
            f"{human_count(event['tokens_per_second'])} tok/s  {human_bytes(event['memory'])}")  # fmt: skip


_LINES: dict[str, Callable[[Event], str]] = {
    "remote-code": lambda e: f"running Python code that comes with {e['model']} (trust_remote_code: true)",
    "own-code": lambda e: f"running Python code of {e['file']} (named among the rewards)",
    "shortage": lambda e: (
        f"{e['stage']} will need {human_bytes(e['need'])} of memory, {human_bytes(e['free'])} is free: "
        + (f"it fits with {' '.join(e['change'])}" if e["change"] else "no small change makes it fit")
    ),
    "advised": lambda e: f"advised {e['method']}: {' '.join(e['why'])}",
    "train": lambda e: (
        f"training {e['samples']} samples for {e['steps']} steps ({e['padding_share']:.1%} padding)"
    ),
    "skipped": lambda e: f"left out {e['count']} rows, among them:\n  " + "\n  ".join(e["rows"]),
    "measure": lambda e: f"{e['when']}: {_scores(e)}",
    "eval": lambda e: f"step {e['step']}: held-out loss {e['loss']:.4f}{' (best)' if e['best'] else ''}",
    "damaged": lambda e: f"damaged: {e['what']}",
    "drift": lambda e: "inputs differ from those of the run so far:\n  " + "\n  ".join(e["differences"]),
    "anew": lambda e: f"made anew ({e['why']})" + (f"; what it was is in {e['older']}" if e["older"] else ""),
    "spike": lambda e: (
        f"step {e['step']}: loss {e['loss']:.4f} after {e['recent']:.4f}: passed over ({e['samples']})"
    ),
    "rollback": lambda e: f"step {e['step']}: back to the weights of step {e['to']}",
    "out-of-memory": lambda e: f"out of memory: going on with {_part(e)}",
    "resume": lambda e: f"resumed from the checkpoint of step {e['step']}",
    "restore": lambda e: f"the weights of step {e['step']} are kept (held-out loss {e['loss']:.4f})",
    "reuse": lambda e: f"stage {e['stage']} is finished and its inputs are the same: reused",
    "kl": lambda e: f"its own answers are {e['nats']:.2f} nats from those of the model before (KL)",
    "saved": lambda e: f"saved {e['path']} ({human_bytes(e['bytes'])})",
}


def _part(event: Event) -> str:
    if "micro_tokens" in event:
        return f"{event['micro_tokens']} tokens in one forward pass; the batch of a step stays the same"
    return f"{event['eval_tokens']} tokens at a time in evaluation"


def event_line(event: Event) -> str:
    """One line on an event worth telling; empty for the others."""
    return _LINES[event["kind"]](event) if event["kind"] in _LINES else ""


def _scores(event: Event) -> str:
    parts = [f"held-out loss {event['loss']:.4f}"] if "loss" in event and "reward" not in event else []
    parts += figures.told(event)
    if "exact_match" in event:
        parts.append(f"exact match {event['exact_match']:.1%} of {event['count']}")
    parts += [f"{Path(name).name} {value:.3f}" for name, value in event.get("worth", {}).items()]
    parts += [f"{name} {loss:.4f}" for name, loss in event.get("old", {}).items()]
    return ", ".join(parts) or "nothing to measure"


class Lines:
    """Plain lines, for logs and pipes: a training line every ten seconds at most."""

    _SECONDS = 10.0

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        """Print the event if it is worth a line."""
        if event["kind"] == "step":
            if event["time"] - self._last >= self._SECONDS or event["step"] == event["steps"]:
                self._last = event["time"]
                self._print(f"step {event['step']}/{event['steps']}  {step_line(event)}  {_left(event)}")
        elif line := event_line(event):
            self._print(line)

    def preparing(self, name: str, rows: int) -> None:
        """Print every hundred thousand rows."""
        if rows % 100_000 == 0:
            self._print(f"reading {name}: {rows} rows")

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _left(event: Event) -> str:
    """Time left at the present speed, from the tokens of the steps so far."""
    per_step = event["tokens"] / event["step"] / max(event["tokens_per_second"], 1e-9)
    return f"{human_seconds((event['steps'] - event['step']) * per_step)} left"


class Bar:
    """A live progress bar, with lines above it for what should stay."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        """Move the bar; print what should stay."""
        kind = event["kind"]
        if kind == "step":
            self._move("training", event["step"], event["steps"], step_line(event))
        elif kind == "answering":
            self._move(f"answers {event['when']}", event["done"], event["of"], "")
        elif line := event_line(event):
            self._progress.console.print(line, highlight=False)

    def preparing(self, name: str, rows: int) -> None:
        """Count rows."""
        self._move(f"reading {name}", rows, None, f"{rows} rows")

    def _move(self, name: str, done: int, of: int | None, note: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=of, note="")
        self._progress.update(self._tasks[name], completed=done, total=of, note=note)


@contextmanager
def terminal(quiet: bool) -> Iterator[Terminal]:
    """The reader that suits where stderr goes: a bar on a terminal, else lines; nothing if ``quiet``."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield Silent() if quiet else Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),  # eighty columns must hold the rest
        TextColumn("{task.completed:.0f}/{task.total}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress)


class TensorBoard:
    """Writes losses, rates and speed as TensorBoard scalars."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        """Write the event's numbers under its stage and kind."""
        if event["kind"] not in ("step", "eval"):
            return
        for key, value in event.items():
            if isinstance(value, (int, float)) and key not in ("step", "steps", "time"):
                self._writer.add_scalar(f"{event['stage']}/{event['kind']}/{key}", value, event["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def missing(names: Iterable[str]) -> Iterator[Problem]:
    """A problem for each reader whose package is not installed."""
    if "tensorboard" in names and find_spec("tensorboard") is None:
        fix = "pip install 'tunewright[tensorboard]'"
        yield Problem("logs", "the package tensorboard is not installed", fix)


def named(names: Iterable[str], folder: Path) -> list[Reader]:
    """The extra readers a recipe asks for."""
    return [TensorBoard(folder / "tensorboard") for name in names if name == "tensorboard"]
