"""Which samples make up step n: a pure function of the lengths, the token budget and the seed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tunewright.core.rng import permutation

_WINDOW_BATCHES = 64
"""Samples are sorted by length within windows this long: little padding, and batches still differ."""


def cut(order: Sequence[int] | np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Consecutive runs of ``order`` whose padded size (longest x count) is at most ``budget`` tokens.

    A sample longer than the budget is a run of its own.
    """
    runs, start, longest = [], 0, 0
    for end, index in enumerate(order):
        longest = max(longest, int(lengths[index]))
        if end > start and longest * (end - start + 1) > budget:
            runs.append(np.asarray(order[start:end]))
            start, longest = end, int(lengths[index])
    runs.append(np.asarray(order[start:]))
    return runs


def padding_share(batches: Sequence[np.ndarray], lengths: np.ndarray) -> float:
    """Padded positions as a share of all positions."""
    whole = sum(len(b) * int(lengths[b].max()) for b in batches)
    return 1.0 - sum(int(lengths[b].sum()) for b in batches) / whole if whole else 0.0


def epoch_batches(
    indices: np.ndarray, lengths: np.ndarray, budget: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """One epoch's batches: shuffled, sorted by length within windows, cut to the budget, shuffled again."""
    shuffled = indices[permutation(seed, "order", epoch, len(indices))]
    mean = max(1.0, float(lengths[indices].mean()))
    window = max(1, int(_WINDOW_BATCHES * budget / mean))
    batches: list[np.ndarray] = []
    for start in range(0, len(shuffled), window):
        part = shuffled[start : start + window]
        batches += cut(part[np.argsort(lengths[part], kind="stable")], lengths, budget)
    return [batches[i] for i in permutation(seed, "batches", epoch, len(batches))]


@dataclass
class BatchPlan:
    """The batches of every step; ``epoch(e)`` gives the indices of epoch e's samples."""

    epoch: Callable[[int], np.ndarray]
    lengths: np.ndarray
    budget: int
    seed: int
    _cached: tuple[int, list[np.ndarray]] = field(default=(-1, []), repr=False)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """All batches of one epoch."""
        if self._cached[0] != epoch:
            made = epoch_batches(self.epoch(epoch), self.lengths, self.budget, self.seed, epoch)
            self._cached = (epoch, made)
        return self._cached[1]

    def steps(self, epochs: float) -> int:
        """Steps in so many epochs, a part of an epoch rounded up."""
        whole = int(epochs)
        steps = sum(len(self.batches(e)) for e in range(whole))
        if epochs > whole:
            steps += int(np.ceil((epochs - whole) * len(self.batches(whole))))
        return max(1, steps)

    def start_at(self, step: int) -> Iterator[np.ndarray]:
        """Batches from step ``step`` (0-based) on, without end."""
        epoch = 0
        while step >= len(self.batches(epoch)):
            step -= len(self.batches(epoch))
            epoch += 1
        while True:
            yield from self.batches(epoch)[step:]
            epoch, step = epoch + 1, 0
