"""What changed since a run folder was begun: each difference by name, old -> new."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tunewright.core import store
from tunewright.core.errors import DamagedError, DriftError, Problem
from tunewright.jobs import Job

INPUTS = "inputs.json"
Drift = dict[str, list[str]]
"""Stage -> its differences, as they are told and kept in lineage."""

_FIX = "give another output=FOLDER, start over with --fresh, or insist with --allow-drift"
_TOLERATED = "machine"
"""A run may move to another machine: the numbers differ in their last bits then, which is told, not refused."""


def between(folder: Path, todo: Iterable[Job], allow: bool) -> Drift:
    """By stage, all that differs from what the folder was begun with. DriftError unless it is allowed."""
    found = {job.stage.name: _of_stage(folder / "stages" / job.stage.name, job) for job in todo}
    refused = [p for some in found.values() for p in some if not _is_tolerated(p)]
    if refused and not allow:
        raise DriftError(refused)
    return {name: [f"{p.where}: {p.what}" for p in some] for name, some in found.items() if some}


def _is_tolerated(problem: Problem) -> bool:
    return problem.where.partition(": ")[2].startswith(_TOLERATED)


def _of_stage(at: Path, job: Job) -> list[Problem]:
    path = at / INPUTS
    if not path.exists() and not (at / "checkpoints").exists():
        return []
    try:
        return _differences(job.stage.name, store.read_record(path), job.inputs())
    except DamagedError as error:
        what = f"{error}, so nothing tells whether the inputs are the same"
        return [Problem(f"{job.stage.name}: {INPUTS}", what, _FIX)]


def _differences(stage: str, old: Any, new: Any, at: str = "") -> list[Problem]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [p for k in keys for p in _differences(stage, old.get(k), new.get(k), f"{at}.{k}".lstrip("."))]
    if old == new:
        return []
    return [Problem(f"{stage}: {at}", f"the run was begun with {old!r}, now it is {new!r}", _FIX)]
