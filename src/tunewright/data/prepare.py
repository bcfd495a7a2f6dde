"""From the recipe's data section to token tables: lint, split, tokenize, remember."""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.core import lock, store
from tunewright.core.errors import DataError, Problem, UserError, nearest
from tunewright.core.paths import cache_folder, given
from tunewright.data import builtin, formats, lint, readers
from tunewright.data.rows import Row, Source
from tunewright.data.tokens import Mixture, Sample, TokenTable, write
from tunewright.recipes import DataConfig
from tunewright.recipes.schema import DataFile

Encode = Callable[[Iterable[Row]], Iterator[Sample | Problem]]
Progress = Callable[[str, int], None]
_FORMAT_VERSION = 3
"""Raised when what a table holds changes, so that older ones are not read."""
_EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 1 << 30)


def sources(files: Iterable[DataFile]) -> list[Source]:
    """The recipe's files as sources: built-in data written out, folders expanded. DataError if absent."""
    found: list[Source] = []
    problems: list[Problem] = []
    for file in files:
        try:
            found += formats.sources([_source(file)])
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


def _source(file: DataFile) -> Source:
    if file.path.startswith("builtin:"):
        name = file.path.removeprefix("builtin:")
        return Source(_builtin(name), weight=file.weight, task=file.task)
    columns, tags = tuple(file.columns.items()), tuple(file.tags.items())
    try:
        path = given(file.path, "data")
    except UserError as error:
        raise DataError(error.problems) from None
    return Source(path, file.format, columns, tags, file.weight, file.task)


def _builtin(name: str) -> Path:
    """A built-in source as a JSONL file in the cache, made once for each version of its generator."""
    if name not in builtin.SOURCES:
        raise DataError(
            Problem("data", f"there is no built-in data {name!r}", nearest(name, builtin.SOURCES))
        )
    folder = cache_folder() / "builtin" / builtin.version() / name
    lock.once(folder, lambda: _write_builtin(folder, name))
    return folder / f"{name}.jsonl"


def _write_builtin(folder: Path, name: str) -> None:
    with store.artifact(folder) as partial:
        store.write_lines(partial / f"{name}.jsonl", builtin.rows(name))


@dataclass(frozen=True)
class Preparation:
    """How rows become samples. ``key`` says all that changes the outcome, besides the file itself."""

    encode: Encode
    key: dict[str, Any]
    on_bad_row: str
    progress: Progress = lambda name, rows: None

    def table(self, source: Source, split: str, share: float) -> TokenTable:
        """The file's token table: from the cache, else made now. DataError lists every bad row."""
        facts = {
            "sha256": store.sha256_file(source.path), "format": source.format, "columns": source.columns,
            "ending": readers.extension(source.path), "tags": source.tags, "split": split, "share": share,
            "on_bad_row": self.on_bad_row, "version": _FORMAT_VERSION,
        }  # fmt: skip
        folder = cache_folder() / "tokens" / store.sha256_json({**self.key, **facts})
        lock.once(folder, lambda: self._make(folder, source, split, share))
        return TokenTable(folder, str(source.path))

    def _make(self, folder: Path, source: Source, split: str, share: float) -> None:
        tally = lint.Tally()
        checked = lint.check(formats.read(source))
        kept = tally.watch(row for row in checked if _side(row, share) == split)
        origin = {"path": str(source.path), "sha256": store.sha256_file(source.path)}
        write(folder, self._samples(source, kept), lambda: {**origin, **tally.facts()})

    def _samples(self, source: Source, rows: Iterable[Row | Problem]) -> Iterator[Sample | Problem]:
        """Samples, and the problems that lint and encoding found; DataError at the end if those must stop."""
        problems: list[Problem] = []
        for sample in self.encode(self._counted(source, rows, problems)):
            if isinstance(sample, Problem):
                problems.append(sample)
            else:
                yield sample
        if problems and self.on_bad_row == "stop":
            raise DataError(problems)
        yield from problems

    def _counted(
        self, source: Source, rows: Iterable[Row | Problem], problems: list[Problem]
    ) -> Iterator[Row]:
        for count, row in enumerate(rows, 1):
            if isinstance(row, Problem):
                problems.append(row)
            else:
                yield row
            if count % 1000 == 0:
                self.progress(source.path.name, count)


