"""What was measured before: runs of the same model on the same data overrule what is predicted."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.core import machine, store
from tunewright.core.errors import DamagedError

RESULTS = "results.json"


@dataclass(frozen=True)
class Measured:
    """A finished stage."""

    run: str
    method: str
    loss: float
    """On held-out rows, after training."""
    exact_match: float | None
    tokens_per_second: float
    peak_memory: float
    """Bytes of the process."""
    here: bool
    """Whether it ran on this machine, so that speed and memory are this one's."""
    steps: int
    """Of the optimizer."""


def measured(folder: Path, model: str, data: tuple[str, ...]) -> dict[str, Measured]:
    """The best stage of each method in the folder's runs with this base and these files; files that are damaged or of
    another version are passed over.
    """
    found: dict[str, Measured] = {}
    for path in sorted(folder.glob(f"*/{RESULTS}")):
        with suppress(DamagedError, KeyError, TypeError, AttributeError):
            for stage in _stages(store.read_record(path), path.parent.name, model, data):
                best = found.get(stage.method)
                if best is None or stage.loss < best.loss:
                    found[stage.method] = stage
    return found


def _stages(results: Mapping[str, Any], run: str, model: str, data: tuple[str, ...]) -> Iterator[Measured]:
    compared = {row["model"]: row for row in (results.get("eval") or {}).get("rows", ())}
    for stage in results["stages"]:
        lineage, files = stage["lineage"], stage["data"]["train"]["files"]
        if not _same_model(lineage["base"], model) or tuple(file["sha256"] for file in files) != data:
            continue
        scores = {**stage["after"], **compared.get(f"stage:{stage['name']}", {})}
        hardware = lineage["hardware"]
        here = hardware["processor"] == machine.processor() and hardware["cores"] == machine.cores()
        if "loss" in scores:
            yield Measured(
                run, stage["method"]["name"], scores["loss"], scores.get("exact_match"),
                stage["train"]["tokens_per_second"], stage["train"]["peak_memory"], here,
                stage["train"]["steps"],
            )  # fmt: skip


def _same_model(base: str, model: str) -> bool:
    """The name itself, or two paths to one folder."""
    return base == model or (Path(model).is_dir() and Path(base).resolve() == Path(model).resolve())
