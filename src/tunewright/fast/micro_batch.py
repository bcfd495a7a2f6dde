"""How many tokens go through the model at a time: the number that is fastest here, found by trying.

More tokens fill matrix units better; fewer keep activations in a processor's cache and take less memory. Which wins
depends on model, method and machine, and can double the time of a step. What was found is remembered on this machine,
so that the next run computes the same sums in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunewright.core import machine, store
from tunewright.core.errors import DamagedError
from tunewright.core.paths import cache_folder
from tunewright.core.words import Words
from tunewright.fast import Technique, Work
from tunewright.models import hollow

_LEAST = 512
_SIZES = 4
_ROUNDS = 2
"""A size's first try makes kernels and takes memory that the next finds there: its fastest counts."""
_TRIAL = 2
"""Counts up when sizes are tried another way: what was found by the old one is forgotten."""
_SHARE = 0.05
"""Of the steps, at most, that trying may cost."""


class MicroBatch(Technique):
    """Chosen among the whole batch, its half, quarter and eighth; the optimizer's step is over all of it as before."""

    idea = Words(
        "How many tokens go through the model at a time is found by trying.",
        "每次前向计算的词元数由实测选定。",
    )
    last = True

    def why_not(self, work: Work) -> str:
        """There is nothing to choose."""
        if work.portion.given:
            return f"{work.portion.given} tokens were given, or begun with"
        return "" if len(_sizes(work)) > 1 else "a batch is too small to be cut"

    def not_worth(self, work: Work) -> str:
        """Each try is the work of a step."""
        least = round(_ROUNDS * len(_sizes(work)) / _SHARE)
        if work.steps < least and _remembered(work) is None:
            return f"{work.steps} steps are too few to try sizes on, it takes {least}"
        return ""

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """Tried once; then the loop goes on with the fastest."""
        found = _remembered(work)
        if found is None and hollow.is_on():
            found = work.portion.whole  # which is tried, and takes most
        if found is None:
            sizes = _sizes(work)
            rounds = [[work.portion.tried(size) for size in sizes] for _ in range(_ROUNDS)]
            seconds = {size: min(tries) for size, *tries in zip(sizes, *rounds, strict=True)}
            found = min(seconds, key=lambda size: seconds[size])
            told = {"micro_tokens": found, "seconds": {str(size): s for size, s in seconds.items()}}
            store.write_record(_place(work), told)
        work.portion.take(found)
        yield


def _sizes(work: Work) -> list[int]:
    whole = work.portion.whole
    return [size for size in (whole >> i for i in range(_SIZES)) if size >= min(_LEAST, whole)]


def _place(work: Work) -> Path:
    model, parts = work.model, [_TRIAL, work.portion.whole, machine.identity(), machine.versions()]
    shapes = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    return cache_folder() / "micro-batch" / f"{store.sha256_json([shapes, parts])}.json"


def _remembered(work: Work) -> int | None:
    with suppress(DamagedError):
        return int(store.read_record(_place(work))["micro_tokens"])
    return None
