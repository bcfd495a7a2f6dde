"""A file that only grows: whole lines come back as they were, damaged ones are passed over and counted."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from tunewright.core import journal, store
from tunewright.core.disk import Disk
from tunewright.core.errors import StorageError
from tunewright.core.journal import Journal

VALUES: list[dict[str, Any]] = [
    {"step": 1, "samples": [3, 1, 2]},
    {"text": "日本 \U0001f600\n", "crc": "00000000"},
    {"x": None},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "log.jsonl"


def written(path: Path, *values: dict[str, Any]) -> bytes:
    log = Journal(path)
    for value in values:
        log.append(value)
    return path.read_bytes()


def test_objects_come_back_in_order(path: Path) -> None:
    written(path, *VALUES)
    assert list(journal.read(path)) == VALUES
    assert journal.damaged(path) == 0


@pytest.mark.parametrize("value", [{}, {"half a pair": "\ud83d"}, {"a": {"b": ["}", '"crc": "0"}']}}])
def test_odd_objects_come_back_too(path: Path, value: dict[str, Any]) -> None:
    written(path, value)
    assert list(journal.read(path)) == [value]


def test_a_line_is_json_with_its_checksum_last(path: Path) -> None:
    (line,) = written(path, {"step": 1}).splitlines()
    assert list(json.loads(line)) == ["step", "crc"]
    assert line == b'{"step": 1, "crc": "3daa833a"}'


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert list(journal.read(tmp_path / "none")) == []
    assert journal.damaged(tmp_path / "none") == 0


def test_a_second_writer_goes_on_at_the_end(path: Path) -> None:
    written(path, VALUES[0])
    written(path, *VALUES[1:])
    assert list(journal.read(path)) == VALUES


def test_every_cut_of_the_last_line_is_passed_over_and_ended_by_the_next(path: Path) -> None:
    content = written(path, *VALUES[:2])
    start = content.index(b"\n") + 1
    for length in range(start + 1, len(content) - 1):
        path.write_bytes(content[:length])
        assert list(journal.read(path)) == VALUES[:1], length
        written(path, VALUES[2])
        assert list(journal.read(path)) == [VALUES[0], VALUES[2]], length
        assert journal.damaged(path) == 1, length


def test_a_last_line_that_lacks_only_its_newline_is_whole(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(journal.line(VALUES[0])[:-1])
    written(path, VALUES[1])
    assert list(journal.read(path)) == VALUES[:2]
    assert journal.damaged(path) == 0


def test_every_flipped_byte_loses_its_line_and_no_more_than_the_next(path: Path) -> None:
    content = written(path, *VALUES)
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        found, lost = list(journal.read(path)), journal.damaged(path)
        assert lost >= 1, i
        assert all(value in VALUES for value in found), i
        at = content[:i].count(b"\n")
        assert all(value in found for k, value in enumerate(VALUES) if k not in (at, at + 1)), i


@pytest.mark.parametrize("raw", [b"\n", b"{}\n", b"not json\n", b'{"step": 1}\n', b"\xff\xfe\n", b"null\n"])
def test_lines_that_were_not_written_so_are_passed_over_and_counted(path: Path, raw: bytes) -> None:
    content = written(path, VALUES[0])
    path.write_bytes(raw + content)
    assert list(journal.read(path)) == VALUES[:1]
    assert journal.damaged(path) == 1


def test_a_refused_line_is_a_storage_error_and_the_next_one_is_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Disk):
        def append(self, path: Path, data: bytes) -> None:
            super().append(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "full")

    log = Journal(path)
    log.append(VALUES[0])
    monkeypatch.setattr(store, "disk", Full())
    with pytest.raises(StorageError, match="No space left on device"):
        log.append(VALUES[1])
    monkeypatch.undo()
    log.append(VALUES[2])
    assert list(journal.read(path)) == [VALUES[0], VALUES[2]]
    assert journal.damaged(path) == 1
