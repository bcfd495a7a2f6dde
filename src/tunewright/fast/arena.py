"""Memory for large tensors, apart from all other allocations on a CPU: what a step frees is whole for the next one.

In the C library's heap, where everything lies mixed, small blocks that last settle in the holes that large tensors leave
(matrix kernels made for a new shape, for one): full fine-tuning of 135 M parameters then grows by 108 MB at nearly every
step, the size of its largest tensor. In an arena of their own tensors leave nothing behind. The code is in
``_arena.cpp``.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tunewright.core.words import Words
from tunewright.fast import Technique, Work, _native

_CODE = "_arena"


class Arena(Technique):
    """PyTorch is told to take what has a megabyte or more from there."""

    idea = Words(
        "Large tensors have memory of their own, in which nothing small gets in their way.",
        "大张量使用独立的内存区，不受零碎小块的阻隔。",
    )

    def why_not(self, work: Work) -> str:
        """It is for CPUs, and built by the machine's compiler."""
        return "the device has its own allocator" if work.device.type != "cpu" else prepare()

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """Tensors that outlive it stay valid; their memory goes to the system when they are dropped."""
        code = _native.library(_CODE)
        ctypes.CDLL(None).malloc_trim(0)  # what loading left in the heap would not be used again
        code.begin()
        try:
            yield
        finally:
            code.end()


class Told(NamedTuple):
    """Bytes of the arena."""

    reach: int
    """That it was given by the system so far."""
    taken: int
    """In use."""
    most: int
    """In use at most since it was asked last."""


def prepare() -> str:
    """Build the code; why that cannot be done, or nothing."""
    return _native.why_not(_CODE)


def told() -> Told:
    """How full it is; never before :func:`prepare`."""
    sizes = (ctypes.c_size_t * 3)()
    _native.library(_CODE).told(sizes)
    return Told(*sizes)
