"""Memory for large tensors, apart from all other allocations on a CPU: what a step frees is whole for the next one.

In the C library's heap, where everything lies mixed, small blocks that last settle in the holes that large tensors leave
(matrix kernels made for a new shape, for one): full fine-tuning of 135 M parameters then grows by 108 MB at nearly every
step, the size of its largest tensor. In an arena of their own tensors leave nothing behind. The code is in
``_arena.cpp``.
"""

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from tunewright.core.words import Words
from tunewright.fast import Switches, Technique, Work, _native
from tunewright.models.load import best_device

_CODE = "_arena"
_entered: list[None] = []
"""One entry for each time that it was begun and has not ended."""


class Arena(Technique):
    """PyTorch is told to take what has a megabyte or more from there."""

    idea = Words(
        "Large tensors have memory of their own, in which nothing small gets in their way.",
        "大张量使用独立的内存区，不受零碎小块的阻隔。",
    )

    def why_not(self, work: Work) -> str:
        """It is for CPUs, and built by the machine's compiler."""
        return "the device has its own allocator" if work.device.type != "cpu" else prepare()

    def on(self, work: Work) -> AbstractContextManager[None]:
        """Tensors that outlive it stay valid; their memory goes to the system when they are dropped."""
        return _begun()


@contextmanager
def _begun() -> Iterator[None]:
    code = _native.library(_CODE)
    ctypes.CDLL(None).malloc_trim(0)  # what was left in the heap may not be used again
    _entered.append(None)
    code.begin()
    try:
        yield
    finally:
        _entered.pop()
        if not _entered:
            code.end()


def around(switches: Switches) -> AbstractContextManager[None]:
    """For what comes before and after training too, as the recipe's ``switches`` have it: the most that loading and
    measuring take of the heap depends on where small blocks happen to lie, and differs from run to run.
    """
    wanted = switches if isinstance(switches, bool) else switches.get("arena", True)
    return _begun() if wanted and best_device() == "cpu" and not prepare() else nullcontext()


def let_go() -> None:
    """What is free in it goes to the system now, where it would be kept: what comes next is of other sizes."""
    if _entered:
        _native.library(_CODE).let_go()


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
