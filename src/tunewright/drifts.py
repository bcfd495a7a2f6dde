"""What changed since a run folder was begun: each difference by name, old -> new."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tunewright.core import store
from tunewright.core.errors import DamagedError, DriftError, Problem

INPUTS = "inputs.json"
_HISTORY = "drift.json"
Drift = dict[str, list[Problem]]
"""Stage -> its differences."""

_FIX = "give another output=FOLDER, start over with --fresh, or insist with --allow-drift"
_TOLERATED = "machine"
"""A run may move to another machine: the numbers differ in their last bits then, which is told, not refused."""


class Work(Protocol):
    """What a run is made of: a stage, or the measurement of all."""

    @property
    def name(self) -> str:
        """Of its folder among the stages'."""

    @property
    def needs(self) -> Sequence[str]:
        """Names of the work whose results it uses."""

    @property
    def inputs(self) -> dict[str, Any]:
        """All that decides its outcome."""


def between(folder: Path, todo: Iterable[Work], allow: bool) -> Drift:
    """By stage, all that differs from what the folder was begun with. DriftError unless it is allowed."""
    found = {work.name: _of_stage(folder / "stages" / work.name, work) for work in todo}
    begun = [path.parent.name for path in sorted(folder.glob(f"stages/*/{INPUTS}"))]
    what = "the run was begun with a stage of this name, now it has none"
    gone = [Problem(f"{name}: stages", what, _FIX) for name in begun if name not in found]
    refused = gone + [p for some in found.values() for p in some if not is_tolerated(p)]
    if refused and not allow:
        raise DriftError(refused)
    return {name: some for name, some in found.items() if some}


def is_begun(folder: Path) -> bool:
    """Whether a run worked in the folder before."""
    return any(folder.glob(f"stages/*/{INPUTS}"))


def is_tolerated(difference: Problem) -> bool:
    """Whether it is one that is only told."""
    return difference.where.partition(": ")[2].startswith(_TOLERATED)


def told(differences: Iterable[Problem]) -> list[str]:
    """Differences as they are told and kept in lineage."""
    return [f"{difference.where}: {difference.what}" for difference in differences]


def history(at: Path, new: Iterable[Problem]) -> list[str]:
    """All differences that a stage has been gone on with, the new ones among them."""
    path = at / _HISTORY
    known = store.read_record(path)["differences"] if path.exists() else []
    return list(dict.fromkeys([*known, *told(new)]))


def remember(at: Path, work: Work, differences: list[str]) -> None:
    """Keep what the stage goes on with, from now on what a drift is measured from, and what differed until now."""
    if differences:
        store.write_record(at / _HISTORY, {"differences": differences})
    store.write_record(at / INPUTS, work.inputs)


def _of_stage(at: Path, work: Work) -> list[Problem]:
    path = at / INPUTS
    if not path.exists() and not (at / "checkpoints").exists():
        return []
    try:
        return _differences(work.name, store.read_record(path), work.inputs)
    except DamagedError as error:
        what = f"{error}, so nothing tells whether the inputs are the same"
        return [Problem(f"{work.name}: {INPUTS}", what, _FIX)]


def _differences(stage: str, old: Any, new: Any, at: str = "") -> list[Problem]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [p for k in keys for p in _differences(stage, old.get(k), new.get(k), f"{at}.{k}".lstrip("."))]
    if old == new:
        return []
    return [Problem(f"{stage}: {at}", f"the run was begun with {old!r}, now it is {new!r}", _FIX)]
