"""What there is to know of data before it is tokenized for a run: rows, kind, lengths, tasks."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.core import store
from tunewright.core.errors import DamagedError, Problem
from tunewright.core.paths import cache_folder
from tunewright.core.units import chunks
from tunewright.data import formats, lint, prepare
from tunewright.data.rows import Row, Source
from tunewright.recipes.schema import DataFile

_VERSION = 1
_WIDE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff]")
_PER_TOKEN, _WIDE_PER_TOKEN = 4.0, 1.5
"""Characters of a token, Latin and Chinese, where no tokenizer is at hand: what vocabularies of 30,000 to 150,000 make
of plain text."""
_MOST_LABELS = 100
_AT_ONCE = 1000


@dataclass(frozen=True)
class Facts:
    """Of all training files together. Lengths are of a row as it is trained on, in tokens."""

    rows: int
    tokens: int
    """In an epoch; both answers of a pair count, with their question."""
    median: int
    p95: int
    longest: int
    kind: str = "conversations"
    """conversations, texts, pairs or labels: what most rows are."""
    duplicates: int = 0
    problems: int = 0
    """Rows that lint finds fault with."""
    tasks: tuple[str, ...] = ()
    """Names that files give their rows."""
    labels: tuple[str, ...] = ()
    counted: bool = False
    """Whether tokens were counted by the model's tokenizer; else they are estimated from characters."""
    assumed: bool = False
    """Whether there is no data, and these are figures to plan with."""
    sha256: tuple[str, ...] = ()
    """Of the files."""


def assume(rows: int = 10_000, length: int = 1024) -> Facts:
    """Figures to plan with where there is no data: rows that are half as long as the longest, in the middle."""
    return Facts(rows, rows * length // 2, length // 2, length, length, assumed=True)


def look(files: Sequence[DataFile], folder: Path | None) -> Facts:
    """Read every row once; what was found is kept by the files' content.

    ``folder`` is the model's: its tokenizer.json counts tokens, else they are estimated.

    Raises:
        DataError: files that are not there or cannot be read.
    """
    sources = prepare.sources(files)
    hashes = tuple(store.sha256_file(source.path) for source in sources)
    tokenizer = folder / "tokenizer.json" if folder and (folder / "tokenizer.json").is_file() else None
    asked = [(s.format, s.columns, s.tags, s.task, s.weight) for s in sources]
    key = [_VERSION, hashes, asked, store.sha256_file(tokenizer) if tokenizer else ""]
    place = cache_folder() / "advice" / f"{store.sha256_json(key)}.json"
    with suppress(DamagedError, KeyError, TypeError):
        kept: dict[str, Any] = store.read_record(place)["facts"]
        kept = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
        return Facts(**kept)
    found = _read(sources, tokenizer, hashes)
    store.write_record(place, {"facts": asdict(found)})
    return found


def _read(sources: Iterable[Source], tokenizer: Path | None, hashes: tuple[str, ...]) -> Facts:
    ruler = _Counted(tokenizer) if tokenizer else _Estimated()
    lengths: list[int] = []
    kinds = dict.fromkeys(("conversations", "texts", "pairs", "labels"), 0)
    labels: set[str] = set()
    tasks: list[str] = []
    tokens, duplicates, problems = 0.0, 0, 0
    for source in sources:
        if source.task and source.task not in tasks:
            tasks.append(source.task)
        for some in chunks(lint.check(formats.read(source)), _AT_ONCE):
            rows = [row for row in some if isinstance(row, Row)]
            same = sum(isinstance(p, Problem) and p.what.startswith("same as") for p in some)
            duplicates, problems = duplicates + same, problems + len(some) - len(rows) - same
            sizes = ruler.lengths([text for row in rows for text in _texts(row)])
            for row in rows:
                own = [next(sizes) for _ in _texts(row)]
                lengths.append(max(own))
                tokens += sum(own) * source.weight
                kinds[_kind(row)] += 1
                if row.label and len(labels) < _MOST_LABELS:
                    labels.add(row.label)
    lengths.sort()
    median, p95, longest = (_quantile(lengths, share) for share in (50, 95, 100))
    return Facts(
        len(lengths), round(tokens), median, p95, longest, max(kinds, key=lambda name: kinds[name]), duplicates,
        problems, tuple(tasks), tuple(sorted(labels)), tokenizer is not None, sha256=hashes,
    )  # fmt: skip


def _quantile(lengths: Sequence[int], percent: int) -> int:
    """Of sorted lengths; 0 where there are none."""
    return lengths[min(len(lengths) - 1, len(lengths) * percent // 100)] if lengths else 0


def _kind(row: Row) -> str:
    if row.compares:
        return "pairs"
    if row.label:
        return "labels"
    return "conversations" if row.messages else "texts"


def _texts(row: Row) -> list[str]:
    """The sequences that a row becomes: one, or the question with either answer."""
    asked = "\n".join(message.content for message in (row.prompt if row.compares else row.messages))
    if row.compares:
        return [f"{asked}\n{row.chosen}", f"{asked}\n{row.rejected}"]
    return [asked or row.text]


class _Estimated:
    """Lengths from characters."""

    def lengths(self, texts: Sequence[str]) -> Iterator[int]:
        """Tokens of each text, rounded up."""
        for text in texts:
            wide = len(_WIDE.findall(text))
            yield int((len(text) - wide) / _PER_TOKEN + wide / _WIDE_PER_TOKEN) + 1


class _Counted:
    """Lengths by the model's own tokenizer, without its chat template."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()

    def lengths(self, texts: Sequence[str]) -> Iterator[int]:
        """Tokens of each text."""
        return (
            len(found.ids) for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        )
