"""Activations that memory has no room for wait elsewhere until the backward pass asks for them.

On a GPU that is pinned memory of the host (Rajbhandari et al. 2021, arXiv:2104.07857, section 5.1.2; torch's
``save_on_cpu`` does the same for all of them), on a CPU a file. A storage is moved whole and once, whatever is
a view of it: what comes back has the strides that it had, so that backward passes go the same ways to the same
bits.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from tunewright.core.words import Words
from tunewright.fast import Technique, Work
from tunewright.fast._activations import lasting, room
from tunewright.fast._spill_file import SpillFile, as_bytes
from tunewright.models.memory import storage

_SMALL = 64 << 10
"""Bytes below which moving costs more time than memory is worth."""


class Offload(Technique):
    """Parameters, buffers and what is small stay; of the rest, what is kept first stays, up to the budget."""

    idea = Words(
        "Activations that memory has no room for wait in the host's memory, or on a CPU in a file.",
        "内存放不下的激活值暂存到主机内存；在 CPU 上则暂存到文件。",
    )

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        """Bytes of activations that stay; a share of the free ones if not given."""

    def why_not(self, work: Work) -> str:
        """There must be a place to wait in."""
        return (
            "" if work.device.type in {"cpu", "cuda"} else f"there is no way to move them from {work.device}"
        )

    def not_worth(self, work: Work) -> str:
        """It is for trainings that do not fit otherwise."""
        return "it takes time; ask for it by name where memory is short"

    @contextmanager
    def on(self, work: Work) -> Iterator["Shelf"]:
        """Gives the shelf that all tensors go through which are kept for backward passes."""
        budget = room(work) if self.budget is None else self.budget
        with ExitStack() as stack:
            on_gpu = work.device.type == "cuda"
            shelf = Shelf(
                work, budget, _Pinned if on_gpu else stack.enter_context(SpillFile(work.folder)).put
            )
            stack.callback(work.model.register_forward_pre_hook(shelf.look_again).remove)
            stack.enter_context(saved_tensors_hooks(shelf.pack, shelf.unpack))
            yield shelf


class Held(Protocol):
    """A storage that a backward pass will need; it is let go with the last tensor that is kept of it."""

    size: int

    def get(self, device: torch.device) -> UntypedStorage:
        """The storage, or one of the same bytes."""


class _View(NamedTuple):
    """A kept tensor, as what it is of its storage."""

    held: Held
    dtype: torch.dtype
    offset: int | torch.SymInt
    shape: torch.Size
    stride: tuple[int, ...]


class Shelf:
    """What is kept for backward passes; ``here`` are its bytes that stayed, but for what always does."""

    def __init__(self, work: Work, budget: int, move: Callable[[UntypedStorage], Held]) -> None:
        self.model, self.device, self.budget, self.move = work.model, work.device, budget, move
        self.here = 0
        self._held: WeakValueDictionary[int, Held] = WeakValueDictionary()
        self.look_again()

    @property
    def away(self) -> int:
        """Bytes that were moved and are still needed."""
        return sum(held.size for held in self._held.values()) - self.here

    def look_again(self, *_: Any) -> None:
        """Other techniques may have put parameters elsewhere."""
        self._lasting = lasting(self.model)

    def pack(self, x: Tensor) -> Tensor | _View:
        """The hook for a tensor that is to be kept."""
        if not self._may_move(x):
            return x.detach()  # an operation that kept its own output would never be freed
        number = storage(x)
        held = self._held.get(number)
        if held is None:
            held = self._held[number] = self._hold(x.untyped_storage())
        return _View(held, x.dtype, x.storage_offset(), x.shape, x.stride())

    def _may_move(self, x: Tensor) -> bool:
        plain = type(x) in {Tensor, nn.Parameter} and x.layout is torch.strided and x.device == self.device
        if not plain or x.is_conj() or x.is_neg():
            return False
        return x.untyped_storage().nbytes() >= _SMALL and storage(x) not in self._lasting

    def _hold(self, source: UntypedStorage) -> Held:
        fits = self.here + source.nbytes() <= self.budget
        return _Here(self, source) if fits else self.move(source)

    def unpack(self, kept: Tensor | _View) -> Tensor:
        """The hook for a tensor that a backward pass asks for."""
        if isinstance(kept, Tensor):
            return kept
        own = kept.held.get(self.device)
        return torch.empty(0, dtype=kept.dtype, device=self.device).set_(
            own, kept.offset, kept.shape, kept.stride
        )


class _Here:
    """A storage that stays where it is."""

    def __init__(self, shelf: Shelf, source: UntypedStorage) -> None:
        self._shelf, self._source, self.size = shelf, source, source.nbytes()
        shelf.here += self.size

    def get(self, device: torch.device) -> UntypedStorage:
        return self._source

    def __del__(self) -> None:
        self._shelf.here -= self.size


class _Pinned:
    """A storage of a GPU, in memory of the host that the GPU reads by itself."""

    def __init__(self, source: UntypedStorage) -> None:
        # No other storage gets its number as long as this lives.
        self._number, self.size = StorageWeakRef(source), source.nbytes()  # type: ignore[no-untyped-call]
        # Copies are in the order of the stream, so that the source is read before it is written anew.
        self._host = torch.empty(self.size, dtype=torch.uint8, pin_memory=True)
        self._host.copy_(as_bytes(source), non_blocking=True)

    def get(self, device: torch.device) -> UntypedStorage:
        return self._host.to(device, non_blocking=True).untyped_storage()
