"""Which parts of a decoder block are worth computing again: what that costs, and what it saves."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree

from tunewright.models.memory import storage

Sizes = dict[StorageWeakRef, int]
"""Bytes of storages. A weak reference keeps the number of a freed one from being given to another."""


@dataclass(frozen=True)
class Candidate:
    """A part of a decoder block, or the block itself, that may be computed again in the backward pass."""

    name: str
    block: str
    seconds: float
    """Of the second computation, which ends where the last tensor was kept."""
    saved: int
    """Bytes that need not be kept then; the part's inputs must be."""
    needed: int
    """Bytes that are there while it is computed again."""

    def times(self, factor: float) -> "Candidate":
        """The same part on so many times the tokens."""
        seconds, saved, needed = self.seconds * factor, int(self.saved * factor), int(self.needed * factor)
        return replace(self, seconds=seconds, saved=saved, needed=needed)

    def replaces(self, other: "Candidate") -> bool:
        """Whether one of them is the block that the other is a part of, or both are the same."""
        return self.block == other.block and (
            self.name == other.name or self.block in {self.name, other.name}
        )


def peak(kept: int, chosen: Sequence[Candidate]) -> int:
    """Bytes of activations at most, where all blocks keep ``kept`` together if nothing is computed again."""
    return kept - sum(c.saved for c in chosen) + max((c.needed for c in chosen), default=0)


def choose(candidates: Sequence[Candidate], kept: int, budget: int) -> list[Candidate]:
    """The least seconds per byte first, until the peak is within the budget; all that save bytes if none is."""
    chosen: list[Candidate] = []
    while peak(kept, chosen) > budget:
        of_block: dict[str, list[Candidate]] = {c.block: [] for c in candidates}
        for c in chosen:
            of_block[c.block].append(c)
        swaps = [_Swap(c, [o for o in of_block[c.block] if c.replaces(o)]) for c in candidates]
        useful = [swap for swap in swaps if swap.saved > 0]
        if not useful:
            return chosen
        best = min(useful, key=lambda swap: swap.seconds / swap.saved)
        chosen = [c for c in chosen if c not in best.old] + [best.new]
    for candidate in sorted(chosen, key=lambda c: -c.seconds):
        others = [c for c in chosen if c is not candidate]
        if peak(kept, others) <= budget:  # those that came later have made it needless
            chosen = others
    return chosen


@dataclass(frozen=True)
class _Swap:
    """One candidate more, in place of those that it replaces."""

    new: Candidate
    old: Sequence[Candidate]

    @property
    def seconds(self) -> float:
        return self.new.seconds - sum(c.seconds for c in self.old)

    @property
    def saved(self) -> int:
        return self.new.saved - sum(c.saved for c in self.old)


def flat(args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """A call's arguments as one list, and their form; what is no plain collection stays as it is."""
    return _pytree.tree_flatten(
        (tuple(args), dict(kwargs)), is_leaf=lambda x: not isinstance(x, tuple | list | dict)
    )


@dataclass(eq=False)
class _Reading:
    """One call of a part."""

    inputs: Sizes
    began: float
    ended: float
    kept: Sizes = field(default_factory=dict)
    elsewhere: Sizes = field(default_factory=dict)
    """What is kept in the block while this call is not under way."""


class Meter:
    """Measures the parts of a block in a call under its ``pack``: nothing is kept, so that all fits."""

    def __init__(self, lasting: frozenset[int], device: torch.device) -> None:
        self.lasting, self.device = lasting, device
        self._open: list[_Reading] = []
        self._readings: dict[str, _Reading] = {}
        self._kept: Sizes = {}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``forward`` gives, as a call of the part of that name."""
        inputs = self._sizes(x for x in flat(args, kwargs)[0] if isinstance(x, Tensor))
        now = self._now()
        reading = self._readings[name] = _Reading(inputs, now, now, elsewhere=dict(self._kept))
        self._open.append(reading)
        try:
            return forward(*args, **kwargs)
        finally:
            self._open.pop()

    def _sizes(self, tensors: Iterable[Tensor]) -> Sizes:
        storages = (x.untyped_storage() for x in tensors if storage(x) not in self.lasting)
        return {StorageWeakRef(s): s.nbytes() for s in storages}  # type: ignore[no-untyped-call]

    def pack(self, x: Tensor) -> None:
        """The hook for a tensor that would be kept."""
        now, size = self._now(), self._sizes([x])
        self._kept |= size
        for reading in self._readings.values():
            if reading in self._open:
                reading.ended = now
                reading.kept |= size
            else:
                reading.elsewhere |= size

    def candidates(self, block: str) -> tuple[list[Candidate], int]:
        """The parts that were called, and the bytes that all of the block keeps."""
        return [self._candidate(name, block) for name in self._readings], sum(self._kept.values())

    def _candidate(self, name: str, block: str) -> Candidate:
        reading = self._readings[name]
        own = reading.kept.keys() - reading.elsewhere.keys() - reading.inputs.keys()
        more = reading.inputs.keys() - self._kept.keys()
        saved = sum(reading.kept[s] for s in own) - sum(reading.inputs[s] for s in more)
        return Candidate(name, block, reading.ended - reading.began, saved, needed=sum(reading.kept.values()))
