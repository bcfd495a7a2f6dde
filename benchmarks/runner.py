"""Does the jobs that the log lacks, one process after another, and writes each down at once."""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import figures, launch, plan
from benchmarks.journal import Journal, why
from benchmarks.plan import Job
from benchmarks.targets import OURS

Tree = dict[str, Any]
_RATE_TOKENS = 2048
"""Rows of the products whose rate is measured: about a micro-batch."""
_START_UP = 15.0
_GUESSED_FOR = 135e6
_ASKED = ("method", "lr", "epochs", "max_length", "snapshots")


@dataclass
class Runner:
    """``given`` is the command line: folder, fixtures, device, python, threads, caches, timeout."""

    given: argparse.Namespace
    plan: Tree
    journal: Journal
    measured: bool = True
    """Whether what runs save is scored on held-out rows."""

    def __post_init__(self) -> None:
        self.folder = Path(self.given.folder).resolve()

    def python(self, system: str) -> Path:
        """The interpreter of a system's environment."""
        found = self.given.python or launch.PYTHONS[self.plan["systems"][system]["python"]]
        return Path(found).absolute()

    def forecast(self, left: list[Job]) -> str:
        """What is left, in words."""
        return f"{len(left)} runs left, about {sum(map(self._seconds, left)) / 60:.0f} minutes"

    def breakdown(self, left: list[Job]) -> Iterator[str]:
        """The same for each system on each workload, a line for each."""
        for pair in dict.fromkeys((job.workload, job.system) for job in left):
            own = [job for job in left if (job.workload, job.system) == pair]
            yield f"{pair[0]} {pair[1]:<18} {self.forecast(own)}"

    def _seconds(self, job: Job) -> float:
        """As long as a run like it took, else by the system's guessed speed."""
        alike = [run["seconds"] for key, run in self.journal.runs.items() if _kind(key) == _kind(job.key)]
        if alike:
            return float(max(alike))
        paths = self._prepared(job)
        parameters = sum(path.stat().st_size for path in Path(paths["model"]).glob("*.safetensors")) / 2
        guess = self.plan["systems"][job.system]["guess"] * _GUESSED_FOR / parameters
        return float(_START_UP + paths["facts"]["train"]["tokens"] * job.work["epochs"] / guess)

    def all(self, jobs: list[Job]) -> None:
        """Every job that has not ended well before, then the losses that a stop left out."""
        left = [job for job in jobs if not self.journal.has(job.key)]
        print(self.forecast(left), flush=True)
        for number, job in enumerate(left, 1):
            if job.repeat >= len(self.journal.rates):
                self._rate()
            found = self.one(job)
            print(
                f"[{number}/{len(left)}] {job.name}: {told(found)}; {self.forecast(left[number:])}",
                flush=True,
            )
        for job in jobs:
            self._measure(job)

    def one(self, job: Job) -> Tree:
        """Run a job and measure what it saved."""
        paths, at = self._prepared(job), self._at(job)
        shutil.rmtree(at, ignore_errors=True)
        work = {"model": paths["model"], "train": paths["train"], "output": str(at / "output"),
                "settings": job.settings, **{key: job.work[key] for key in _ASKED},
                "objective": job.work.get("objective", {"name": "sft"})}  # fmt: skip
        module = f"systems.{self.plan['systems'][job.system]['module']}"
        caches = self.folder / "caches" / job.system if self.given.caches == "warm" else at / "caches"
        env = self._environment(caches, job.settings.get("env", {}))
        found = launch.run(self.python(job.system), module, work, at, env, self.given.timeout)
        told = {"name": job.name, "facts": paths["facts"], "at": time.time(), "commit": figures.commit()}
        entry = self.journal.add("run", key=job.key, **told, **found)
        self._measure(job)
        return entry

    def _measure(self, job: Job) -> None:
        """The held-out loss of all that a run saved; then its files may go."""
        run, at = self.journal.runs.get(job.key, {}), self._at(job)
        if "result" not in run or not at.exists():
            return
        if self.measured and run["facts"]["held_out"]["rows"] and job.key not in self.journal.losses:
            artifacts = [*(folder for _, folder in run["result"]["snapshots"]), run["result"]["artifact"]]
            if (losses := self._losses(job, artifacts)) is None:
                return
            self.journal.add("losses", key=job.key, losses=losses)
        shutil.rmtree(at)

    def _losses(self, job: Job, artifacts: list[str]) -> list[float] | None:
        paths = self._prepared(job)
        work = {"model": paths["model"], "held_out": paths["held_out"], "max_length": job.work["max_length"],
                "artifacts": artifacts}  # fmt: skip
        found = self._helper("held_out", work, self._at(job))
        if "failed" in found:
            print(f"{job.name}: no held-out loss: {told(found)}", flush=True)
            return None
        losses: list[float] = found["result"]["losses"]
        return losses

    def _rate(self) -> None:
        """The machine's matrix rate, measured among the runs, at the shapes of the workload that is judged by it."""
        judged = [name for name, one in self.plan["workloads"].items()
                  if any(target["what"] == "utilisation" for target in one.get("targets", ()))]  # fmt: skip
        job = plan.jobs(self.plan, {"workloads": judged[:1], "repeats": 1}, {})[0]
        work = {"model": self._prepared(job)["model"], "tokens": _RATE_TOKENS}
        found = self._helper("matmul", work, self.folder / "work" / "rate")
        self.journal.add("rates", **found.get("result", {}))

    def _helper(self, module: str, work: Tree, at: Path) -> Tree:
        env = self._environment(self.folder / "caches", {})
        return launch.run(self.python(OURS), module, work, at, env, self.given.timeout)

    def _environment(self, caches: Path, more: dict[str, str]) -> dict[str, str]:
        return launch.environment(caches, more, self.given.threads, self.given.device)

    def _prepared(self, job: Job) -> Tree:
        return plan.prepared(self.folder, self.plan, job, self.given.fixtures)

    def _at(self, job: Job) -> Path:
        return self.folder / "work" / job.name.replace(" ", "-").replace("#", "")


def _kind(key: str) -> list[Any]:
    """All of a key but the repeat."""
    workload, case, system, _, *rest = json.loads(key)
    return [workload, case, system, *rest]


def told(found: Tree) -> str:
    """A run in a few words."""
    if "failed" in found:
        return f"failed: {why(found['failed'])}"
    return f"{found['seconds']:.1f} s, {found['peak_memory'] / 1e9:.2f} GB"
