"""What may be a path, and what may not, of names in files and names of users."""

import os
from pathlib import Path

import pytest

from tunewright.core.errors import UserError
from tunewright.core.paths import check_plain, folder_to_make, given, inside


def refused(act: object, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        act(*arguments)  # type: ignore[operator]
    return str(caught.value)


def test_a_name_inside(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/b.json", "list.json") == tmp_path / "a" / "b.json"
    assert inside(tmp_path, "a/../ä\\..", "list.json") == tmp_path / "a/../ä\\.."
    (tmp_path / "link").symlink_to("a")
    assert inside(tmp_path, "link/b", "list.json") == tmp_path / "link" / "b"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("", "'' is no path"),
        ("../x", "'../x' leads out of"),
        ("/etc/passwd", "'/etc/passwd' is an absolute path"),
        ("a\0", "'a\\x00' holds the control character U+0000"),
        ("\ud800", "'\\ud800' is not UTF-8"),
        ("x" * 300, "xxx...' is no path here (File name too long)"),
        ("loop", "'loop' is no path here (it cannot be followed)"),
        ("out/x", "'out/x' leads out of"),
    ],
)
def test_a_name_that_is_not(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "out").symlink_to("..")
    found = refused(inside, tmp_path, name, "list.json")
    assert found.startswith("list.json: ")
    assert what in found
    assert found.endswith(f"fix: name a file in {tmp_path}, by its path from there")


def test_what_a_user_gives_may_lead_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert given("~/x", "data") == Path("/home/me/x")
    assert given("../x", "data") == Path("../x")
    assert refused(given, "~no-such-user/x", "data") == (
        "data: '~no-such-user/x' begins with an unknown user's ~; fix: check the path"
    )
    assert "File name too long" in refused(given, "x" * 300, "data")
    assert "holds the control character U+000A" in refused(given, "a\nb", "data")


def test_a_folder_to_make(tmp_path: Path) -> None:
    assert folder_to_make(str(tmp_path), "output") == tmp_path
    assert folder_to_make(str(tmp_path / "a" / "b"), "output") == tmp_path / "a" / "b"
    (tmp_path / "file").touch()
    for name in ("file", "file/x"):
        assert f"cannot be a folder: {tmp_path}/file is none" in refused(
            folder_to_make, str(tmp_path / name), "output"
        )
    (tmp_path / "gone").symlink_to("nowhere")
    assert "cannot be a folder" in refused(folder_to_make, str(tmp_path / "gone"), "output")


def test_a_folder_that_is_closed() -> None:
    assert "is closed to you" in refused(folder_to_make, "/proc/self/x", "output")


def test_a_folder_with_a_pipe_in_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    check_plain(tmp_path, "model")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe' is a pipe or a device, expected a file; fix: leave it out" in refused(
        check_plain, tmp_path, "model"
    )
