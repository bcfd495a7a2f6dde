"""Files to records: every value with the line it begins on, and a Problem for what cannot be read.

Nothing here knows the shape of a row. ``.jsonl``, ``.txt``, ``.csv`` and ``.parquet`` are streamed; a
``.json`` array is held as text and parsed one element at a time, so that each row has its own line number.
"""

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from tunewright.core.errors import DataError, Problem, UserError, nearest
from tunewright.core.paths import given

Record = tuple[int, Any]
"""The line a value begins on (in Parquet: the row's number), and the value."""

EXTENSIONS = (".json", ".jsonl", ".txt", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".txt.gz")
SAVE_AS_UTF8 = "save the file as UTF-8"

# Ceilings that keep memory bounded on a file without line ends or with a quote that is never closed.
LONGEST_LINE = 64 << 20
LONGEST_PARAGRAPH = 1 << 16
_BATCH = 256

_UNREADABLE = (OSError, EOFError, zlib.error)
# What Arrow's values become in Python may not exist there: dates too late, bytes that are no text.
_UNCONVERTIBLE = (ValueError, OverflowError, TypeError, KeyError)
_NOT_SPACE = re.compile(r"[^ \t\r\n]")
_DECODER = json.JSONDecoder()
# What ``surrogateescape`` makes of bytes that are not UTF-8; text that is UTF-8 cannot contain these.
_ESCAPED = re.compile("[\udc80-\udcff]")


def extension(path: Path) -> str:
    """The known ending of a file's name, as in :data:`EXTENSIONS`; empty if there is none."""
    return max((e for e in EXTENSIONS if path.name.lower().endswith(e)), key=len, default="")


def absent(path: Path) -> Problem:
    """The problem of a file that is not there, with the nearest name beside it."""
    if not path.parent.is_dir():
        return Problem(str(path), f"no such file; nor is there a folder {path.parent}", "check the path")
    names = [p.name for p in path.parent.iterdir() if p.is_dir() or extension(p)]
    close = get_close_matches(path.name, names, n=10, cutoff=0.3)
    return Problem(str(path), "no such file", nearest(path.name, close) if close else "check the path")


def check_file(path: Path) -> str:
    """The file's extension; DataError if it is absent, no plain file, of an unknown kind or empty."""
    try:
        given(str(path), "data")
    except UserError as error:
        raise DataError(error.problems) from None
    if path.is_dir():
        raise DataError(Problem(str(path), "a folder, expected a file", "name a file in it"))
    if path.exists() and not path.is_file():
        raise DataError(Problem(str(path), "a pipe or a device, expected a file", "write it to a file first"))
    if not path.is_file():
        raise DataError(absent(path))
    if not (ending := extension(path)):
        what = f"unknown extension {''.join(path.suffixes[-2:]) or 'none'!r}"
        raise DataError(Problem(str(path), what, f"use {', '.join(EXTENSIONS)}"))
    if path.stat().st_size == 0:
        raise DataError(empty(path))
    return ending


def empty(path: Path) -> Problem:
    """The problem of a file without rows."""
    return Problem(str(path), "the file is empty, expected at least one row", "add rows or drop the file")


def unopened(path: Path, error: OSError) -> Problem:
    """The problem of a path that the system refuses."""
    return Problem(
        str(path)[:200], f"cannot be opened ({error.strerror})", "check the path and who may read it"
    )


def records(path: Path) -> Iterator[Record | Problem]:
    """Every value of a file in order; ``.txt`` is read as one JSON value a line."""
    readers = {".json": _json, ".csv": _csv, ".parquet": _parquet}
    return readers.get(extension(path).removesuffix(".gz"), _jsonl)(path)


def lines(path: Path) -> Iterator[tuple[int, str] | Problem]:
    """Every line as ``(number, text)`` without its line end; Problems for those that are not UTF-8."""
    for item in _numbered(path):
        yield item if isinstance(item, Problem) else _decoded(path, *item)


def _numbered(path: Path) -> Iterator[tuple[int, bytes | None] | Problem]:
    """Every line's number and bytes, None if it is too long; at last a Problem if the file is damaged."""
    number = 0
    with _open(path) as file:
        try:
            for number, raw in enumerate(_raw_lines(file), 1):
                yield number, raw
        except _UNREADABLE as error:
            what = f"cannot be read from here on ({error})"
            yield Problem(f"{path}:{number + 1}", what, "fetch the file again")


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _raw_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The file's lines; None for one above the ceiling, whose rest is passed over."""
    while raw := file.readline(LONGEST_LINE):
        if len(raw) < LONGEST_LINE or raw.endswith(b"\n"):
            yield raw
            continue
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(LONGEST_LINE)
        yield None


