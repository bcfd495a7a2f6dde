"""How fast this machine multiplies matrices and copies memory: measured once, in about a second, and kept."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.core import machine, store
from tunewright.core.errors import DamagedError
from tunewright.core.paths import cache_folder

_VERSION = 2
_SIDE = 1024
_COPIED = 64 << 20
_LEAST = 0.1
"""Seconds that each figure is taken over; the fastest round of them counts."""


@dataclass(frozen=True)
class Rates:
    """Matrix products in operations a second, copies in bytes read and written a second."""

    bf16: float
    fp32: float
    copy: float


def rates() -> Rates:
    """Those of this machine, from the cache or measured now."""
    place = _place()
    with suppress(DamagedError, KeyError, TypeError):
        return Rates(**store.read_record(place)["rates"])
    found = measure()
    store.write_record(place, {"rates": asdict(found), "identity": machine.identity()})
    return found


def _place() -> Path:
    """By what :func:`machine.identity` tells, as far as it can be told without the seconds that torch takes."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    facts = {
        "processor": machine.processor(),
        "cores": machine.cores(),
        "threads": threads,
        "version": _VERSION,
    }
    return cache_folder() / "machine" / f"{store.sha256_json(facts)}.json"


def measure() -> Rates:
    """Measure with torch, on the CPU."""
    import torch

    from tunewright.models import wide

    wide.begin()

    def product(dtype: Any) -> float:
        a, b = (torch.ones(_SIDE, _SIDE, dtype=dtype) for _ in range(2))
        return 2 * _SIDE**3 / _fastest(lambda: a @ b)

    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    with torch.no_grad():
        copied = 2 * _COPIED / _fastest(lambda: target.copy_(source))
        return Rates(product(torch.bfloat16), product(torch.float32), copied)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest round, the first one not counted: it makes kernels."""
    work()
    best, end = float("inf"), time.perf_counter() + _LEAST
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best
