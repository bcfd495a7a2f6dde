"""Tunewright adapts open language models: one recipe, from data to a measured, reported, usable model.

import tunewright as tw
run = tw.run("recipes/lora.yaml", data="my.jsonl")
run.generate("What is the capital of France?")
run.report
"""

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.core.paths import cache_folder

if TYPE_CHECKING:
    from tunewright.head_to_head import Compared
    from tunewright.runs import Run
    from tunewright.serve.speaker import Speaker

__all__ = ["compare", "load", "run"]

# oneDNN keeps the last 1,024 matrix kernels that it made for a shape, megabytes each, and PyTorch as many descriptions of
# them, 250 KB each. Lengths differ from step to step, and a mixture's experts get other numbers of tokens each time: none
# of them comes again. Both ask for this once.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
# What torch.compile makes is kept with what else is. PyTorch settles on a folder under /tmp as soon as it is imported.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))

# Half a million objects are made before training begins, by imports above all, and stay. To search them for garbage after
# every 700 new ones, as Python does unasked, takes a tenth of that time. Nought means that somebody wants no search.
if 0 < gc.get_threshold()[0] < 50_000:
    gc.set_threshold(50_000)


def run(recipe: str | Path | Mapping[str, Any], *, quiet: bool = False, fresh: bool = False,
        allow_drift: bool = False, start: str = "", only: str = "", **overrides: Any) -> "Run":  # fmt: skip
    """Run a recipe file (or mapping) with overrides, such as ``train={"max_steps": 10}``.

    ``start`` makes that stage and all that depend on it anew; ``only`` runs no other.

    Raises UserError with every problem of recipe, model, data and machine before any compute.
    """
    from tunewright import pipeline
    from tunewright.agenda import Wish
    from tunewright.auto import Advisor

    loaded = pipeline.load(recipe, overrides, Advisor(fresh, (lambda line: None) if quiet else print))
    return pipeline.run(loaded, quiet=quiet, fresh=fresh, allow_drift=allow_drift, wish=Wish(start, only))


def compare(what: str | Path | Mapping[str, Any] | Sequence[str], *, methods: Sequence[str] = (), seeds: int = 1,
            budget: str = "", sweep: Mapping[str, Sequence[Any]] | None = None, held_out: str | Sequence[str] = (),
            out: str = "", quiet: bool = False, **overrides: Any) -> "Compared":  # fmt: skip
    """Try methods on a recipe, such as ``methods=["lora", "dora"], seeds=3, sweep={"method.rank": [4, 8]}``; or, given
    a list of runs and models, put the rows of the files ``held_out`` to all of them. What is there already is reused.

    Raises UserError with every problem before any compute.
    """
    from tunewright import head_to_head

    tell = (lambda words: None) if quiet else print
    if isinstance(what, (str, Path, Mapping)):
        choice = head_to_head.Choice(methods, seeds, budget, sweep or {})
        return head_to_head.of_methods(what, overrides, choice, out, tell)
    files = [held_out] if isinstance(held_out, str) else held_out
    return head_to_head.of_models(what, files, out, tell)


def load(name: str, precision: str = "", template: str = "auto") -> "Speaker":
    """A run folder, an adapter or model folder, a built-in name or a hub id, ready to ``reply``."""
    from tunewright.serve import speaker

    return speaker.load(name, precision, template)
