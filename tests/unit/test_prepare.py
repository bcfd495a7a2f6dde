"""From files to token tables: made once, split by content, bad rows told with file and line."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tunewright.core.errors import DataError, Problem
from tunewright.data import formats, prepare
from tunewright.data.prepare import Preparation, held_out_rows, mixture, sources, statistics
from tunewright.data.rows import Source
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import Mixture
from tunewright.objectives import pretrain
from tunewright.objectives.sft import Config, Sft
from tunewright.recipes import DataConfig


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("TUNEWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def codec(tokenizer: Any) -> ChatCodec:
    return ChatCodec(tokenizer)


def preparation(codec: ChatCodec, on_bad_row: str = "stop", **key: Any) -> Preparation:
    return Preparation(Sft(Config(), codec).encode, key, on_bad_row)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(start, start + count)]


def texts(codec: ChatCodec, data: Mixture) -> list[str]:
    return [str(codec.tokenizer.decode(sample["input_ids"])) for sample in data]


def tables(cache: Path) -> list[Path]:
    """All that is in the cache of tables, but for the empty files that writers take turns by."""
    found = [*(cache / "tokens").rglob("*")]
    return [path for path in found if path.suffix != ".lock" or path.stat().st_size]


# The cache


def test_a_file_is_read_once(tmp_path: Path, codec: ChatCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(write(tmp_path / "d.jsonl", *pairs(3)))
    first = preparation(codec).table(source, "train", 0.0)

    def unexpected(source: Source) -> Any:
        raise AssertionError(f"{source.path} is read again")

    monkeypatch.setattr(formats, "read", unexpected)
    again = preparation(codec).table(source, "train", 0.0)
    assert again.folder == first.folder
    assert [sample["input_ids"].tolist() for sample in again] == [
        sample["input_ids"].tolist() for sample in first
    ]


def test_a_changed_row_makes_a_new_table(tmp_path: Path, codec: ChatCodec) -> None:
    path = write(tmp_path / "d.jsonl", *pairs(3))
    first = preparation(codec).table(Source(path), "train", 0.0)
    write(path, *pairs(4))
    second = preparation(codec).table(Source(path), "train", 0.0)
    assert second.folder != first.folder
    assert (len(first), len(second)) == (3, 4)


def test_whatever_changes_the_tokens_makes_a_new_table(tmp_path: Path, codec: ChatCodec) -> None:
    source = Source(write(tmp_path / "d.jsonl", *pairs(3)))
    turned = Source(source.path, columns=(("prompt", "completion"), ("response", "prompt")))
    made = [
        preparation(codec).table(source, "train", 0.0),
        preparation(codec, max_length=64).table(source, "train", 0.0),
        preparation(codec, on_bad_row="skip").table(source, "train", 0.0),
        preparation(codec).table(source, "train", 0.5),
        preparation(codec).table(source, "valid", 0.5),
        preparation(codec).table(turned, "train", 0.0),
    ]  # fmt: skip
    assert len({table.folder for table in made}) == len(made)


def test_the_same_bytes_under_an_ending_that_reads_otherwise_make_a_new_table(
    tmp_path: Path, codec: ChatCodec
) -> None:
    (tmp_path / "d.csv").write_text("prompt,completion\nWhat is 1?,It is 1.\n")
    (tmp_path / "d.txt").write_bytes((tmp_path / "d.csv").read_bytes())
    objective = pretrain.Pretrain(pretrain.Config(), codec)
    as_prose, as_rows = (
        texts(codec, Preparation(objective.encode, {}, "stop").table(Source(tmp_path / name), "train", 0.0))
        for name in ("d.txt", "d.csv")
    )
    assert as_prose == ["prompt,completion\nWhat is 1?,It is 1.<|end|>"]
    assert as_rows == ["<|user|>What is 1?<|end|><|assistant|>It is 1.<|end|><|end|>"]


def test_a_damaged_table_is_made_anew(tmp_path: Path, codec: ChatCodec) -> None:
    source = Source(write(tmp_path / "d.jsonl", *pairs(3)))
    folder = preparation(codec).table(source, "train", 0.0).folder
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    assert len(list(preparation(codec).table(source, "train", 0.0))) == 3


def test_progress_is_told_every_thousand_rows(tmp_path: Path, codec: ChatCodec) -> None:
    told: list[tuple[str, int]] = []
    source = Source(write(tmp_path / "d.jsonl", *pairs(2500)))
    Preparation(Sft(Config(), codec).encode, {}, "stop", lambda *told_: told.append(told_)).table(
        source, "train", 0.0
    )
    assert told == [("d.jsonl", 1000), ("d.jsonl", 2000)]


def test_every_sample_knows_its_file_and_line(tmp_path: Path, codec: ChatCodec) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", *pairs(3, start)) for start, name in ((0, "a"), (50, "b"))]
    train, _ = mixture(preparation(codec), DataConfig(train=[str(p) for p in paths], valid_share=0), 0)
    assert [train.where(i) for i in range(6)] == [f"{path}:{line}" for path in paths for line in (1, 2, 3)]


def test_two_that_want_the_same_table_at_once_make_it_once(
    tmp_path: Path, codec: ChatCodec, cache: Path
) -> None:
    made: list[int] = []

    def encode(rows: Any) -> Any:
        made.append(1)
        return Sft(Config(), codec).encode(rows)

    source = Source(write(tmp_path / "d.jsonl", *pairs(5)))
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda _: Preparation(encode, {}, "stop").table(source, "train", 0.0), range(4))
        )
    assert len(made) == 1
    assert len({table.folder for table in found}) == 1
    assert [path.name for path in tables(cache) if path.is_dir()] == [found[0].folder.name]


def test_what_a_killed_writer_left_of_a_table_is_cleared(
    tmp_path: Path, codec: ChatCodec, cache: Path
) -> None:
    source = Source(write(tmp_path / "d.jsonl", *pairs(3)))
    folder = preparation(codec).table(source, "train", 0.0).folder
    shutil.rmtree(folder)
    (folder.parent / f".{folder.name}.77.partial").mkdir()
    (folder.parent / ".other.77.partial").mkdir()
    assert len(preparation(codec).table(source, "train", 0.0)) == 3
    assert not (folder.parent / f".{folder.name}.77.partial").exists()
    assert (folder.parent / ".other.77.partial").exists()


# Bad rows

EMPTY = {"prompt": "Well?", "completion": ""}
TEXT = {"text": "no conversation"}


def test_stop_tells_every_bad_row_with_file_and_line_and_leaves_no_table(
    tmp_path: Path, codec: ChatCodec, cache: Path
) -> None:
    path = write(tmp_path / "d.jsonl", *pairs(1), EMPTY, *pairs(1, start=5), TEXT)
    with pytest.raises(DataError) as caught:
        preparation(codec).table(Source(path), "train", 0.0)
    assert sorted(problem.where for problem in caught.value.problems) == [f"{path}:2", f"{path}:4"]
    assert tables(cache) == []


def test_skip_leaves_bad_rows_out_and_lists_them(tmp_path: Path, codec: ChatCodec) -> None:
    path = write(tmp_path / "d.jsonl", *pairs(1), EMPTY, *pairs(1, start=5), TEXT)
    table = preparation(codec, "skip").table(Source(path), "train", 0.0)
    assert len(table) == 2
    assert sorted(problem.where for problem in table.problems) == [f"{path}:2", f"{path}:4"]
    again = preparation(codec, "skip").table(Source(path), "train", 0.0)
    assert again.problems == table.problems


def test_a_row_with_no_assistant_token_left_is_a_problem(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "long " * 20, "completion": "short"})
    with pytest.raises(DataError) as caught:
        preparation(ChatCodec(tokenizer, max_length=8)).table(Source(path), "train", 0.0)
    assert str(caught.value).startswith(f"{path}:1: no assistant token is left within max_length 8")


def test_the_bad_rows_of_all_files_are_told_together_and_once(tmp_path: Path, codec: ChatCodec) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", *pairs(1, start), EMPTY) for start, name in enumerate("ab")]
    with pytest.raises(DataError) as caught:
        mixture(preparation(codec), DataConfig(train=[str(path) for path in paths]), 0)
    assert [problem.where for problem in caught.value.problems] == [f"{path}:2" for path in paths]


def test_a_mixture_without_a_sample_is_refused(tmp_path: Path, codec: ChatCodec) -> None:
    path = write(tmp_path / "d.jsonl", EMPTY)
    with pytest.raises(DataError, match=r"data\.train: no sample is left to train on"):
        mixture(preparation(codec, "skip"), DataConfig(train=str(path)), 0)


# The split


def test_the_split_is_disjoint_and_leaves_nothing_out(tmp_path: Path, codec: ChatCodec) -> None:
    path = write(tmp_path / "d.jsonl", *pairs(200))
    train, valid = mixture(preparation(codec), DataConfig(train=str(path), valid_share=0.3), 0)
    kept, held = set(texts(codec, train)), set(texts(codec, valid))
    assert not kept & held
    assert len(kept) + len(held) == 200
    assert 35 < len(held) < 85


def test_equal_rows_fall_on_the_same_side_wherever_they_stand(tmp_path: Path, codec: ChatCodec) -> None:
    one = write(tmp_path / "one.jsonl", *pairs(60))
    two = write(tmp_path / "two.jsonl", *reversed(pairs(60)))
    data = DataConfig(train=[str(one), str(two)], valid_share=0.5)
    train, valid = mixture(preparation(codec), data, 0)
    assert len(train) + len(valid) == 120
    assert not set(texts(codec, train)) & set(texts(codec, valid))


def test_more_rows_move_no_row_to_the_other_side(tmp_path: Path, codec: ChatCodec) -> None:
    held = []
    for count in (100, 150):
        path = write(tmp_path / f"{count}.jsonl", *pairs(count))
        _, valid = mixture(preparation(codec), DataConfig(train=str(path), valid_share=0.3), 0)
        held.append(set(texts(codec, valid)))
    assert held[0] < held[1]


def test_share_0_holds_nothing_out(tmp_path: Path, codec: ChatCodec) -> None:
    path = write(tmp_path / "d.jsonl", *pairs(10))
    train, valid = mixture(preparation(codec), DataConfig(train=str(path), valid_share=0), 0)
    assert (len(train), len(valid)) == (10, 0)


def test_named_held_out_files_take_the_place_of_the_share(tmp_path: Path, codec: ChatCodec) -> None:
    path, other = write(tmp_path / "d.jsonl", *pairs(10)), write(tmp_path / "v.jsonl", *pairs(3, start=50))
    train, valid = mixture(
        preparation(codec), DataConfig(train=str(path), valid=str(other), valid_share=0.5), 0
    )
    assert (len(train), len(valid)) == (10, 3)


def test_weights_reach_the_mixture(tmp_path: Path, codec: ChatCodec) -> None:
    path, other = write(tmp_path / "a.jsonl", *pairs(2)), write(tmp_path / "b.jsonl", *pairs(3, start=50))
    data = DataConfig(train=[str(path), {"path": str(other), "weight": 2}], valid_share=0)
    train, _ = mixture(preparation(codec), data, 0)
    assert sorted(train.epoch(0).tolist()) == [0, 1, 2, 2, 3, 3, 4, 4]


# Questions


def test_the_questions_are_the_held_out_rows(tmp_path: Path, codec: ChatCodec) -> None:
    path = write(tmp_path / "d.jsonl", *pairs(100))
    data = DataConfig(train=str(path), valid_share=0.3)
    rows = held_out_rows(data, 1000)
    _, valid = mixture(preparation(codec), data, 0)
    assert sorted(codec.render(row.messages) for row in rows) == sorted(texts(codec, valid))


def test_fewer_questions_are_a_part_of_more_and_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *pairs(100))
    data = DataConfig(train=str(path), valid_share=0.5)
    five, ten = held_out_rows(data, 5), held_out_rows(data, 10)
    assert ten[:5] == five
    write(path, *reversed(pairs(100)))
    assert [row.messages for row in held_out_rows(data, 5)] == [row.messages for row in five]


def test_nothing_held_out_is_no_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *pairs(5))
    assert held_out_rows(DataConfig(train=str(path), valid_share=0), 10) == []


def test_named_files_are_asked_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *pairs(5))
    assert len(held_out_rows(DataConfig(train="unused.jsonl", valid=str(path)), 10)) == 5


# Sources


def test_a_misspelt_builtin_is_told_the_nearest() -> None:
    with pytest.raises(DataError) as caught:
        sources(DataConfig(train="builtin:demo-tain").train)
    assert str(caught.value) == "data: there is no built-in data 'demo-tain'; fix: did you mean 'demo-train'?"


def test_every_missing_source_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        sources(DataConfig(train=["builtin:demo", str(tmp_path / "empty")]).train)
    assert len(caught.value.problems) == 2


def test_builtin_data_is_written_out_once(cache: Path) -> None:
    (source,) = sources(DataConfig(train={"path": "builtin:demo-valid", "weight": 2}).train)
    assert source.path.is_relative_to(cache)
    assert source.weight == 2
    assert sum(1 for row in formats.read(source) if not isinstance(row, Problem)) == 400
    before = source.path.stat()
    (again,) = sources(DataConfig(train="builtin:demo-valid").train)
    assert again.path == source.path
    assert again.path.stat().st_mtime_ns == before.st_mtime_ns


def test_damaged_builtin_data_is_written_anew() -> None:
    (source,) = sources(DataConfig(train="builtin:demo-valid").train)
    content = source.path.read_bytes()
    source.path.write_bytes(content[: len(content) // 2])
    (again,) = sources(DataConfig(train="builtin:demo-valid").train)
    assert again.path.read_bytes() == content


def test_what_a_file_says_of_itself_reaches_the_source(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"q": "a", "a": "b"})
    file = {
        "path": str(path),
        "format": "prompt-completion",
        "columns": {"prompt": "q", "response": "a"},
        "tags": {},
    }
    (source,) = sources(DataConfig(train=file).train)
    assert source == Source(path, "prompt-completion", (("prompt", "q"), ("response", "a")))


# Statistics


def test_statistics_count_what_is_there(tmp_path: Path, codec: ChatCodec) -> None:
    path = write(tmp_path / "d.jsonl", *pairs(6), EMPTY)
    train, _ = mixture(preparation(codec, "skip"), DataConfig(train=str(path), valid_share=0), 0)
    found = statistics(train)
    assert found["samples"] == sum(bin_["samples"] for bin_ in found["lengths"]) == 6
    assert found["tokens"] == sum(len(sample["input_ids"]) for sample in train)
    assert found["longest"] == max(len(sample["input_ids"]) for sample in train)
    assert [line.split(": ")[0] for line in found["skipped"]] == [f"{path}:7"]
    assert found["files"][0]["path"] == str(path)


def test_statistics_of_nothing() -> None:
    assert statistics(Mixture([], []))["samples"] == 0


def test_the_digest_is_of_the_words_not_of_the_place() -> None:
    from tunewright.data.rows import Row

    assert prepare._digest(Row("a:1", text="x")) == prepare._digest(Row("b:9", text="x"))
    assert prepare._digest(Row("a:1", text="x")) != prepare._digest(Row("a:1", text="y"))
