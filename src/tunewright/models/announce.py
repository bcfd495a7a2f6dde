"""How what differs by sample hears of a batch before its forward passes: adapters, and states that were kept.

Tokens alone do not say where a prompt ends, what task a row is of or which sample it is. The model itself carries
who listens, so that this works the same in training, in measuring and for an adapter that was loaded.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

ROUTER = "tunewright_router"
"""The submodule of a model that chooses adapters; it listens."""
_LISTENERS = "tunewright_listeners"
_UNCHANGING = "tunewright_unchanging"


class Listener(Protocol):
    """Keeps what is announced as ``batch``; between announcements that is empty."""

    batch: Mapping[str, Tensor]


@contextmanager
def announced(model: Any, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Forward passes within are over this batch. It changes nothing for a model where no one listens."""
    router = getattr(model, ROUTER, None)
    hearing: list[Any] = [*vars(model).get(_LISTENERS, ()), *([] if router is None else [router])]
    for listener in hearing:
        listener.batch = batch
    try:
        yield
    finally:
        for listener in hearing:
            listener.batch = {}


@contextmanager
def listening(model: Any, listener: Listener) -> Iterator[None]:
    """Within, ``listener`` hears of this model's batches."""
    listeners = vars(model).setdefault(_LISTENERS, [])
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)


@contextmanager
def unchanging(model: Any) -> Iterator[None]:
    """Within, no weight changes: what follows from weights need not be worked out for every pass."""
    vars(model)[_UNCHANGING] = object()
    try:
        yield
    finally:
        del vars(model)[_UNCHANGING]


def stretch(model: Any) -> object | None:
    """Names the stretch of passes within one :func:`unchanging`; None outside of any."""
    found: object | None = vars(model).get(_UNCHANGING)
    return found