def _decoded(path: Path, number: int, raw: bytes | None) -> tuple[int, str] | Problem:
    if raw is None:
        what = f"the line is longer than {LONGEST_LINE >> 20} MB"
        return Problem(f"{path}:{number}", what, "write one row a line, or split the row")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return _not_utf8(path, number, raw[error.start])
    return number, (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")


def _not_utf8(path: Path, number: int, byte: int) -> Problem:
    return Problem(f"{path}:{number}", f"byte 0x{byte:02x} is not UTF-8", SAVE_AS_UTF8)


def _jsonl(path: Path) -> Iterator[Record | Problem]:
    for line in lines(path):
        if isinstance(line, Problem):
            yield line
        elif line[1] and not line[1].isspace():
            yield _parsed(path, *line)


def _parsed(path: Path, number: int, text: str) -> Record | Problem:
    try:
        return number, json.loads(text)
    except (ValueError, RecursionError) as error:
        return _not_json(f"{path}:{number}", error, "write one JSON object a line")


def _not_json(where: str, error: Exception, fix: str) -> Problem:
    if isinstance(error, json.JSONDecodeError):
        return Problem(where, f"not JSON: {error.msg} at column {error.colno}", fix)
    return Problem(where, f"not JSON that can be read: {error}", fix)


def _json(path: Path) -> Iterator[Record | Problem]:
    return _jsonl(path) if _is_one_object_a_line(path) else _values(path)


def _is_one_object_a_line(path: Path) -> bool:
    """Whether a ``.json`` file is JSONL: its first line that is not blank is a whole object."""
    for line in lines(path):
        if isinstance(line, Problem):
            return False
        if text := line[1].strip():
            return text.startswith("{") and text.endswith("}")
    return False


def _values(path: Path) -> Iterator[Record | Problem]:
    try:
        with _open(path) as file:
            cursor = _Cursor(path, file.read())
    except _UNREADABLE as error:
        yield Problem(f"{path}:1", f"cannot be read ({error})", "fetch the file again")
        return
    try:
        yield from cursor.array() if cursor.skip() == "[" else cursor.sequence()
    except (ValueError, RecursionError) as error:
        yield cursor.problem(error)


class _Cursor:
    """A place in a JSON text, and the line it is on."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.at, self.line = path, 0, 1
        self.text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        self.damaged = not self.text.isascii() and _ESCAPED.search(self.text) is not None

    def problem(self, error: Exception) -> Problem:
        """What is wrong where no value could be read."""
        line, fix = self.line, "mend it; rows after it were not read"
        if isinstance(error, json.JSONDecodeError):
            line, rest = error.lineno, self.text[error.pos :]
            if not rest or rest.isspace():
                last = 1 + self.text.rstrip().count("\n")
                return Problem(f"{self.path}:{last}", "not JSON: the file ends too early", fix)
        return _not_json(f"{self.path}:{line}", error, fix)

    def move(self, at: int) -> None:
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def skip(self) -> str:
        """Pass white space; the character after it, empty at the end."""
        found = _NOT_SPACE.search(self.text, self.at)
        self.move(found.start() if found else len(self.text))
        return found[0] if found else ""

    def value(self) -> Record | Problem:
        """The JSON value that begins here; JSONDecodeError if none does."""
        start, line = self.at, self.line
        value, end = _DECODER.raw_decode(self.text, start)
        self.move(end)
        bad = _ESCAPED.search(self.text, start, end) if self.damaged else None
        if bad:
            line += self.text.count("\n", start, bad.start())
            return _not_utf8(self.path, line, ord(bad[0]) - 0xDC00)
        return line, value

    def sequence(self) -> Iterator[Record | Problem]:
        """Values one after another, up to the end of the text."""
        while self.skip():
            yield self.value()

    def array(self) -> Iterator[Record | Problem]:
        """The elements of the array that begins here, which must be all that the text holds."""
        self.at += 1
        more = self.skip() != "]"
        while more:
            self.skip()
            yield self.value()
            more = self.skip() == ","
            self.at += more
        if self.skip() != "]":
            raise json.JSONDecodeError("expected ',' or ']' after a row", self.text, self.at)
        self.at += 1
        if self.skip():
            raise json.JSONDecodeError("text after the closing ']'", self.text, self.at)


def _csv(path: Path) -> Iterator[Record | Problem]:
    csv.field_size_limit(LONGEST_LINE)  # the module's own limit, 128 K, is shorter than long answers
    cells = _cells(path)
    header = next(cells, None)
    if header is None:
        return
    if isinstance(header, Problem):
        yield replace(header, what=f"{header.what}; without a header no row was read")
        return
    if twice := _named_twice(header[1]):
        yield Problem(f"{path}:{header[0]}", twice, "rename one of them; no row was read")
        return
    for item in cells:
        yield item if isinstance(item, Problem) else _named(path, header[1], *item)


def _named_twice(names: list[str]) -> str:
    """What is wrong with columns of which a row could keep only one; empty if nothing is."""
    twice = sorted(name for name, count in Counter(names).items() if name and count > 1)
    return f"the column {twice[0][:60]!r} is there twice" if twice else ""


class _Feed:
    """Lines for the csv module, which cannot be handed Problems: the first of each row is put aside."""

    def __init__(self, path: Path) -> None:
        self._path, self._lines = path, _numbered(path)
        self.problem: Problem | None = None

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        item = next(self._lines)
        line = item if isinstance(item, Problem) else _decoded(self._path, *item)
        if not isinstance(line, Problem):
            return line[1] + "\n"
        self.problem = self.problem or line
        # The bytes still say where quotes open and close, on which the rows after this one depend.
        raw = None if isinstance(item, Problem) else item[1]
        return (raw or b"").decode(errors="replace").rstrip("\r\n") + "\n"


def _cells(path: Path) -> Iterator[tuple[int, list[str]] | Problem]:
    """Each row's cells with the line the row begins on, which is not its last when a cell holds line ends."""
    feed = _Feed(path)
    reader = csv.reader(feed, strict=True)  # else a quote that is never closed swallows the rows after it
    cells: list[str] | None = []
    while cells is not None:
        start, feed.problem = reader.line_num + 1, None
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield feed.problem or _not_csv(path, start, reader.line_num, error)
            continue
        if feed.problem:
            yield feed.problem
        elif cells:
            yield start, cells


def _not_csv(path: Path, start: int, end: int, error: csv.Error) -> Problem:
    through = f" from here to line {end}" if end > start else ""
    fix = "quote the cell with double quotes, and write those in it twice"
    return Problem(f"{path}:{start}", f"not CSV{through}: {error}", fix)


def _named(path: Path, header: list[str], line: int, cells: list[str]) -> Record | Problem:
    if len(cells) == len(header):
        return line, dict(zip(header, cells, strict=True))
    what = f"{len(cells)} cells, expected {len(header)} as in the header"
    return Problem(f"{path}:{line}", what, "quote cells that hold commas, quotes or line ends")


def _parquet(path: Path) -> Iterator[Record | Problem]:
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            if twice := _named_twice(file.schema_arrow.names):
                yield Problem(f"{path}:1", twice, "rename one of them; no row was read")
                return
            for row in chain.from_iterable(map(_rows, file.iter_batches(batch_size=_BATCH))):
                number += 1
                yield _unreadable_row(path, number, row) if isinstance(row, Exception) else (number, row)
            if number != file.metadata.num_rows:
                raise arrow.ArrowInvalid(f"it promises {file.metadata.num_rows} rows and holds {number}")
    except (arrow.ArrowException, OSError, *_UNCONVERTIBLE) as error:
        what = f"not Parquet that can be read from here on ({_first_line(error)})"
        yield Problem(f"{path}:{number + 1}", what, "write or fetch the file again")


def _first_line(error: Exception) -> str:
    """What a library says, fit for one line."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line[:200] if line.isprintable() else ascii(line[:200])


def _rows(batch: Any) -> list[Any]:
    """A batch's rows as dicts; where one cannot be converted, its error."""
    try:
        return list(batch.to_pylist())
    except _UNCONVERTIBLE as error:
        if len(batch) == 1:
            return [error]
        return [row for at in range(len(batch)) for row in _rows(batch.slice(at, 1))]


def _unreadable_row(path: Path, number: int, error: Exception) -> Problem:
    what = f"a row that cannot be read ({_first_line(error)})"
    return Problem(f"{path}:{number}", what, "write its text as UTF-8, its dates as text")


def paragraphs(path: Path) -> Iterator[Record | Problem]:
    """Blocks of text between blank lines, each with its first line.

    A block above the ceiling ends at the next line end; of one with a line that cannot be read only the
    Problem comes out.
    """
    for block in _blocks(path):
        problems = [line for line in block if isinstance(line, Problem)]
        texts = [line for line in block if not isinstance(line, Problem)]
        if problems:
            yield from problems
        else:
            yield texts[0][0], "\n".join(text for _, text in texts)


def _blocks(path: Path) -> Iterator[list[tuple[int, str] | Problem]]:
    block: list[tuple[int, str] | Problem] = []
    size = 0
    for line in lines(path):
        text = line.what if isinstance(line, Problem) else line[1]
        size += len(text)
        if text.strip():
            block.append(line)
        if block and (not text.strip() or size > LONGEST_PARAGRAPH):
            yield block
            block, size = [], 0
    if block:
        yield block


def is_jsonl(path: Path) -> bool:
    """Whether a ``.txt`` file holds one JSON object a line, judged by its first line."""
    with suppress(ValueError, RecursionError):
        first = next((x for x in lines(path) if isinstance(x, Problem) or x[1].strip()), None)
        return isinstance(first, tuple) and isinstance(json.loads(first[1]), dict)
    return False
