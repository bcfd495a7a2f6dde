"""The operations that change a disk do what they say, on the real one."""

from pathlib import Path

import pytest

from tunewright.core.disk import Disk

disk = Disk()


def test_folders_are_made_with_those_above_and_may_be_there(tmp_path: Path) -> None:
    disk.make_folder(tmp_path / "a" / "b")
    disk.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_file_is_written_from_its_pieces_and_replaces_an_older_one(tmp_path: Path) -> None:
    for pieces in ([b"a longer text"], [b"one", b"", b" two"]):
        disk.write(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"one two"


def test_appending_makes_the_file_and_adds_to_its_end(tmp_path: Path) -> None:
    for data in (b"one\n", b"", b"two\n", b"x" * 3_000_000):
        disk.append(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\n" + b"x" * 3_000_000


def test_renaming_replaces_a_file(tmp_path: Path) -> None:
    disk.write(tmp_path / "old", [b"old"])
    disk.write(tmp_path / "new", [b"new"])
    disk.rename(tmp_path / "new", tmp_path / "old")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old", b"new")]


def test_what_is_there_is_removed_and_what_is_not_is_no_error(tmp_path: Path) -> None:
    disk.write(tmp_path / "file", [b"x"])
    disk.make_folder(tmp_path / "folder" / "inner")
    disk.write(tmp_path / "folder" / "inner" / "file", [b"x"])
    for _ in range(2):
        disk.remove(tmp_path / "file")
        disk.remove_folder(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_files_and_folders_can_be_settled_and_absent_ones_not(tmp_path: Path) -> None:
    disk.write(tmp_path / "file", [b"x"])
    disk.settle(tmp_path / "file")
    disk.settle(tmp_path)
    with pytest.raises(FileNotFoundError):
        disk.settle(tmp_path / "none")
