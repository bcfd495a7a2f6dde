"""Find each peer's best settings: groups of candidates in turn, each option laid over the best so far.

    python -m benchmarks.tune_peers                         all peers on all workloads that name them
    python -m benchmarks.tune_peers --only trl-best a       one peer on one workload
    python -m benchmarks.tune_peers --rows 4 --check        only see that every candidate runs

The winner is what would end the whole job soonest: what a short run spent beside its later steps, plus all of the
workload's tokens at the speed of those. It is written to benchmarks/peers.json, for processors of this kind.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from benchmarks import figures, plan, run
from benchmarks.journal import Journal
from benchmarks.plan import Job
from benchmarks.runner import Runner, told

Tree = dict[str, Any]
_NEVER = float("inf")


def options(groups: list[Tree], method: str) -> Iterator[tuple[str, list[Tree]]]:
    """Each group's name and options, as far as they are for this method."""
    for group in groups:
        if method in group.get("methods", [method]):
            yield group["name"], group["options"]


def projected(entry: Tree, tokens: float) -> float:
    """Seconds that the whole job would take, judged by a shorter run; never, if that failed."""
    if "result" not in entry or len(entry["result"]["steps"]) < 2:
        return _NEVER
    steps, saved = entry["result"]["steps"], float(entry["result"]["saved"])
    steady = figures.speed(steps, 0)
    return saved - float(steps[-1][0] - steps[0][0]) + tokens / steady


def trial(whole: Tree, system: str, workload: str, settings: Tree, rows: int) -> Job:
    """The workload on few rows with these settings, without snapshots."""
    wanted = {"workloads": [workload], "systems": [system], "rows": rows, "repeats": 1}
    job = plan.jobs(whole, wanted, {system: {workload: settings}})[0]
    return dataclasses.replace(job, work={**job.work, "snapshots": 0})


class Search:
    """One peer on one workload."""

    def __init__(self, runner: Runner, whole: Tree, system: str, workload: str, rows: int) -> None:
        self.runner, self.whole, self.system, self.workload, self.rows = runner, whole, system, workload, rows
        full = plan.jobs(
            whole, {"workloads": [workload], "systems": [system], "repeats": 1}, {system: {workload: {}}}
        )[0]
        facts = plan.prepared(runner.folder, whole, full, runner.given.fixtures)["facts"]["train"]
        self.tokens = facts["tokens"] * full.work["epochs"]
        self.method = full.work["method"]["name"]
        self.defaults = whole["systems"][system.removesuffix("-best")]["settings"]

    def entry(self, settings: Tree) -> Tree:
        """The run with these settings; one that the log has is not made again."""
        job = trial(self.whole, self.system, self.workload, settings, self.rows)
        return self.runner.journal.runs.get(job.key) or self.runner.one(job)

    def seconds(self, settings: Tree, what: str) -> float:
        """The projected time of the whole job with these settings."""
        entry = self.entry(settings)
        found = projected(entry, self.tokens)
        print(f"{self.system} {self.workload} {what}: {told(entry)}; whole job {found:.0f} s", flush=True)
        return found

    def best(self) -> Tree:
        """The settings that win."""
        best: Tree = self.defaults
        least = self.seconds(best, "defaults")
        for name, choices in options(self.whole["candidates"]["peers"][self.system], self.method):
            tried = [plan.merged(best, option) for option in choices]
            times = [
                self.seconds(one, f"{name} {json.dumps(option)}")
                for one, option in zip(tried, choices, strict=True)
            ]
            if min(times) < least:
                least, best = min(times), tried[times.index(min(times))]
        print(f"{self.system} {self.workload}: best {least:.0f} s with {json.dumps(best)}", flush=True)
        return best

    def check(self) -> None:
        """Run every candidate, each alone over the defaults, and tell how it went."""
        for name, choices in options(self.whole["candidates"]["peers"][self.system], self.method):
            for option in choices:
                entry = self.entry(plan.merged(self.defaults, option))
                print(f"{self.system} {self.workload} {name} {json.dumps(option)}: {told(entry)}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.tune_peers", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs=2, metavar=("PEER", "WORKLOAD"))
    parser.add_argument("--rows", type=int, help="rows of each trial; those of workloads.yaml if not given")
    parser.add_argument("--check", action="store_true", help="only see that every candidate runs")
    given, whole = run.machine_arguments(parser).parse_args(), plan.load()
    runner = Runner(given, whole, Journal(given.folder / "tuning.jsonl"), measured=False)
    searches = [(system, workload) for workload in whole["candidates"]["rows"] for system in whole["candidates"]["peers"]
                if system in whole["workloads"][workload]["systems"]]  # fmt: skip
    for system, workload in [tuple(given.only)] if given.only else searches:
        search = Search(runner, whole, system, workload, given.rows or whole["candidates"]["rows"][workload])
        if given.check:
            search.check()
            continue
        plan.keep_tuned(run.place(given), system, workload, search.best())


if __name__ == "__main__":
    main()
