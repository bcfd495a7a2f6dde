"""What ends or bends a run in time: signals, numbers that are not finite, losses that jump, memory that ends."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tunewright.core.errors import HardwareError, InterruptedRunError, Problem
from tunewright.core.machine import available_memory
from tunewright.models import anatomy, likelihood
from tunewright.models.memory import is_out_of_memory

Result = TypeVar("Result")

WINDOW = 64
"""Losses that a new one is compared with."""
_ENOUGH = 32
"""Losses before any is called a spike: the first steps fall too fast to compare."""
_SPREADS = 10.0
_FLOOR = 0.25
PATIENCE = 3
"""Spikes in a row that skipping is tried on; then the weights themselves are taken to be bad."""
ROLLBACKS = 2
"""Times that training goes back to a checkpoint before it gives up."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Preemption:
    """SIGINT and SIGTERM while a run goes on.

    Where the run is ``patient`` the signal is only noted in ``asked``, and the loop ends itself after its step
    with a checkpoint of it; elsewhere the run ends at once. A second signal changes nothing.
    """

    lasting = False
    """Whether the process ends with its run: signals after the first are then ignored to its very end."""

    def __init__(self) -> None:
        self.asked = 0
        self._patient = False

    def __enter__(self) -> "Preemption":
        main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
        self._before = {s: signal.signal(s, self._handle) for s in _SIGNALS} if main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.asked and self.lasting else handler)

    def _handle(self, number: int, _: Any) -> None:
        if self.asked:
            return
        self.asked = number
        if not self._patient:
            self._stop()
        os.write(2, b"\nstopping after this step, with a checkpoint of it\n")

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Within, signals wait; on leaving, one that came ends the run."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
        if self.asked:
            self._stop()

    def _stop(self) -> None:
        name = signal.Signals(self.asked).name
        message = f"stopped by {name}; what was done is kept, and the same command goes on from there"
        raise InterruptedRunError(self.asked, message)


def is_spike(recent: Sequence[float], loss: float) -> bool:
    """Whether a loss stands out from those before it, its trend taken away (a median slope, Theil 1950).

    It must lie ten robust standard deviations (1.4826 times the median absolute deviation) above the trend, at
    least 0.25 above it, and half as far again as any loss of the window does. Hard batches that come up now and
    then are in the window, so they are not spikes; a batch of noise is.
    """
    if len(recent) < _ENOUGH:
        return False
    losses, steps = np.array(recent), np.arange(len(recent))
    later, earlier = np.tril_indices(len(recent), -1)
    slope = np.median((losses[later] - losses[earlier]) / (later - earlier))
    above = losses - slope * steps
    middle = np.median(above)
    spread = 1.4826 * np.median(np.abs(above - middle))
    bound = max(_SPREADS * spread, _FLOOR, 1.5 * (above.max() - middle))
    return bool(loss - slope * len(recent) > middle + bound)


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity; one pass over each."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    # The sum of squares is ten times as fast as the largest magnitude, and finite only if all numbers are; where it
    # overflows, the largest magnitude decides.
    for measure in (_squares, _largest):
        found = [measure(tensor).float() for _, tensor in named]
        good = torch.isfinite(torch.stack(found)).tolist() if found else []
        named = [pair for pair, is_good in zip(named, good, strict=True) if not is_good]
    return [name for name, _ in named]


def _squares(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    sums: Tensor = torch.dot(flat, flat) if tensor.dtype == torch.float32 else torch.linalg.vector_norm(flat)
    return sums


def _largest(tensor: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(tensor, float("inf"))
    return largest


def is_roomy(model: Any, tokens: int) -> bool:
    """Whether learning from so many tokens at once leaves half of the free memory of a CPU free, at the very most.

    What every linear layer reads and writes is counted as kept, and as much again for what lies between; four times
    the logits in fp32 where they are made, a gradient and two moments. Plain training keeps 55 to 95 % of that.
    """
    parameters = list(model.parameters())
    stacked = any(p.dim() > 2 for p in parameters)  # experts in one tensor are no linear layers
    # With dropout attention keeps its scores.
    drops = any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())
    if stacked or drops or parameters[0].device.type != "cpu":
        return False
    kept = anatomy.numbers_per_token(anatomy.linears(model)) * parameters[0].element_size()
    head = anatomy.output_head(model) if likelihood.is_plain(model) else None
    vocabulary = len(getattr(head, "weight", ()))
    learned = sum(p.numel() for p in parameters if p.requires_grad)
    return bool(tokens * (2 * kept + 16 * vocabulary) + 12 * learned < available_memory() / 2)


@contextmanager
def one_sample_fits(where: str, longest: int, fix: str = "lower data.max_length") -> Iterator[None]:
    """Within, what is out of memory cannot be cut any smaller: HardwareError. ``longest`` is in tokens."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"one sample alone is too much for the memory; the longest has {longest} tokens"
        raise HardwareError(Problem(where, what, fix)) from error
