"""Memory that ends: told from other errors, and met with smaller parts."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

_NO_MEMORY = ("not enough memory", "can't allocate memory", "could not create a primitive")
"""What torch's CPU allocator says on Windows, and elsewhere; what oneDNN says for want of scratch space."""


def storage(x: Tensor) -> int:
    """The number of the memory that a tensor is a view of; it is no other's as long as that lives."""
    number: int = x.untyped_storage()._cdata
    return number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up. On a CPU torch raises a RuntimeError that only its words tell apart."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def fitting(
    budget: int, least: int, work: Callable[[int], Result], tell: Callable[[int], None] = lambda budget: None
) -> Result:
    """``work(budget)``, with half the budget each time memory runs out, down to ``least``.

    ``tell`` hears of each smaller budget. The error of the last attempt is raised if that, too, is too much.
    """
    while True:
        try:
            return work(budget)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or budget <= least:
                raise
        budget = max(least, budget // 2)  # after the handler: its traceback keeps tensors alive
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tell(budget)
