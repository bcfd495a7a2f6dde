"""An artifact is complete or absent; a file is the old one or the new one; nothing is left behind."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunewright.core import store
from tunewright.core.disk import Disk
from tunewright.core.errors import DamagedError, StorageError


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


@pytest.mark.parametrize("value", [{}, {"files": ["a.txt"]}, {"files": None}])
def test_a_record_that_is_no_manifest(tmp_path: Path, value: dict[str, object]) -> None:
    folder = make(tmp_path / "model")
    store.write_record(folder / "manifest.json", value)
    assert damaged(folder) == "manifest.json: not a manifest"


@pytest.mark.parametrize("value", [[], {}, {"files": {"a.txt": "0"}}, None])
def test_json_that_is_no_record_is_no_manifest(tmp_path: Path, value: object) -> None:
    folder = make(tmp_path / "model")
    (folder / "manifest.json").write_text(json.dumps(value))
    assert damaged(folder) == "manifest.json: it differs from what was written"


@pytest.mark.parametrize("position", range(0, 100, 9))
def test_a_manifest_with_a_changed_byte(tmp_path: Path, position: int) -> None:
    folder = make(tmp_path / "model", method="lora")
    content = bytearray((folder / "manifest.json").read_bytes())
    content[position * len(content) // 100] ^= 1
    (folder / "manifest.json").write_bytes(content)
    assert damaged(folder).startswith("manifest.json: ")


def test_facts_are_read_without_a_look_at_the_files(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", method="lora")
    (folder / "a.txt").write_text("wordz")
    assert store.facts(folder)["method"] == "lora"
    (folder / "manifest.json").unlink()
    with pytest.raises(DamagedError, match="the folder was never completed"):
        store.facts(folder)


@pytest.mark.parametrize("name", ["../note.txt", "/etc/hostname", "inner/../../note.txt", "a\x00b", ""])
def test_a_manifest_that_names_a_file_elsewhere_is_damaged(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "model")
    (tmp_path / "note.txt").write_text("mine")
    files = {name: store.sha256_file(tmp_path / "note.txt")}
    store.write_record(folder / "manifest.json", {"files": files})
    assert damaged(folder).startswith("manifest.json: ")


# What a kill leaves


def test_an_artifact_that_was_moved_aside_is_put_back(tmp_path: Path) -> None:
    make(tmp_path / "model", "old").rename(tmp_path / ".model.77.old")
    (tmp_path / ".model.77.partial").mkdir()
    (tmp_path / ".model.77.partial" / "a.txt").write_text("ne")
    assert [path.name for path in store.leftovers(tmp_path)] == [".model.77.old", ".model.77.partial"]
    store.recover(tmp_path)
    assert store.leftovers(tmp_path) == []
    assert store.is_complete(tmp_path / "model")
    assert (tmp_path / "model" / "a.txt").read_text() == "old"


def test_an_artifact_that_was_replaced_is_not_put_back(tmp_path: Path) -> None:
    make(tmp_path / "model", "old").rename(tmp_path / ".model.77.old")
    make(tmp_path / "model", "new")
    store.recover(tmp_path)
    assert store.leftovers(tmp_path) == []
    assert (tmp_path / "model" / "a.txt").read_text() == "new"


def test_half_written_files_are_removed_however_deep_and_others_stay(tmp_path: Path) -> None:
    deep = tmp_path / "stages" / "sft"
    deep.mkdir(parents=True)
    for name in (".metrics.json.77.tmp", ".owner", ".model.x.partial", "notes.77.tmp"):
        (deep / name).write_text("half")
    store.recover(tmp_path)
    assert names(deep) == [".model.x.partial", ".owner", "notes.77.tmp"]


def test_only_names_of_the_pattern_are_recovered(tmp_path: Path) -> None:
    for name in (".one.77.partial", ".two.77.partial"):
        (tmp_path / name).mkdir()
    store.recover(tmp_path, ".one.*")
    assert names(tmp_path) == [".two.77.partial"]


def test_recovery_of_a_folder_that_is_absent_or_clean_changes_nothing(tmp_path: Path) -> None:
    store.recover(tmp_path / "none")
    make(tmp_path / "model")
    before = names(tmp_path)
    store.recover(tmp_path)
    assert names(tmp_path) == before


def test_a_removed_artifact_is_gone(tmp_path: Path) -> None:
    store.remove(make(tmp_path / "model"))
    assert names(tmp_path) == []
    store.remove(tmp_path / "model")


def test_the_manifest_goes_first_when_an_artifact_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(Disk):
        def remove_folder(self, path: Path) -> None:
            raise OSError(errno.EIO, "broken")

    folder = make(tmp_path / "model")
    monkeypatch.setattr(store, "disk", Stuck())
    with pytest.raises(StorageError):
        store.remove(folder)
    assert not store.is_complete(folder)


# A disk that refuses


class Refusing(Disk):
    """Fails one kind of operation with an error number."""

    def __init__(self, operation: str, number: int) -> None:
        self.operation, self.number = operation, number

    def __getattribute__(self, name: str) -> Any:
        if name in ("operation", "number") or name.startswith("__") or name != self.operation:
            return super().__getattribute__(name)
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("operation", ["make_folder", "write", "rename", "settle"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG])
def test_a_disk_that_refuses_is_a_storage_error_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, number: int
) -> None:
    folder = make(tmp_path / "model", "old")
    store.write_text(tmp_path / "note.txt", "old")
    monkeypatch.setattr(store, "disk", Refusing(operation, number))
    for write in (lambda: make(folder, "new"), lambda: store.write_text(tmp_path / "note.txt", "new")):
        with pytest.raises(StorageError) as caught:
            write()
        assert str(caught.value).startswith(str(tmp_path))
        assert f": {os.strerror(number)}; what was saved before is whole" in str(caught.value)
        assert caught.value.exit_code == 74
    monkeypatch.undo()
    store.recover(tmp_path)
    assert store.is_complete(folder)
    assert (folder / "a.txt").read_text() in ("old", "new" if operation == "settle" else "old")
    assert (tmp_path / "note.txt").read_text() in ("old", "new" if operation == "settle" else "old")
    assert store.leftovers(tmp_path) == []


def test_an_append_that_is_refused_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "disk", Refusing("append", errno.ENOSPC))
    with pytest.raises(StorageError, match="No space left on device"):
        store.append(tmp_path / "log", b"line\n")


def test_what_a_library_quotes_of_a_full_disk_is_a_storage_error_too(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left on device"), store.artifact(tmp_path / "model"):
        raise ValueError("I/O error: No space left on device (os error 28)")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error", [ValueError("wrong"), FileNotFoundError(errno.ENOENT, "gone"), OSError("odd")]
)
def test_other_errors_of_the_body_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, store.artifact(tmp_path / "model"):
        raise error
    assert caught.value is error
    assert names(tmp_path) == []


# Records


def test_a_record_comes_back_without_its_seal(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    store.write_record(path, {"loss": 0.1, "名": [1, None, "ü"], "pair": (1, 2), "in": {3: "three"}})
    assert store.read_record(path) == {
        "loss": 0.1,
        "名": [1, None, "ü"],
        "pair": [1, 2],
        "in": {"3": "three"},
    }
    assert set(json.loads(path.read_text(encoding="utf-8"))) == {"loss", "名", "pair", "in", "sha256"}


def test_a_record_may_be_laid_out_anew_but_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    store.write_record(path, {"a": 1, "b": {"c": 2.5}})
    value = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(value.items()))))
    assert store.read_record(path) == {"a": 1, "b": {"c": 2.5}}
    path.write_text(json.dumps({**value, "b": {"c": 2.6}}))
    with pytest.raises(DamagedError, match="it differs from what was written"):
        store.read_record(path)


def test_every_flipped_bit_of_a_record_is_found(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    written = {"step": 12, "loss": 0.25, "name": "sft"}
    store.write_record(path, written)
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
        assert read_or_none(path) in (None, written), i


def read_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return store.read_record(path)
    except DamagedError:
        return None


def test_every_cut_of_a_record_is_found(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    store.write_record(path, {"step": 12, "loss": 0.25})
    content = path.read_bytes()
    for length in range(len(content) - 1):
        path.write_bytes(content[:length])
        assert read_or_none(path) is None, length


@pytest.mark.parametrize("text", ["[]", "null", "3", '"sha256"', "{}", '{"sha256": null}', "", "[" * 100_000])
def test_json_that_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(DamagedError):
        store.read_record(tmp_path / "record.json")


def test_an_absent_record_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"record\.json: missing"):
        store.read_record(tmp_path / "record.json")


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
