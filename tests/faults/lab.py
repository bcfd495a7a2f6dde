"""Real runs of a tiny model, each in a process of its own that can be killed, and what must be equal at their
ends. A fork server has everything imported, so that a run takes about a second.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from bounded import LONG

from tunewright import jobs, pipeline, recipes
from tunewright.core import plugins
from tunewright.core.events import EventLog, Reader
from tunewright.core.rng import sow
from tunewright.models.load import best_device
from tunewright.objectives import Objective, kind
from tunewright.objectives._causal import Causal
from tunewright.objectives._policy import Policy
from tunewright.recipes import Stage
from tunewright.train import ledger
from tunewright.train.loop import Trainer

_PATIENCE = 120.0
"""Seconds after which a run that should have ended is taken to hang."""


def serve() -> multiprocessing.context.ForkServerContext:
    """The fork server: this module, and with it all that a run imports, is loaded once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lab", "lab_imports"])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), before])  # it takes no other path
    try:
        forkserver.ensure_running()
    finally:
        os.environ["PYTHONPATH"] = before
    return context


def command_line(arguments: list[str], stderr: str, environment: Mapping[str, str]) -> None:
    """``tunewright ARGUMENTS``, in a child: its exit code is the command's."""
    from tunewright import cli

    os.environ.update(environment)
    torch.set_num_threads(1)
    handle = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 2)
    os.dup2(handle, 1)
    sys.argv = ["tunewright", *arguments]
    cli.main()


_DRAWN = {"group": 2, "longest": 4, "steps_per_draw": 2}
"""Short answers, few of them, that serve two steps."""
_WORTH = "def worth(asked, answer):\n    return len(answer) % 7\n"


def _talk(n: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Say {n} and {n + 1}.", "completion": f"{n}, then {n + 1}.", **more}


_ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "texts": lambda n: {"text": f"Chapter {n}. The cat saw {n} birds and slept."},
    "conversations": _talk,
    "pairs": lambda n: _talk(n, chosen=f"{n}, {n + 1}.", rejected=f"Now {n + 1} and more."),
    "labels": lambda n: {"text": f"Chapter {n}. The cat saw {n} birds.", "label": n % 2},
    "verdicts": lambda n: _talk(n, label=n % 3 > 0),
}
"""A row of each kind that an objective may want."""


class Lab:
    """Starts, kills and compares runs under one folder."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self._context = serve()

    def recipe(self, name: str = "recipe", **choices: Any) -> Path:
        """A recipe's file: the tiny model, LoRA with dropout, twelve steps; ``choices`` are laid over that."""
        objective = choices.get("objective", "sft")
        train = {"max_steps": 12, "lr": 1e-2, "tokens_per_batch": 96, "micro_tokens": 48, "save_every": 3,
                 "eval_every": 4, "keep": 2}  # fmt: skip
        if objective == "distill":
            choices = {
                **choices,
                "objective": {"name": objective, "teacher": f"model:{self.model}", "top": 8},
            }
        if issubclass(kind(objective), Policy):
            put(self.folder / "worth.py", _WORTH)
            reward = f"{self.folder / 'worth.py'}:worth"
            choices = {**choices, "objective": {"name": objective, "rewards": [reward], **_DRAWN}}
        tree = {"model": str(self.model), "method": {"name": "lora", "dropout": 0.1}, "precision": "fp32",
                "evaluate": {"limit": 4, "max_new_tokens": 4}, **choices,
                "data": {"train": str(self.data(objective)), "valid_share": 0.1, **choices.get("data", {})},
                "train": {**train, **choices.get("train", {})}}  # fmt: skip
        path = self.folder / f"{name}.yaml"
        put(path, yaml.safe_dump(tree))
        return path

    def data(self, objective: str) -> Path:
        """Forty rows that the objective can learn from."""
        wants = kind(objective).wants
        path = self.folder / f"{wants}.jsonl"
        put(path, "".join(json.dumps(_ROWS[wants](n)) + "\n" for n in range(40)))
        return path

    def trainer(self, name: str, *readers: Reader, **choices: Any) -> Trainer:
        """A recipe's training, in this process, in the folder ``name``.

        It computes the plain way: faults are planted in rows of samples and in logits, which speed techniques lay out
        otherwise or never make.
        """
        job = jobs.check(recipes.load(self.recipe(**choices)))[0]
        stage = job.stage
        sow(stage.train.seed, "method")
        model = job.method.apply(job.method.load_base(job.source, stage.precision))
        job.objective.asked = {o.name: pipeline.asked(job, o, self.folder) for o in job.objective.others()}
        log = EventLog(self.folder / name / "events.jsonl", *readers)
        return Trainer(
            model, job.method, job.objective, job.data, job.valid, stage.train, stage.precision, log,
            self.folder / name, algorithm=job.optimizer, switches=False,
        )  # fmt: skip

    def start(self, recipe: Path, output: Path, *more: str, **environment: str) -> BaseProcess:
        """The run in a process; what it prints is added to ``OUTPUT.log``."""
        arguments = ["run", str(recipe), f"output={output}", *more]
        return self.command(arguments, Path(f"{output}.log"), **environment)

    def command(self, arguments: list[str], log: Path, **environment: str) -> BaseProcess:
        """Any command in a process."""
        inherited = {"TUNEWRIGHT_CACHE": os.environ["TUNEWRIGHT_CACHE"]}
        process = self._context.Process(
            target=command_line, args=(arguments, str(log), {**inherited, **environment})
        )
        process.start()
        return process

    def finish(self, recipe: Path, output: Path, *more: str, **environment: str) -> int:
        """Run to the end; the exit code."""
        return ended(self.start(recipe, output, *more, **environment))

    def kill_after(self, seconds: float, recipe: Path, output: Path, number: int = signal.SIGKILL) -> int:
        """Start the run and send it a signal so many seconds later; the exit code, 0 if it was done before."""
        process = self.start(recipe, output)
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid or 0, number)
        return ended(process)


