"""Storages in a file, read as memory is: the system keeps as much of it in memory as there is room for."""

import mmap
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from tunewright.core import store


class SpillFile:
    """A file without a name, gone once it is closed, also if the process is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.live = self.end = 0
        """Storages that are in it, and where the next one goes."""

    def __enter__(self) -> "SpillFile":
        with store.storing(self.folder):
            store.disk.make_folder(self.folder)
            self._file = TemporaryFile(dir=self.folder, buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, source: UntypedStorage) -> "Spilled":
        """Write a storage. StorageError if the disk is full."""
        first, end, left = self.end, self.end + source.nbytes(), _buffer(source)
        with store.storing(self.folder):
            while left:
                left = left[os.pwrite(self._file.fileno(), left, end - len(left)) :]
        self.end = end + -end % mmap.ALLOCATIONGRANULARITY
        return Spilled(self, source, first)

    def map(self, first: int, size: int) -> "_Mapping":
        """A part of it as memory; what is written to that does not reach the file."""
        return _Mapping(self._file.fileno(), size, access=mmap.ACCESS_COPY, offset=first)

    def let_go(self) -> None:
        """One storage fewer; when the last of a pass is gone, the next pass begins at the front."""
        self.live -= 1
        if not self.live:
            self.end = 0


class _Mapping(mmap.mmap):
    """Keeps what it maps from being written over."""

    held: "Spilled"


class Spilled:
    """A storage in the file."""

    def __init__(self, file: SpillFile, source: UntypedStorage, first: int) -> None:
        # No other storage gets its number as long as this lives.
        self._number = StorageWeakRef(source)  # type: ignore[no-untyped-call]
        self._file, self._first, self.size = file, first, source.nbytes()
        file.live += 1

    def get(self, device: torch.device) -> UntypedStorage:
        mapping = self._file.map(self._first, self.size)
        mapping.held = self
        mapping.madvise(mmap.MADV_WILLNEED)
        return torch.frombuffer(mapping, dtype=torch.uint8).untyped_storage()

    def __del__(self) -> None:
        self._file.let_go()


def as_bytes(source: UntypedStorage) -> Tensor:
    """All of a storage [its bytes] as one tensor of uint8, without a copy."""
    return torch.empty(0, dtype=torch.uint8, device=source.device).set_(source)


def _buffer(source: UntypedStorage) -> memoryview:
    numbers: Any = as_bytes(source).numpy()
    return memoryview(numbers)
