"""An artifact is complete or absent; a file is the old one or the new one; nothing is left behind."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunewright.core import store
from tunewright.core.errors import DamagedError


def names(folder: Path) -> list[str]:
    """Everything in the folder, hidden files included."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def make(folder: Path, text: str = "words", **facts: object) -> Path:
    with store.artifact(folder, **facts) as partial:
        (partial / "a.txt").write_text(text)
        (partial / "inner").mkdir()
        (partial / "inner" / "b.txt").write_text("more")
    return folder


# Artifacts


def test_an_artifact_is_sealed_with_a_manifest_of_hashes_and_facts(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", method="lora")
    assert store.verify(folder) == {
        "files": {
            "a.txt": store.sha256_file(folder / "a.txt"),
            "inner/b.txt": store.sha256_file(folder / "inner/b.txt"),
        },
        "method": "lora",
    }
    assert store.is_complete(folder)
    assert names(tmp_path) == [
        "model",
        "model/a.txt",
        "model/inner",
        "model/inner/b.txt",
        "model/manifest.json",
    ]


def test_while_it_is_written_nothing_stands_at_its_place(tmp_path: Path) -> None:
    with store.artifact(tmp_path / "model") as partial:
        (partial / "a.txt").write_text("words")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "a.txt").read_text() == "words"


def fail_while_writing(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), store.artifact(folder) as partial:
        (partial / "a.txt").write_text("half")
        raise KeyboardInterrupt


def test_when_the_body_raises_nothing_appears_and_nothing_is_left(tmp_path: Path) -> None:
    fail_while_writing(tmp_path / "model")
    assert names(tmp_path) == []


def test_when_the_body_raises_the_older_artifact_stays(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "old")
    fail_while_writing(folder)
    assert store.is_complete(folder)
    assert (folder / "a.txt").read_text() == "old"


def test_an_older_artifact_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with store.artifact(folder) as partial:
        (partial / "old.txt").write_text("old")
    make(folder, "new")
    assert store.is_complete(folder)
    assert names(tmp_path) == [
        "model",
        "model/a.txt",
        "model/inner",
        "model/inner/b.txt",
        "model/manifest.json",
    ]


def test_parents_are_made(tmp_path: Path) -> None:
    assert store.is_complete(make(tmp_path / "runs" / "one" / "model"))


# Damage


def damaged(folder: Path) -> str:
    assert not store.is_complete(folder)
    with pytest.raises(DamagedError) as caught:
        store.verify(folder)
    return str(caught.value).replace(f"{folder}/", "").replace(str(folder), "model")


def test_verify_names_a_missing_file(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    (folder / "inner" / "b.txt").unlink()
    assert damaged(folder) == "inner/b.txt: missing; the manifest of model names it"


@pytest.mark.parametrize("content", ["wordz", "word", "", "words "])
def test_verify_names_a_file_that_is_changed_truncated_empty_or_longer(tmp_path: Path, content: str) -> None:
    folder = make(tmp_path / "model")
    (folder / "a.txt").write_text(content)
    assert damaged(folder) == "a.txt: its bytes differ from the manifest of model"


def test_verify_looks_at_inner_files_that_are_called_manifest_too(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with store.artifact(folder) as partial:
        make(partial / "base")
    (folder / "base" / "manifest.json").write_text("{}")
    assert damaged(folder) == "base/manifest.json: its bytes differ from the manifest of model"


def test_a_folder_without_a_manifest_was_never_completed(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    (folder / "manifest.json").unlink()
    assert damaged(folder) == "model: no manifest.json; the folder was never completed"
    assert not store.is_complete(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", '{"files": {"a.txt": "', "\xff\xfe"])
def test_a_manifest_that_is_not_json(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "model")
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    assert damaged(folder).startswith("manifest.json: not readable as JSON")


@pytest.mark.parametrize("value", [[], {}, {"files": ["a.txt"]}, None])
def test_json_that_is_no_manifest(tmp_path: Path, value: object) -> None:
    folder = make(tmp_path / "model")
    (folder / "manifest.json").write_text(json.dumps(value))
    assert damaged(folder) == "manifest.json: not a manifest"


# Single files


def test_write_text_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "note.txt"
    store.write_text(path, "old")
    store.write_text(path, "new, 新")
    assert path.read_text(encoding="utf-8") == "new, 新"
    assert names(tmp_path) == ["deep", "deep/note.txt"]


def test_a_failed_write_keeps_the_old_text_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    store.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        store.write_text(path, "half a character: \ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["note.txt"]


def test_lines_that_end_in_an_error_leave_nothing(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, int]]:
        yield {"row": 1}
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        store.write_lines(tmp_path / "rows.jsonl", rows())
    assert names(tmp_path) == []


def test_write_lines_is_one_json_value_a_line(tmp_path: Path) -> None:
    store.write_lines(tmp_path / "rows.jsonl", [{"text": "é"}, [1, 2]])
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8") == '{"text": "é"}\n[1, 2]\n'


def test_json_comes_back(tmp_path: Path) -> None:
    store.write_json(tmp_path / "a.json", {"b": [1, None, "ü"]})
    assert store.read_json(tmp_path / "a.json") == {"b": [1, None, "ü"]}


def test_broken_json_is_damage(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"b": ')
    with pytest.raises(DamagedError, match="not readable as JSON"):
        store.read_json(tmp_path / "a.json")


# Hashes


def test_the_hash_of_json_does_not_depend_on_the_order_of_keys() -> None:
    assert store.sha256_json({"a": 1, "b": [2]}) == store.sha256_json({"b": [2], "a": 1})
    assert store.sha256_json({"a": 1}) != store.sha256_json({"a": "1"})


def test_the_hash_of_a_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert store.sha256_file(tmp_path / "a") == expected