def _digest(row: Row) -> int:
    """64 bits that depend on what the row says, not on where it stands."""
    words = repr((row.messages, row.text)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "little")


def _side(row: Row | Problem, share: float) -> str:
    """``valid`` for a share of rows, ``train`` for the others and for all problems, so that each is told once.

    Equal rows fall on the same side, so none leaks across.
    """
    if isinstance(row, Problem):
        return "train"
    return "valid" if _digest(row) < share * 2**64 else "train"


def split_share(data: DataConfig) -> float:
    """The share of training rows that is held out: none if the recipe names held-out files."""
    return 0.0 if data.valid else data.valid_share


def held_out_rows(data: DataConfig, limit: int) -> list[Row]:
    """At most ``limit`` held-out conversations, drawn by content, in a stable order."""
    share = split_share(data)
    files, split = (data.valid, "train") if data.valid else (data.train, "valid")
    if not data.valid and not share:
        return []
    rows = (_of_task(row, source) for source in sources(files) for row in lint.check(formats.read(source)))
    good = (
        row
        for row in rows
        if isinstance(row, Row) and (row.answered or row.compares) and row.liked is not False
    )
    spoken = (row for row in good if _side(row, share) == split)
    drawn = heapq.nsmallest(limit, spoken, key=_digest)
    return [row if row.answered else row.answering(row.chosen) for row in drawn]


def _of_task(row: Row | Problem, source: Source) -> Row | Problem:
    """The row with its file's task; scores are told by task where rows name no family."""
    if isinstance(row, Problem) or not source.task:
        return row
    return replace(row, task=source.task, family=row.family or source.task)


@dataclass(frozen=True)
class Replayed:
    """Old files that shall make up a share of the training samples."""

    files: tuple[DataFile, ...]
    share: float


def mixture(
    preparation: Preparation, data: DataConfig, seed: int, replayed: Sequence[Replayed] = ()
) -> tuple[Mixture, Mixture]:
    """Training and held-out samples. DataError lists every bad row of every file."""
    share = split_share(data)
    problems: list[Problem] = []
    wanted = [(data.train, "train", share)]
    wanted += [(data.valid, "train", 0.0)] if data.valid else [(data.train, "valid", share)] if share else []
    made: list[Mixture] = []
    for files, split, part in wanted:
        tables, weights, tasks = [], [], []
        for source in sources(files):
            try:
                tables.append(preparation.table(source, split, part))
                weights.append(source.weight)
                tasks.append(source.task)
            except DataError as error:
                problems += error.problems
        made.append(Mixture(tables, weights, seed, tasks))
    try:
        made[0] = _with(made[0], replayed, preparation)
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(problems)
    if not len(made[0]):
        what = "no sample is left to train on"
        left_out = [problem for part in made for problem in part.problems]
        raise DataError([Problem("data.train", what, "lower data.valid_share or add rows"), *left_out])
    return made[0], made[1] if len(made) > 1 else Mixture([], [], seed)


def _with(new: Mixture, replayed: Sequence[Replayed], preparation: Preparation) -> Mixture:
    """The new samples and so many of the old ones that these have their shares of all."""
    tables, weights, tasks = list(new.tables), list(new.weights), list(new.tasks)
    count = sum(weight * len(table) for table, weight in zip(new.tables, new.weights, strict=True))
    left = 1 - sum(old.share for old in replayed)
    for old in replayed:
        found = [(preparation.table(source, "train", 0.0), source) for source in sources(old.files)]
        there = sum(source.weight * len(table) for table, source in found)
        tables += [table for table, _ in found]
        weights += [source.weight * old.share / left * count / there for _, source in found] if there else []
        tasks += [source.task for _, source in found]
    return Mixture(tables, weights, new.seed, tasks) if replayed else new


def statistics(data: Mixture) -> dict[str, Any]:
    """What the report says of a data set: counts, lengths, lint's tallies."""
    counts, _ = np.histogram(data.lengths, _EDGES)
    return {
        "samples": len(data),
        "tokens": int(data.lengths.sum()),
        "longest": int(data.lengths.max()) if len(data) else 0,
        "lengths": [{"from": a, "below": b, "samples": int(n)}
                    for a, b, n in zip(_EDGES, _EDGES[1:], counts, strict=False)],
        "skipped": [str(p) for p in data.problems],
        "files": [table.facts for table in data.tables],
    }  # fmt: skip
