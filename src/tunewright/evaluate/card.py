"""The model card beside every artifact: what it is, what it learned from, what it scores, whose licence."""

import re
from pathlib import Path
from typing import Any

import yaml

from tunewright.core import figures
from tunewright.core.units import human_bytes, human_count, human_seconds
from tunewright.models.load import ModelSource

_UNKNOWN = "unknown: see the base model's own card"


def licence_of(source: ModelSource) -> str:
    """The base's licence: from its card's front matter, else the first line of its LICENSE file."""
    if source.folder is None:
        return _UNKNOWN
    return _from_card(source.folder / "README.md") or _from_file(source.folder) or _UNKNOWN


def _from_card(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r"\A---\n.*?^license: *(\S[^\n]*)$.*?^---$", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def _from_file(folder: Path) -> str:
    for path in sorted(folder.glob("LICEN[SC]E*")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in lines if line.strip()), "")
    return ""


def text(metrics: dict[str, Any]) -> str:
    """The card as Markdown with front matter, from one stage's metrics."""
    lineage, train, data = metrics["lineage"], metrics["train"], metrics["data"]["train"]
    library = "peft" if metrics["artifact"].endswith("adapter") else "transformers"
    front = {"base_model": lineage["base"], "library_name": library, "license": lineage["license"],
             "tags": ["tunewright", metrics["method"]["name"], metrics["objective"]["name"]]}  # fmt: skip
    parts = metrics["parameters"]
    return "\n".join([
        "---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "",
        f"# {metrics['name']}: {metrics['method']['name']} on {lineage['base']}", "",
        f"Trained with Tunewright {lineage['versions']['tunewright']}; "
        f"{human_count(parts['trainable'])} of {human_count(parts['total'])} parameters "
        f"({parts['share']:.2%}).", "",
        "## Data", "",
        f"{data['samples']} samples, {data['tokens']} tokens, {len(data['skipped'])} rows left out.",
        *(f"- SHA-256 `{facts['sha256']}`: {facts['rows']} rows" for facts in data["files"]), "",
        "## Training", "",
        f"{train['steps']} steps, {human_seconds(train['seconds'])}, "
        f"{human_count(train['tokens_per_second'])} tokens/s, "
        f"peak memory {human_bytes(train['peak_memory'])}, "
        f"seed {lineage['seed']}.", "",
        "```yaml", yaml.safe_dump(_recipe(metrics), sort_keys=False, allow_unicode=True).strip(), "```", "",
        "## Scores on held-out data", "", *_scores(metrics["before"], metrics["after"]), "",
        "## Licence of the base", "", str(lineage["license"]), "",
    ])  # fmt: skip


def _recipe(metrics: dict[str, Any]) -> dict[str, Any]:
    keys = ("model", "method", "objective", "precision")
    return {**{key: metrics[key] for key in keys}, "train": metrics["train_config"]}


def _scores(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    own = figures.of(after)
    shared = ("loss", "perplexity", "exact_match", "f1")
    keys = [*(key for key in shared if key in after and key not in own), *own]
    if not keys:
        return ["Not measured."]
    rows = [f"| {key} | {before[key]:.4f} | {after[key]:.4f} |" for key in keys if key in before]
    return ["| score | before | after |", "|---|---|---|", *rows]
