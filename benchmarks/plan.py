"""workloads.yaml as jobs: one run of one system on one case of a workload."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import models

Tree = dict[str, Any]
HERE = Path(__file__).parent
WORKLOADS = HERE / "workloads.yaml"
TUNED = HERE / "peers.json"
_WORK = ("model", "data", "method", "objective", "lr", "epochs", "max_length", "snapshots")
"""What decides a run's work, and with it whether an earlier run still counts."""


def load(path: Path = WORKLOADS) -> Tree:
    """The file as it stands."""
    found: Tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def tuned(place: str, path: Path = TUNED) -> Tree:
    """Settings found for the peers on such a processor or GPU: system -> workload -> settings."""
    return _all_tuned(path).get(place, {})  # type: ignore[no-any-return]


def _all_tuned(path: Path) -> Tree:
    found: Tree = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def keep_tuned(place: str, system: str, workload: str, settings: Tree, path: Path = TUNED) -> None:
    """Put down what was found; what is best on one processor need not be on another."""
    found = _all_tuned(path)
    found.setdefault(place, {}).setdefault(system, {})[workload] = settings
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def merged(base: Tree, over: Tree) -> Tree:
    """``over`` laid over ``base``, mappings within mappings."""
    both = {key: merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], dict)
            and isinstance(over[key], dict)}  # fmt: skip
    return {**base, **over, **both}


@dataclass(frozen=True)
class Job:
    """One run. ``work`` is what every system is asked for, ``settings`` what this one sets besides."""

    workload: str
    case: str
    system: str
    repeat: int
    work: Tree
    settings: Tree

    @property
    def key(self) -> str:
        """What the log knows the run by; it changes with the work and the settings."""
        return json.dumps(
            [self.workload, self.case, self.system, self.repeat, self.work, self.settings], sort_keys=True
        )

    @property
    def name(self) -> str:
        """What people know the run by."""
        return " ".join(filter(None, (self.workload, self.case, self.system, f"#{self.repeat + 1}")))


def jobs(plan: Tree, wanted: Tree, found: Tree) -> list[Job]:
    """All runs, systems in turn and then again: A B A B.

    ``wanted`` may have ``workloads``, ``systems``, ``rows`` (at most so many) and ``repeats`` (at most so many);
    ``found`` are the tuned settings. A tuned system without settings for a workload is left out.
    """
    listed = [
        job
        for name in wanted.get("workloads") or plan["workloads"]
        for job in _of_workload(plan, name, wanted, found)
    ]
    order = list(plan["workloads"])
    return sorted(listed, key=lambda job: (order.index(job.workload), job.repeat))


def _of_workload(plan: Tree, name: str, wanted: Tree, found: Tree) -> Iterator[Job]:
    workload = plan["workloads"][name]
    for case, own in workload.get("cases", {"": {}}).items():
        spec = {**workload, **own}
        for system, more in spec["systems"].items():
            about = plan["systems"][system]
            if wanted.get("systems") and system not in wanted["systems"]:
                continue
            if about.get("tuned") and name not in found.get(system, {}):
                continue
            whole = {**spec, **more}
            base = found[system][name] if about.get("tuned") else about.get("settings", {})
            settings = merged(base, more.get("settings", {}))
            for repeat in range(min(whole["repeats"], wanted.get("repeats") or whole["repeats"])):
                yield Job(name, case, system, repeat, _work(whole, wanted.get("rows")), settings)


def _work(spec: Tree, rows: int | None) -> Tree:
    """The held-out rows are the same however few are trained on."""
    work = {"snapshots": 0, **{key: spec[key] for key in _WORK if key in spec}}
    data = {"held_out_from": spec["data"]["rows"], **spec["data"], "max_length": spec["max_length"]}
    data["rows"] = min(data["rows"], rows or data["rows"])
    return {**work, "data": data}


def untuned(plan: Tree, found: Tree, names: Sequence[str]) -> list[str]:
    """Tuned systems that some of these workloads lack settings for."""
    return sorted({
        f"{system} on {name}" for name in names for system in plan["workloads"][name]["systems"]
        if plan["systems"][system].get("tuned") and name not in found.get(system, {})
    })  # fmt: skip


def prepared(cache: Path, plan: Tree, job: Job, fixtures: Path) -> Tree:
    """Paths and counts of a job's model and rows, made now if they are not there."""
    name = job.work["model"]
    return models.prepare(cache, name, plan["models"][name], job.work["data"], fixtures)
