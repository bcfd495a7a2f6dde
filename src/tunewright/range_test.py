"""A short range test of the learning rate (after Smith 2017, arXiv:1506.01186): rates a factor apart are tried on the
same batches, and the one with the lowest loss is taken. A rate that is not clearly better than the expected one is not
worth leaving it for: what is best for a few steps is a little too high for many.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

_APART = 3.0
_MOST = 5
"""Rates."""
_CLEARLY = 0.02
"""So much lower, as a share, must a loss be."""


@dataclass(frozen=True)
class Found:
    """The rate to take, and the loss of each that was tried; infinite where training failed."""

    rate: float
    losses: dict[float, float]


def range_test(expected: float, loss: Callable[[float], float | None]) -> Found:
    """Try the expected rate and its neighbours, and go on past an end that is best.

    ``loss`` gives the loss of a short training with a rate, or None if it failed.
    """
    losses: dict[float, float] = {}

    def tried(rate: float) -> None:
        value = loss(rate)
        losses[rate] = math.inf if value is None or not math.isfinite(value) else value

    for rate in (expected, expected * _APART, expected / _APART):
        tried(rate)
    while len(losses) < _MOST:
        best = _best(losses)
        if math.isinf(losses[best]) or best == min(losses):  # what fails is too high
            tried(min(losses) / _APART)
        elif best == max(losses):
            tried(best * _APART)
        else:
            break
    best = _best(losses)
    is_clear = losses[best] < (1 - _CLEARLY) * losses[expected]
    return Found(best if is_clear else expected, losses)


def _best(losses: dict[float, float]) -> float:
    return min(losses, key=lambda rate: losses[rate])
