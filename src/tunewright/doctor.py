"""Look at a run folder: is every byte as it was written, and what can be gone on from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.core import journal, lock, machine, store
from tunewright.core.errors import DamagedError, Problem, UserError
from tunewright.core.machine import available_memory
from tunewright.core.units import human_bytes
from tunewright.drifts import INPUTS
from tunewright.recipes import EVAL
from tunewright.train import ledger
from tunewright.train.checkpoint import best_of, step_of

_RECORDS = (
    "manifest.json",
    "results.json",
    "inputs.json",
    "drift.json",
    "before.json",
    "after.json",
    "metrics.json",
)
_JOURNALS = ("events.jsonl", "samples.jsonl")


@dataclass(frozen=True)
class Finding:
    """One thing in the folder: ``state`` is whole, damaged, leftover or note."""

    path: str
    state: str
    what: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and what the run would do if it were started again."""

    run: str
    findings: tuple[Finding, ...]
    next: tuple[str, ...]

    @property
    def damaged(self) -> list[Finding]:
        """What is not as it was written."""
        return [finding for finding in self.findings if finding.state == "damaged"]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        findings = [vars(finding) for finding in self.findings]
        return {"run": self.run, "damaged": len(self.damaged), "findings": findings, "next": list(self.next)}

    def lines(self) -> list[str]:
        """For people."""
        width = max((len(finding.path) for finding in self.findings), default=0)
        rows = [f"{f.state:<8}  {f.path:<{width}}  {f.what}".rstrip() for f in self.findings]
        return [*rows, *self.next]


def examine(folder: Path) -> Diagnosis:
    """Verify every hash in a run folder. Nothing is changed. UserError if it is none."""
    if not (folder / "manifest.json").is_file() and not (folder / "stages").is_dir():
        what = f"{folder} is not a run folder: it has neither manifest.json nor stages/"
        raise UserError(Problem("run", what, "give the output folder of a run"))
    findings = [
        *_missing(folder),
        *_sealed(folder),
        *_records(folder),
        *_journals(folder),
        *_leftovers(folder),
    ]
    stages = sorted(path for path in (folder / "stages").glob("*") if path.is_dir())
    after = [_prospect(stage, {f.path for f in findings if f.state == "damaged"}) for stage in stages]
    if lock.is_owned(folder):
        after.append("a process is writing here now")
    return Diagnosis(str(folder), tuple(findings), tuple(after))


def _checked(folder: Path, path: Path, check: Any) -> Finding:
    name = path.relative_to(folder).as_posix()
    try:
        check(path)
    except DamagedError as error:
        return Finding(name, "damaged", str(error))
    return Finding(name, "whole")


def _missing(folder: Path) -> Iterator[Finding]:
    """What must be there because of something that came after it."""
    wanted: list[Path] = []
    for stage in sorted((folder / "stages").glob("*")):
        if any(stage.glob("checkpoints/step-*")) or (stage / "metrics.json").exists():
            wanted += [folder / "events.jsonl", stage / INPUTS]
            wanted += [] if stage.name == EVAL else [stage / "samples.jsonl"]  # which is of what was learned
        wanted += [stage / f"{when}.json" for when in _measured(stage / "metrics.json")]
    for path in dict.fromkeys(wanted):
        if not path.exists():
            yield Finding(path.relative_to(folder).as_posix(), "damaged", "missing")


def _measured(metrics: Path) -> list[str]:
    """When a finished stage was measured; nothing if that cannot be told."""
    try:
        found = store.read_record(metrics)
    except DamagedError:
        return []
    return [when for when in ("before", "after") if found.get(when)]


def _sealed(folder: Path) -> Iterator[Finding]:
    """Checkpoints, adapters and models: folders that have a manifest, or should."""
    kinds = ("checkpoints/step-*", "checkpoints/best-*", "adapter", "model", "base")
    for path in sorted(p for kind in kinds for p in folder.glob(f"stages/*/{kind}")):
        yield _checked(folder, path, store.verify)


