"""What chance alone would do to a score."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from statistics import mean, stdev

import numpy as np

_SURE = 1.96
"""Standard errors that chance exceeds in one case of twenty."""

_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The same of Student's t with 1, 2 ... 30 degrees of freedom, for spreads that are themselves estimated."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its 95 % interval, which one pair alone does not have."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether there is an interval and it does not reach zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def paired(ones: Sequence[float], others: Sequence[float]) -> Difference:
    """``ones - others``, pair by pair: what both have in common, such as a seed, is not taken for a difference."""
    apart = [one - other for one, other in zip(ones, others, strict=True)]
    middle = mean(apart)
    if len(apart) == 1:
        return Difference(middle)
    free = len(apart) - 1
    reach = (_STUDENT[free - 1] if free <= len(_STUDENT) else _SURE) * stdev(apart) / sqrt(len(apart))
    return Difference(middle, middle - reach, middle + reach)


def share_error(share: float, count: int) -> float:
    """Standard error of a share of ``count`` questions (Agresti-Coull: not zero where none or all are right)."""
    likely = (share * count + 2) / (count + 4)
    return sqrt(likely * (1 - likely) / (count + 4))


def mean_error(values_NR: np.ndarray) -> np.ndarray:
    """Standard errors [R] of means over N values."""
    errors: np.ndarray = values_NR.std(0) / sqrt(max(len(values_NR) - 1, 1))
    return errors


def margin(one: float, other: float) -> float:
    """Differences below this between two scores of these standard errors happen by chance."""
    return _SURE * hypot(one, other)
