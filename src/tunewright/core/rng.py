"""Randomness as a pure function of (seed, stream, step), so that resuming needs no carried state."""

import hashlib

import numpy as np


def derive(seed: int, stream: str, step: int = 0) -> int:
    """A 63-bit seed for this stream at this step; equal inputs give equal seeds on any machine."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def permutation(seed: int, stream: str, step: int, count: int) -> np.ndarray:
    """A shuffle of ``range(count)`` (int64, shape [count])."""
    return np.random.Generator(np.random.PCG64(derive(seed, stream, step))).permutation(count)
