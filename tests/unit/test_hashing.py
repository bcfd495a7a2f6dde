"""Large files are hashed beside what else is done, and once, unless they are written again."""

import hashlib
import os
from pathlib import Path

import pytest

from tunewright.core import hashing


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were read, in order."""
    seen: list[Path] = []
    hashed = hashing._hashed

    def read(path: Path) -> str:
        seen.append(path)
        return hashed(path)

    monkeypatch.setattr(hashing, "_hashed", read)
    return seen


def written(path: Path, content: bytes, ago: float = 10.0) -> Path:
    path.write_bytes(content)
    then = path.stat().st_mtime - ago
    os.utime(path, (then, then))
    return path


def test_it_is_the_sha_256_of_all_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_PIECE", 7)
    content = bytes(range(100))
    assert hashing.sha256(written(tmp_path / "x", content)) == hashlib.sha256(content).hexdigest()


def test_files_that_were_begun_are_read_once(tmp_path: Path, reads: list[Path]) -> None:
    paths = [written(tmp_path / name, name.encode()) for name in "abc"]
    begun = hashing.begin(paths)
    assert [hashing.sha256(path) for path in paths] == [one.result() for one in begun]
    assert reads == paths


def test_a_file_that_is_written_again_is_read_again(tmp_path: Path, reads: list[Path]) -> None:
    path = written(tmp_path / "x", b"one", ago=20)
    before = hashing.sha256(path)
    assert hashing.sha256(written(path, b"two")) != before
    assert reads == [path, path]


def test_a_file_of_this_moment_may_yet_change_unseen(tmp_path: Path, reads: list[Path]) -> None:
    path = written(tmp_path / "x", b"one", ago=0)
    assert hashing.sha256(path) == hashing.sha256(path)
    assert reads == [path, path]


def test_who_waits_is_told_whatever_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> str:
        raise MemoryError("no room for a piece")

    monkeypatch.setattr(hashing, "_hashed", full)
    one, other = hashing.begin([written(tmp_path / "x", b"one"), written(tmp_path / "y", b"two")])
    for found in (one, other):
        with pytest.raises(MemoryError, match="no room"):
            found.result(timeout=10)


def test_what_cannot_be_read_is_told_to_who_asks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hashing.sha256(tmp_path / "none")
    os.utime(tmp_path, (1, 1))
    for _ in range(2):
        with pytest.raises(IsADirectoryError):
            hashing.sha256(tmp_path)
