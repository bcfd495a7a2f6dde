"""From the log to figures: medians and spread of every system on every workload."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks import matmul
from benchmarks.journal import Journal, why
from benchmarks.plan import Job

Tree = dict[str, Any]
_RANK = 16
_LESS_THAN_A_TOKEN = 0.5
_SHAPES_KNOWN = ("llama", "qwen2")


def summary(jobs: Sequence[Job], journal: Journal, setting: Tree) -> Tree:
    """Everything measured: ``machine``, ``rates``, ``workloads`` (name -> case -> system -> figures), ``commit`` and day of
    the newest run, now if there is none.
    """
    rates = {
        key: spread([rate[key] for rate in journal.rates if key in rate]) for key in ("square", "own_shapes")
    }
    made = [job for job in jobs if job.key in journal.runs]
    cells = dict.fromkeys((job.workload, job.case, job.system) for job in made)
    workloads: Tree = {}
    for workload, case, system in cells:
        runs = [job for job in made if (job.workload, job.case, job.system) == (workload, case, system)]
        found = _system(runs, journal, rates["square"].get("median"))
        workloads.setdefault(workload, {}).setdefault(case, {})[system] = found
    for workload, cases in workloads.items():
        for case in cases:
            _time_to_loss([j for j in made if (j.workload, j.case) == (workload, case)], journal, cases[case])
    now = {"at": time.time(), "commit": commit()}
    newest = max((journal.runs[job.key] for job in made), key=lambda run: float(run["at"]), default=now)
    gpus = [journal.runs[job.key].get("result", {}).get("gpu") for job in made]
    return {"gpu": next(filter(None, gpus), ""), "commit": newest["commit"], "when": _day(newest), "machine": machine(),
            **setting, "rates": rates, "workloads": workloads}  # fmt: skip


def beside(found: Tree, earlier: Tree, order: Sequence[str]) -> Tree:
    """What was found now, and what was found earlier of systems that were not run again."""
    now, before = found["workloads"], earlier.get("workloads", {})
    both = {name: _cases(now.get(name, {}), before.get(name, {})) for name in order}
    return {**found, "workloads": {name: cases for name, cases in both.items() if cases}}


def _cases(now: Tree, before: Tree) -> Tree:
    return {case: _systems(now.get(case, {}), before.get(case, {})) for case in {**before, **now}}


def _systems(now: Tree, before: Tree) -> Tree:
    """Times to a loss that all systems reach are of these systems: none from earlier stands beside them."""
    timed = any("goal" in system["figures"] for system in now.values())
    return now if timed else {**before, **now}


def _system(runs: Sequence[Job], journal: Journal, rate: float | None) -> Tree:
    entries = [(journal.runs[job.key], journal.losses.get(job.key)) for job in runs]
    good = [of_run(entry, losses, runs[0].work, rate) for entry, losses in entries if "result" in entry]
    names = dict.fromkeys(name for run in good for name in run)
    versions = [entry["result"]["versions"] for entry, _ in entries if "result" in entry]
    return {
        "settings": runs[0].settings, "runs": len(good), "versions": versions[-1] if versions else {},
        "facts": entries[0][0]["facts"]["train"], "measured": _measured([entry for entry, _ in entries]),
        "failed": [why(entry["failed"]) for entry, _ in entries if "failed" in entry],
        "figures": {name: spread([run[name] for run in good if name in run]) for name in names},
    }  # fmt: skip


def of_run(entry: Tree, losses: list[float] | None, work: Tree, rate: float | None) -> dict[str, float]:
    """The figures of one run. Times are seconds, memory bytes, the loss nats per supervised token.

    ``tokens_per_second`` is the whole job's, from the start of the process to the saved artifact; ``steady`` that of
    all steps but the first; ``later_epochs`` that of all epochs but the first.
    """
    result, facts, epochs = entry["result"], entry["facts"], work["epochs"]
    whole = facts["train"]["tokens"] * epochs
    steps = _scaled(result["steps"], whole)
    found = {
        "tokens_per_second": whole / result["saved"],
        "seconds": result["saved"], "first_step": result["first_step"],
        "peak_memory": result.get("gpu_memory", entry["peak_memory"]),
    }  # fmt: skip
    if len(steps) > 1:
        found["steady"] = speed(steps, 0)
    if epochs > 1 and (last := _end_of_epoch(steps, epochs)) + 1 < len(steps):
        found["later_epochs"] = speed(steps, last)
    if losses:
        found["held_out_loss"] = losses[-1]
    if rate and "steady" in found and (flop := _flop_per_token(facts, work)):
        found["utilisation"] = flop * found["steady"] / rate
    return found


def _scaled(steps: Sequence[Sequence[float]], whole: float) -> list[tuple[float, float]]:
    """Steps whose tokens add up to those of the rows: packed batches of some systems count their padding."""
    counted = sum(tokens for _, tokens in steps)
    return [(moment, tokens * whole / counted) for moment, tokens in steps]


def speed(steps: Sequence[Sequence[float]], after: int) -> float:
    """Tokens a second of the steps that come after step number ``after``."""
    return sum(tokens for _, tokens in steps[after + 1 :]) / (steps[-1][0] - steps[after][0])


def _end_of_epoch(steps: Sequence[Sequence[float]], epochs: float) -> int:
    """The step that ends the first epoch; batches do not cross its end."""
    learned = list(accumulate(tokens for _, tokens in steps))
    return next(i for i, so_far in enumerate(learned) if so_far >= learned[-1] / epochs - _LESS_THAN_A_TOKEN)


def _flop_per_token(facts: Tree, work: Tree) -> float:
    rank = {"lora": _RANK, "full": 0}.get(work["method"]["name"])
    if rank is None or "objective" in work or facts["config"].get("model_type") not in _SHAPES_KNOWN:
        return 0.0
    return matmul.training_flop(facts["config"], facts["train"], rank) / float(facts["train"]["tokens"])


def _time_to_loss(jobs: Sequence[Job], journal: Journal, systems: Tree) -> None:
    """When each run first came down to a loss that every run of every system reaches."""
    scored = [job for job in jobs if job.work.get("snapshots") and job.key in journal.losses]
    if not scored:
        return
    goal = max(min(journal.losses[job.key]) for job in scored)
    times: dict[str, list[float]] = {}
    for job in scored:
        result, losses = journal.runs[job.key]["result"], journal.losses[job.key]
        moments = [*(moment for moment, _ in result["snapshots"]), result["saved"]]
        reached = next(moment for moment, loss in zip(moments, losses, strict=True) if loss <= goal)
        times.setdefault(job.system, []).append(reached)
    for system, found in times.items():
        systems[system]["figures"] |= {"time_to_loss": spread(found), "goal": spread([goal])}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest; nothing of nothing."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)} if values else {}


def machine() -> Tree:
    """The processor, its threads and the memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    flags = {word for line in lines if line.startswith("flags") for word in line.split()}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    extra = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return {
        "processor": model,
        "threads": os.cpu_count(),
        "memory": pages,
        "extensions": extra,
        "python": platform.python_version(),
    }


def place(device: str, machine: Tree) -> str:
    """What results are kept under: ``gpu``, or ``cpu`` and the best that the processor has for bf16. Those of different
    processors are not mixed.
    """
    return " ".join(["cpu", *machine["extensions"][:1]]) if device == "cpu" else device


def commit() -> str:
    """The source that is run now; what the benchmark itself writes does not count as a change of it."""

    def told(*asked: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *asked]
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()

    changed = told(
        "status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks", ":!benchmarks/*.json"
    )
    return told("describe", "--always") + ("-dirty" if changed else "")


def _measured(entries: Sequence[Tree]) -> Tree:
    """Commits that runs were made at, the newest first, each with its last day and how many those were."""
    found: Tree = {}
    for entry in sorted(entries, key=lambda run: float(run["at"]), reverse=True):
        found.setdefault(entry["commit"], {"when": _day(entry), "runs": 0})["runs"] += 1
    return found


def _day(run: Tree) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(run["at"]))
