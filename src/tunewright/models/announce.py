"""How adapters that differ by sample hear of a batch before its forward passes.

Tokens alone do not say where a prompt ends or what task a row is of. The model itself carries the router, so that
this works the same in training, in measuring and for an adapter that was loaded.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

ROUTER = "tunewright_router"
"""The submodule of a model that chooses adapters; it keeps what is announced as ``batch``."""


@contextmanager
def announced(model: Any, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Forward passes within are over this batch. It changes nothing for a model without a router."""
    router = getattr(model, ROUTER, None)
    if router is None:
        yield
        return
    router.batch = batch
    try:
        yield
    finally:
        router.batch = {}
