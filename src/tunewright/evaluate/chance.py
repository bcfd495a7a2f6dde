"""What chance alone would do to a score."""

from math import hypot, sqrt

import numpy as np

_SURE = 1.96
"""Standard errors that chance exceeds in one case of twenty."""


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
