"""Tunewright adapts open language models: one recipe, from data to a measured, reported, usable model.

import tunewright as tw
run = tw.run("recipes/lora.yaml", data="my.jsonl")
run.generate("What is the capital of France?")
run.report
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunewright.runs import Run
    from tunewright.serve.speaker import Speaker

__all__ = ["load", "run"]


def run(recipe: str | Path | Mapping[str, Any], *, quiet: bool = False, fresh: bool = False,
        allow_drift: bool = False, start: str = "", only: str = "", **overrides: Any) -> "Run":  # fmt: skip
    """Run a recipe file (or mapping) with overrides, such as ``train={"max_steps": 10}``.

    ``start`` makes that stage and all that depend on it anew; ``only`` runs no other.

    Raises UserError with every problem of recipe, model, data and machine before any compute.
    """
    from tunewright import pipeline
    from tunewright.agenda import Wish

    loaded = pipeline.load(recipe, overrides)
    return pipeline.run(loaded, quiet=quiet, fresh=fresh, allow_drift=allow_drift, wish=Wish(start, only))


def load(name: str, precision: str = "", template: str = "auto") -> "Speaker":
    """A run folder, an adapter or model folder, a built-in name or a hub id, ready to ``reply``."""
    from tunewright.serve import speaker

    return speaker.load(name, precision, template)
