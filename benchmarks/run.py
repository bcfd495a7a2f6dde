"""Run the benchmark, or go on with it: systems in turn, each run a process of its own; then the results' page.

python -m benchmarks.run                          everything, into benchmarks/results.json and docs/benchmarks.md
python -m benchmarks.run --rows 16 --repeats 1    a trial; its page stays in the --folder
python -m benchmarks.run --forecast               what is left to do and how long it may take
python -m benchmarks.run --page                   only write the page anew from benchmarks/results.json
python -m benchmarks.run --device gpu             the gpu section's systems, on an NVIDIA GPU
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import figures, launch, models, page, plan
from benchmarks.journal import Journal
from benchmarks.plan import Job
from benchmarks.runner import Runner
from benchmarks.targets import OURS

Tree = dict[str, Any]
FOUND = "__import__('importlib.util').util.find_spec({!r})"
SEES_GPU = "__import__('torch').cuda.is_available()"
NO_GPU = "no GPU: torch in {} sees none, or is not there. `make bench-gpu` needs an NVIDIA GPU and a torch built for it."


def arguments() -> argparse.ArgumentParser:
    """What the command line knows."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workloads", type=_listed, metavar="A,B", help="only these")
    parser.add_argument("--systems", type=_listed, metavar="A,B", help="only these")
    parser.add_argument("--rows", type=int, help="at most so many training rows: a trial")
    parser.add_argument("--repeats", type=int, help="at most so many runs of each")
    parser.add_argument("--fresh", action="store_true", help="forget the log and start over")
    parser.add_argument("--forecast", action="store_true", help="only tell what is left to do")
    parser.add_argument("--page", action="store_true", help="only write the page")
    return machine_arguments(parser)


def machine_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Where and how runs are made."""
    folder = launch.ROOT / "runs/benchmarks"
    parser.add_argument("--folder", type=Path, default=folder, help="log, models, data, what runs write")
    parser.add_argument("--fixtures", type=Path, default=models.FIXTURES, help="real tokenizers and data")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--python", type=Path, help="run every system with this interpreter")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of every system; theirs if not given")
    parser.add_argument("--caches", choices=("cold", "warm"), default="cold",
                        help="warm keeps compiled code between a system's runs")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds after which a run is stopped")
    return parser


def _listed(text: str) -> list[str]:
    return text.split(",")


def wanted_jobs(given: argparse.Namespace, whole: Tree, runner: Runner) -> list[Job]:
    """What is asked for and can be run; what cannot is told."""
    wanted = {key: getattr(given, key) for key in ("workloads", "systems", "rows", "repeats")}
    if given.device == "gpu":
        wanted |= {key: wanted[key] or whole["gpu"][key] for key in ("workloads", "systems")}
    for key in ("workloads", "systems"):
        if unknown := set(wanted[key] or ()) - whole[key].keys():
            sys.exit(f"there are no {key} {', '.join(sorted(unknown))}; there are {', '.join(whole[key])}")
    tuned = plan.tuned(place(given))
    left_out = plan.untuned(whole, tuned, wanted["workloads"] or list(whole["workloads"]))
    if left_out and given.device == "cpu":
        print(f"without settings (python -m benchmarks.tune_peers), left out: {', '.join(left_out)}")
    jobs = plan.jobs(whole, wanted, tuned)
    needs = {job.system: whole["systems"][job.system]["needs"] for job in jobs}
    absent = {
        name for name, package in needs.items() if not holds(runner.python(name), FOUND.format(package))
    }
    if absent:
        print(f"not installed (make bench-peers), left out: {', '.join(sorted(absent))}")
    return [job for job in jobs if job.system not in absent]


def place(given: argparse.Namespace) -> str:
    """What results and peers' settings of this machine are kept under."""
    return figures.place(given.device, figures.machine())


def holds(python: Path, condition: str) -> bool:
    """Whether a condition holds in an interpreter."""
    asked = [str(python), "-c", f"import sys; sys.exit(not ({condition}))"]
    env = {**os.environ, "PYTHONPATH": launch.search_path()}
    return python.exists() and not subprocess.run(asked, check=False, capture_output=True, env=env).returncode


def main() -> None:
    """The command."""
    given, whole = arguments().parse_args(), plan.load()
    if given.page:
        page.write(page.load(), whole)
        return
    trial = given.rows is not None
    log = given.folder / f"{given.device}{'.trial' if trial else ''}.jsonl"
    if given.fresh:
        log.unlink(missing_ok=True)
    runner = Runner(given, whole, Journal(log))
    if given.device == "gpu" and not holds(runner.python(OURS), SEES_GPU):
        sys.exit(NO_GPU.format(runner.python(OURS)))
    jobs = wanted_jobs(given, whole, runner)
    if given.forecast:
        left = [job for job in jobs if not runner.journal.has(job.key)]
        print("\n".join([*runner.breakdown(left), runner.forecast(left)]))
        return
    runner.all(jobs)
    here = place(given)
    every = jobs if trial else plan.jobs(whole, {}, plan.tuned(here))
    found = figures.summary(every, runner.journal, {"caches": given.caches, "threads": given.threads})
    if trial:
        page.write({here: found}, whole, given.folder, given.folder)
        print(page.text("en", {here: found}, whole))
        return
    before = page.load()
    made = figures.beside(found, before.get(here, {}), list(whole["workloads"]))
    page.write({**before, here: made}, whole)


if __name__ == "__main__":
    main()
