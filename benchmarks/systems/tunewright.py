"""Tunewright with its default recipe: model, data, method, learning rate, epochs, and nothing else.

No rows are held out and nothing is measured, since the other systems do neither; the longest sample is the workload's.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.systems._work import Work

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tree = dict[str, Any]


def main(work: Work) -> None:
    """Run the recipe, then read the run's own events."""
    import tunewright

    run = tunewright.run(recipe(work), quiet=True)
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    by_kind = {
        kind: [e for e in events if e["kind"] == kind] for kind in ("train", "step", "saved", "checkpoint")
    }
    work.first_step = work.since(by_kind["train"][0]["time"])
    learned = 0
    for event in by_kind["step"]:
        work.steps.append((work.since(event["time"]), event["tokens"] - learned))
        learned = event["tokens"]
    work.snapshots = [
        (work.since(event["time"]), str(_snapshot(run.artifact, event["path"])))
        for event in by_kind["checkpoint"]
        if work["snapshots"]
    ]
    work.finish(work.since(by_kind["saved"][-1]["time"]), run.artifact)


def recipe(work: Work) -> Tree:
    """The default recipe; a variant's settings are keys of the recipe."""
    train = {"lr": work["lr"], "epochs": work["epochs"]}
    given = {**work.settings}
    return {
        "output": work["output"], "model": work["model"], "method": work["method"],
        "data": {"train": work["train"], "valid_share": 0, "max_length": work["max_length"]},
        "train": {**train, **given.pop("train", {})}, "objective": _objective(work), "evaluate": {"enabled": False}, **given,
    }  # fmt: skip


def _objective(work: Work) -> Tree:
    asked: Tree = work["objective"]
    if asked["name"] != "grpo":
        return asked
    reward = Path(__file__).parents[1] / "rewards.py"
    return {**asked, "rewards": [f"{reward}:worth"]}


def _snapshot(artifact: Path, checkpoint: str) -> Path:
    """A checkpoint's weights in the form of the adapter that was saved at the end."""
    from safetensors.torch import load_file, save_file

    from_step = artifact.parent / "checkpoints" / checkpoint
    folder = from_step.parent / f"{checkpoint}-adapter"
    folder.mkdir()
    shutil.copy(artifact / _CONFIG, folder)
    weights = load_file(from_step / "trainable.safetensors")
    save_file({name.replace(".default", ""): tensor for name, tensor in weights.items()}, folder / _WEIGHTS)
    return folder


if __name__ == "__main__":
    main(Work.read())