def put(path: Path, text: str) -> None:
    """Write a file whole: a run that is under way may be reading the one before."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def ended(process: BaseProcess) -> int:
    """The exit code; a run that hangs is killed and fails the test."""
    process.join(_PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"the run did not end within {_PATIENCE:.0f} s")
    return int(process.exitcode or 0)


def wait_for(path: Path, seconds: float = 60.0) -> None:
    """Return as soon as the path exists."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise AssertionError(f"{path} did not appear")
        time.sleep(0.002)


def outcome(output: Path) -> dict[str, Any]:
    """All that must be equal: bytes of the result, weights and moments of the last checkpoint, the ordered log
    of samples, the state (but for the seconds it took).
    """
    found: dict[str, Any] = {}
    for stage in sorted((output / "stages").iterdir()):
        last = max((stage / "checkpoints").glob("step-*"))
        results = [path for name in ("adapter", "model") for path in (stage / name).glob("*.safetensors")]
        for path in sorted([*results, *last.glob("*.safetensors")]):
            found[path.relative_to(output).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        state = json.loads((last / "state.json").read_text())
        found[f"{stage.name} state"] = {key: value for key, value in state.items() if key != "seconds"}
        found[f"{stage.name} ledger"] = ledger.read(stage / "samples.jsonl")
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of what differs between two outcomes."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def precisions() -> list[str]:
    """Those that this machine can train in."""
    known = get_args(Stage.model_fields["precision"].annotation)
    return [name for name in known if name != "fp16" or best_device() != "cpu"]


def dealt(count: int, place: int, among: int) -> int:
    """How many of the count come to one place, dealt out in turn."""
    return count // among + (place < count % among)


def learns_labels(objective: type[Objective]) -> bool:
    """Whether labels alone say what is right: noise in them is a spike in the loss."""
    return issubclass(objective, Causal) and objective.others is Objective.others


def passed_once() -> list[tuple[str, str]]:
    """Those of :func:`combinations` that pass over a batch once, and over nothing else: faults are planted in passes."""
    plain = {
        name
        for name in plugins.names("objectives")
        if not issubclass(kind(name), Policy)
        and kind(name).look is Objective.look
        and kind(name).others is Objective.others
    }
    return [(name, precision) for name, precision in combinations() if name in plain]


def combinations() -> list[tuple[str, str]]:
    """Every objective with every precision; in the short run each but sft and pretrain with one, in turn."""
    every = [
        (objective, precision) for objective in plugins.names("objectives") for precision in precisions()
    ]
    both = {"sft", "pretrain"}
    count = len(precisions())
    return [
        (objective, precision)
        for place, (objective, precision) in enumerate(every)
        if LONG or objective in both or place % count == place // count % count
    ]
