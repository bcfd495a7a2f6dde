"""Samples on disk: tokenized once per file and setting, read by memory map, so data may exceed memory."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tunewright.core import store
from tunewright.core.errors import Problem
from tunewright.core.rng import permutation
from tunewright.data.rows import task_id

Sample = dict[str, np.ndarray]
ORIGIN = "origin"
"""The field of a sample that holds the first and the last line it was made from."""
TASK = "task"
"""The field of a sample that holds the number of its file's task, if that has one."""
SAMPLE = "sample"
"""The field of a training batch that holds which sample of the data each row is, int64 [B]."""
LENGTH = "length"
"""The field of a table that holds its samples' lengths; of a training batch: those of its rows, int64 [B]."""
_SHARD_TOKENS = 8_000_000
_SHARD = "shard-{:05d}.safetensors"
_ENDS = ".ends"


class _Writer:
    """Collects samples and writes a shard whenever enough tokens came together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shards = folder, 0
        self.samples: list[Sample] = []
        self.tokens = 0

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        self.tokens += len(sample["input_ids"])
        if self.tokens >= _SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        if not self.samples:
            return
        arrays = {LENGTH: np.array([len(s["input_ids"]) for s in self.samples], np.int32)}
        for name in self.samples[0]:
            parts = [s[name] for s in self.samples]
            arrays[name] = np.concatenate(parts)
            arrays[name + _ENDS] = np.cumsum([len(p) for p in parts], dtype=np.int64)
        save_file(arrays, self.folder / _SHARD.format(self.shards))
        self.samples, self.tokens, self.shards = [], 0, self.shards + 1


def write(folder: Path, samples: Iterable[Sample | Problem], facts: Callable[[], dict[str, Any]]) -> None:
    """Make a table; the samples' problems go into ``problems.json`` and ``facts()`` into ``facts.json``."""
    with store.artifact(folder) as partial:
        writer, problems = _Writer(partial), []
        for sample in samples:
            if isinstance(sample, Problem):
                problems.append([sample.where, sample.what, sample.fix])
            else:
                writer.add(sample)
        writer.flush()
        store.write_json(partial / "problems.json", problems)
        store.write_json(partial / "facts.json", facts())


class TokenTable(Sequence[Sample]):
    """The samples of one tokenized file. ``lengths`` int32 [N] is in memory, the tokens are mapped.

    ``facts`` is what :func:`write` was given; ``problems`` are the rows that could not be used.
    """

    def __init__(self, folder: Path, source: str = "") -> None:
        self.folder, self.source = folder, source or folder.name
        self.facts: dict[str, Any] = store.read_json(folder / "facts.json")
        self.problems = [Problem(*p) for p in store.read_json(folder / "problems.json")]
        paths = sorted(folder.glob("shard-*.safetensors"))
        self._shards: list[Any] = [safe_open(path, framework="numpy") for path in paths]
        lengths = [shard.get_tensor(LENGTH) for shard in self._shards]
        self._starts = np.cumsum([0, *map(len, lengths)])
        self.lengths = np.concatenate([np.empty(0, np.int32), *lengths])
        self._ends = [_ends(shard) for shard in self._shards]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        k = bisect_right(self._starts, index) - 1
        row = int(index) - int(self._starts[k])
        sample = {}
        for field, ends in self._ends[k].items():
            start = int(ends[row - 1]) if row else 0
            sample[field] = self._shards[k].get_slice(field)[start : int(ends[row])]
        return sample

    def column(self, field: str) -> np.ndarray:
        """A field of all samples, one after another."""
        return np.concatenate([np.empty(0, np.int64), *(shard.get_tensor(field) for shard in self._shards)])

    def where(self, index: int) -> str:
        """The sample's place for people: ``my.jsonl:3``, ``book.txt:10-14``, or its number among the samples."""
        lines = self[index].get(ORIGIN)
        if lines is None:
            return f"{self.source}: sample {index + 1}"
        first, last = int(lines[0]), int(lines[-1])
        return f"{self.source}:{first}" + (f"-{last}" if last > first else "")


def _ends(shard: Any) -> dict[str, np.ndarray]:
    """For each field, where in the shard's tokens each sample ends."""
    fields = [key.removesuffix(_ENDS) for key in list(shard.keys()) if key.endswith(_ENDS)]
    return {field: shard.get_tensor(field + _ENDS) for field in fields}


class Mixture(Sequence[Sample]):
    """Several tables with weights, as one; indices run over all tables' samples in order.

    ``tasks`` names each table's task, empty for none; it is no part of a table, so that one may serve several.
    """

    def __init__(
        self,
        tables: Sequence[TokenTable],
        weights: Sequence[float],
        seed: int = 0,
        tasks: Sequence[str] = (),
    ) -> None:
        self.tables, self.weights, self.seed = list(tables), list(weights), seed
        self.tasks = list(tasks) or [""] * len(tables)
        named = (task_id(task) for task in self.tasks)
        self._tasks = [{TASK: np.array([number], np.int64)} if number else {} for number in named]
        self._starts = np.cumsum([0, *map(len, self.tables)])
        self.lengths = np.concatenate([np.empty(0, np.int32), *(t.lengths for t in self.tables)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        k, own = self._place(int(index))
        return self.tables[k][own] | self._tasks[k]

    def _place(self, index: int) -> tuple[int, int]:
        """Which table, and where in it."""
        k = bisect_right(self._starts, index) - 1
        return k, index - int(self._starts[k])

    def where(self, index: int) -> str:
        """The sample's place for people."""
        k, own = self._place(index)
        return self.tables[k].where(own)

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of this epoch's samples (int64, unordered): each table's, weight times."""
        return np.concatenate([self._weighted(k, epoch) for k in range(len(self.tables))])

    def _weighted(self, k: int, epoch: int) -> np.ndarray:
        own = np.arange(self._starts[k], self._starts[k + 1])
        whole, part = divmod(self.weights[k], 1.0)
        picked = permutation(self.seed, f"weight-{k}", epoch, len(own))[: ceil(round(part * len(own), 6))]
        return np.concatenate([np.tile(own, int(whole)), own[picked]])

    @property
    def problems(self) -> list[Problem]:
        """Rows that could not be used, of all tables."""
        return [problem for table in self.tables for problem in table.problems]


def take(table: Sequence[Sample], indices: Iterable[int]) -> Iterator[Sample]:
    """The samples at these indices."""
    return (table[int(i)] for i in indices)