def _records(folder: Path) -> Iterator[Finding]:
    for path in _found(folder, _RECORDS):
        yield _checked(folder, path, store.read_record)


def _journals(folder: Path) -> Iterator[Finding]:
    for path in _found(folder, _JOURNALS):
        what = _gaps(path)
        yield Finding(path.relative_to(folder).as_posix(), "damaged" if what else "whole", what)


def _found(folder: Path, names: Iterable[str]) -> list[Path]:
    """Files of these names, of the run and of its stages."""
    return sorted(p for name in names for p in (*folder.glob(name), *folder.glob(f"stages/*/{name}")))


def _gaps(path: Path) -> str:
    """What a journal lost, as far as its checksums and its stage's checkpoints tell."""
    if lost := journal.damaged(path):
        return f"{lost} lines are not as they were written"
    if not path.stat().st_size:
        return "empty"
    learned = max(map(step_of, path.parent.glob("checkpoints/step-*")), default=0)
    forgotten = ledger.lost(path, learned) if path.name == "samples.jsonl" else 0
    return f"{forgotten} steps are lost; the next run writes them again" if forgotten else ""


def _leftovers(folder: Path) -> Iterator[Finding]:
    for path in store.leftovers(folder):
        what = "a writer was killed here; the next run clears it"
        yield Finding(path.relative_to(folder).as_posix(), "leftover", what)
    for path in sorted(folder.glob("stages/*/checkpoints/damaged-*")):
        yield Finding(path.relative_to(folder).as_posix(), "note", "put aside because it was damaged")


def _prospect(stage: Path, damaged: set[str]) -> str:
    """What running the recipe again does with this stage."""
    at = f"stages/{stage.name}"
    kinds = ("metrics.json",) if stage.name == EVAL else ("adapter", "model")
    results = [name for name in kinds if (stage / name).exists()]
    if (
        results
        and (stage / "metrics.json").exists()
        and not damaged & {f"{at}/{results[0]}", f"{at}/metrics.json"}
    ):
        return f"{stage.name}: finished; running the recipe again reuses it"
    if stage.name == EVAL:
        return f"{stage.name}: not finished; running the recipe again asks all models"
    whole = [p for p in sorted(stage.glob("checkpoints/step-*")) if _can_be_gone_on_from(p, at, damaged)]
    if not whole:
        return f"{stage.name}: no whole checkpoint; running the recipe again starts it over"
    learned = len(ledger.read(stage / "samples.jsonl"))
    return f"{stage.name}: running the recipe again goes on from step {step_of(whole[-1])} ({learned} steps in the ledger)"


def _can_be_gone_on_from(checkpoint: Path, at: str, damaged: set[str]) -> bool:
    best = best_of(checkpoint)
    needed = [checkpoint] if best is None else [checkpoint, best]
    return all(p.exists() and f"{at}/checkpoints/{p.name}" not in damaged for p in needed)


def environment_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    hardware = found["hardware"]
    lines = [f"{name:<13} {version}" for name, version in found["versions"].items()]
    lines.append(f"{'processor':<13} {hardware['processor']}, {hardware['cores']} cores")
    lines.append(f"{'memory':<13} {human_bytes(hardware['memory'])}, {human_bytes(available_memory())} free")
    lines.append(f"{'accelerators':<13} {', '.join(hardware['accelerators']) or 'none'}")
    computing = {**found["training"], "matrix units": ", ".join(found["training"]["matrix units"]) or "none"}
    kept = "kept for the next step" if computing["keeps freed memory"] else "left to the C library"
    lines.append(
        f"{'training':<13} {computing['threads']} threads; freed memory is {kept}; huge pages: {computing['huge pages']}"
    )
    lines.append(f"{'matrix units':<13} {computing['matrix units']}")
    lines.append(f"{'bf16 products':<13} {computing['bf16 products']}")
    return lines


def environment() -> dict[str, Any]:
    """What would compute here."""
    from tunewright.fast import process

    return {"versions": machine.versions(), "hardware": machine.hardware(), "training": process.settings()}
