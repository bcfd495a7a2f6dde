"""Samples on disk and mixtures of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunewright.core import store
from tunewright.core.errors import Problem
from tunewright.core.paths import cache_folder
from tunewright.data import tokens
from tunewright.data.tokens import Mixture, TokenTable, take, write

Sample = dict[str, np.ndarray]


def sample(*ids: int) -> Sample:
    """Tokens, every second one learned."""
    return {
        "input_ids": np.array(ids, np.int32),
        "learned": np.array([i % 2 for i in range(len(ids))], np.uint8),
    }


def table(folder: Path, *samples: Sample | Problem) -> TokenTable:
    write(folder, samples, lambda: {"path": "rows.jsonl"})
    return TokenTable(folder)


def same(one: Sample, other: Sample) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


# Tables

SAMPLES = [sample(*range(10 * n, 10 * n + length)) for n, length in enumerate((3, 1, 7, 2, 5, 4))]


@pytest.mark.parametrize("shard_tokens", [1, 4, 9, 10**6])
def test_samples_come_back_whatever_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_tokens: int
) -> None:
    monkeypatch.setattr(tokens, "_SHARD_TOKENS", shard_tokens)
    made = table(tmp_path / "t", *SAMPLES)
    assert len(made) == 6
    assert made.lengths.tolist() == [3, 1, 7, 2, 5, 4]
    assert all(same(made[i], expected) for i, expected in enumerate(SAMPLES))
    assert len(list(made)) == 6


def test_the_shard_size_makes_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_SHARD_TOKENS", 4)
    table(tmp_path / "t", *SAMPLES)
    assert [p.name for p in sorted((tmp_path / "t").glob("*.safetensors"))] == [
        f"shard-0000{n}.safetensors" for n in range(4)
    ]


def test_fields_of_a_sample_may_have_other_lengths(tmp_path: Path) -> None:
    samples = [
        {"input_ids": np.arange(n, dtype=np.int32), "scores": np.arange(n // 2, dtype=np.float32)}
        for n in (4, 2, 6)
    ]
    made = table(tmp_path / "t", *samples)
    assert all(same(made[i], expected) for i, expected in enumerate(samples))


def test_problems_and_facts_are_kept_beside_the_samples(tmp_path: Path) -> None:
    bad = Problem("rows.jsonl:2", "the row is empty", "fill it in")
    made = table(tmp_path / "t", sample(1, 2), bad, sample(3))
    assert len(made) == 2
    assert made.problems == [bad]
    assert made.facts == {"path": "rows.jsonl"}


def test_a_table_is_an_artifact(tmp_path: Path) -> None:
    table(tmp_path / "t", sample(1, 2))
    assert store.is_complete(tmp_path / "t")


def test_no_samples_make_an_empty_table(tmp_path: Path) -> None:
    made = table(tmp_path / "t", Problem("rows.jsonl:1", "bad"))
    assert len(made) == 0
    assert made.lengths.tolist() == []
    assert list(made) == []


def test_an_error_among_the_samples_leaves_no_table(tmp_path: Path) -> None:
    def samples() -> Any:
        yield sample(1, 2)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk"):
        write(tmp_path / "t", samples(), dict)
    assert list(tmp_path.iterdir()) == []


# Mixtures


@pytest.fixture
def tables(tmp_path: Path) -> list[TokenTable]:
    """One of four samples, one of six."""
    first = table(tmp_path / "one", *(sample(i, i) for i in range(4)))
    return [first, table(tmp_path / "two", *(sample(100 + i) for i in range(6)))]


def counts(mixture: Mixture, epoch: int = 0) -> list[int]:
    """How often each sample comes up."""
    return np.bincount(mixture.epoch(epoch), minlength=len(mixture)).tolist()


def test_a_mixture_runs_over_all_tables_in_order(tables: list[TokenTable]) -> None:
    mixture = Mixture(tables, [1.0, 1.0])
    assert len(mixture) == 10
    assert [int(found["input_ids"][0]) for found in mixture] == [0, 1, 2, 3, 100, 101, 102, 103, 104, 105]
    assert mixture.lengths.tolist() == [2] * 4 + [1] * 6


def test_weight_1_is_every_sample_once(tables: list[TokenTable]) -> None:
    assert counts(Mixture(tables, [1.0, 1.0])) == [1] * 10


def test_weight_2_is_every_sample_twice(tables: list[TokenTable]) -> None:
    assert counts(Mixture(tables, [2.0, 1.0])) == [2] * 4 + [1] * 6


def test_weight_one_half_is_every_second_sample_once(tables: list[TokenTable]) -> None:
    found = counts(Mixture(tables, [1.0, 0.5]))
    assert found[:4] == [1] * 4
    assert sorted(found[4:]) == [0, 0, 0, 1, 1, 1]


def test_weight_one_and_a_half_is_all_and_every_second_again(tables: list[TokenTable]) -> None:
    found = counts(Mixture(tables, [1.0, 1.5]))
    assert sorted(found[4:]) == [1, 1, 1, 2, 2, 2]


def test_which_half_depends_on_epoch_and_seed_alone(tables: list[TokenTable]) -> None:
    def picked(seed: int, epoch: int) -> list[int]:
        return counts(Mixture(tables, [0.5, 0.5], seed), epoch)

    assert picked(0, 0) == picked(0, 0)
    assert len({tuple(picked(0, epoch)) for epoch in range(8)}) > 1
    assert len({tuple(picked(seed, 0)) for seed in range(8)}) > 1


def test_a_small_weight_never_leaves_an_epoch_empty(tmp_path: Path) -> None:
    mixture = Mixture([table(tmp_path / "t", sample(1, 2), sample(3, 4), sample(5, 6))], [0.1])
    assert len(mixture.epoch(0)) >= 1


def test_the_problems_of_all_tables_are_together(tmp_path: Path) -> None:
    bad = [Problem(f"{name}.jsonl:1", "bad") for name in "ab"]
    made = [table(tmp_path / str(i), sample(1), problem) for i, problem in enumerate(bad)]
    assert Mixture(made, [1.0, 1.0]).problems == bad


def test_a_mixture_of_nothing_has_no_samples() -> None:
    assert len(Mixture([], [])) == 0
    assert Mixture([], []).problems == []


def test_take_follows_the_indices(tables: list[TokenTable]) -> None:
    taken = take(Mixture(tables, [1.0, 1.0]), np.array([5, 0, 5]))
    assert [int(found["input_ids"][0]) for found in taken] == [101, 0, 101]


# Where


def from_lines(*lines: int) -> Sample:
    return {**sample(1, 2, 3), tokens.ORIGIN: np.array(lines, np.int64)}


def test_a_sample_is_named_by_the_lines_it_was_made_from(tmp_path: Path) -> None:
    write(tmp_path / "t", [from_lines(3), from_lines(10, 14), from_lines(7, 7)], dict)
    made = TokenTable(tmp_path / "t", "data/my.jsonl")
    assert [made.where(i) for i in range(3)] == ["data/my.jsonl:3", "data/my.jsonl:10-14", "data/my.jsonl:7"]


def test_or_by_its_number_where_no_lines_are_known(tmp_path: Path) -> None:
    write(tmp_path / "t", [sample(1, 2), sample(3)], dict)
    assert TokenTable(tmp_path / "t", "my.jsonl").where(1) == "my.jsonl: sample 2"
    assert TokenTable(tmp_path / "t").where(0) == "t: sample 1"


def test_a_mixture_names_its_samples_by_the_table_they_are_of(tmp_path: Path) -> None:
    made = []
    for name, lines in (("a", (1, 2, 5)), ("b", ()), ("c", (9,))):
        write(tmp_path / name, [from_lines(line) for line in lines], dict)
        made.append(TokenTable(tmp_path / name, f"{name}.jsonl"))
    mixture = Mixture(made, [1.0, 2.0, 0.5])
    assert [mixture.where(i) for i in range(4)] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:5", "c.jsonl:9"]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNEWRIGHT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("TUNEWRIGHT_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "tunewright"
