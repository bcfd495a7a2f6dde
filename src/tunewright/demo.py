"""The demo: the advisor chooses how the built-in model learns to answer, and is measured by what comes of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunewright import pipeline
from tunewright.auto import Advisor
from tunewright.runs import Run

RECIPE: dict[str, Any] = {
    "model": "builtin:pico",
    "data": {"train": "builtin:demo-train", "valid": "builtin:demo-valid"},
    "method": {"name": "auto", "tries": 1, "rates": False},
    "precision": "bf16",
    # as much on every machine: a deadline would choose the method and the passes by how fast one is
    "train": {"epochs": 1.25, "tokens_per_batch": 1024, "micro_tokens": 1024},
    "evaluate": {"max_new_tokens": 16},
}


def demo(output: Path, tell: Callable[[str], None], quiet: bool = False) -> dict[str, Any]:
    """Run it afresh into ``output``; returns scores before and after, and the report's path."""
    recipe = pipeline.load({**RECIPE, "output": str(output)}, advisor=Advisor(fresh=True, tell=tell))
    run = pipeline.run(recipe, quiet=quiet, fresh=True)
    stage = run.results["stages"][0]
    return {"before": stage["before"], "after": stage["after"], "report": str(run.report)}


def summary(result: dict[str, Any], run: Run) -> list[str]:
    """What was gained, where the report is, and what to do next."""
    before, after = result["before"], result["after"]
    gained = 100 * (after["exact_match"] - before["exact_match"])
    return [
        "",
        f"On {after['count']} held-out questions, answers that match exactly rose by {gained:.0f} points:",
        f"    {before['exact_match']:.1%} before, {after['exact_match']:.1%} after; "
        f"held-out loss {before['loss']:.2f} -> {after['loss']:.2f}; {result['seconds']:.0f} s in all.",
        f"Report: {result['report']}",
        "Next:",
        f"    tunewright chat {run.folder}",
        f"    tunewright export {run.folder}",
        "    tunewright run recipes/auto.yaml data=YOUR.jsonl output=runs/mine",
    ]
