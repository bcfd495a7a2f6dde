"""Hidden states of samples by number: in memory as far as they may be, the rest in a file."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from tunewright.fast._spill_file import SpillFile


class KeptStates:
    """The states [T, D] of each sample, bit for bit as they were given; padding is not kept.

    Up to ``budget`` bytes lie in memory, the others in a file without a name in ``folder``.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget, self.spilled = folder, budget, 0
        self._states: dict[int, Tensor] = {}
        self._like = torch.empty(0, 0)
        self._open = ExitStack()
        self._file: SpillFile | None = None

    def add(self, samples: Sequence[int], lengths: Sequence[int], states_BTD: Tensor) -> None:
        """Keep the first positions of each row. StorageError if they have to go to a disk that is full."""
        rows = [row_TD[:length] for row_TD, length in zip(states_BTD, lengths, strict=True)]
        states_ND = torch.cat(rows).cpu()
        self._like = states_ND.new_empty(0, states_ND.shape[1])
        if states_ND.nbytes <= self.budget:
            self.budget -= states_ND.nbytes
        else:
            states_ND = self._from_file(states_ND)
        self._states.update(zip(samples, torch.split(states_ND, list(lengths)), strict=True))

    def _from_file(self, states_ND: Tensor) -> Tensor:
        """The same, written and mapped: it takes memory only as long as there is some to spare."""
        if self._file is None:
            self._file = self._open.enter_context(SpillFile(self.folder))
        storage = self._file.put(states_ND.untyped_storage()).get(states_ND.device)
        self.spilled += states_ND.nbytes
        return torch.empty(0, dtype=states_ND.dtype).set_(storage, 0, states_ND.shape, states_ND.stride())

    def holds(self, samples: Sequence[int]) -> bool:
        """Whether all of these can be read."""
        return all(sample in self._states for sample in samples)

    def read(self, samples: Sequence[int], positions: int) -> Tensor:
        """[B, T, D] for T ``positions``, on the CPU; zeros are where a sample is shorter."""
        states_BTD = self._like.new_zeros(len(samples), positions, self._like.shape[1])
        for row_TD, sample in zip(states_BTD, samples, strict=True):
            own_TD = self._states[sample]
            row_TD[: len(own_TD)] = own_TD
        return states_BTD

    def row(self, samples: Sequence[int], positions: int) -> Tensor:
        """[1, M, D] for M ``positions``, on the CPU: one sample after another, and zeros after the last."""
        found = [self._states[sample] for sample in samples]
        left = positions - sum(map(len, found))
        return torch.cat([*found, self._like.new_zeros(left, self._like.shape[1])])[None]

    def close(self) -> None:
        """Memory and file are given back."""
        self._states.clear()
        self._open.close()
