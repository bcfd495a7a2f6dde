"""Which samples each step learned from, through kills, skips and rollbacks."""

from pathlib import Path

import numpy as np
import pytest

from tunewright.core import journal
from tunewright.train import ledger
from tunewright.train.ledger import Ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sft" / "samples.jsonl"


def learned(path: Path, *steps: int) -> Ledger:
    """A ledger that goes on: step n learns from the samples 10 n and 10 n + 1."""
    made = Ledger(path)
    for step in steps:
        made.learned(step, [10 * step, 10 * step + 1])
    return made


def expected(*steps: int) -> ledger.Steps:
    return {step: [10 * step, 10 * step + 1] for step in steps}


def test_steps_come_back_in_order_with_their_samples(path: Path) -> None:
    learned(path, 1, 2, 3)
    assert ledger.read(path) == expected(1, 2, 3)
    assert list(ledger.read(path)) == [1, 2, 3]


def test_samples_keep_their_order_and_may_be_numpys(path: Path) -> None:
    Ledger(path).learned(1, np.array([5, 3, 4], np.int64))
    assert ledger.read(path) == {1: [5, 3, 4]}


def test_no_file_is_no_steps(path: Path) -> None:
    assert ledger.read(path) == {}


def test_steps_that_are_done_again_count_once_and_undo_later_ones(path: Path) -> None:
    learned(path, 1, 2, 3, 4, 5)
    again = Ledger(path)
    again.learned(3, [7])
    assert ledger.read(path) == {**expected(1, 2), 3: [7]}
    again.learned(4, [8])
    assert ledger.read(path) == {**expected(1, 2), 3: [7], 4: [8]}
    assert list(ledger.read(path)) == [1, 2, 3, 4]


def test_steps_that_are_done_again_from_the_start(path: Path) -> None:
    learned(path, 1, 2, 3)
    Ledger(path).learned(1, [7])
    assert ledger.read(path) == {1: [7]}


def test_a_skipped_step_learned_from_nothing(path: Path) -> None:
    made = learned(path, 1)
    made.skipped(2, [5, 6])
    made.learned(3, [7])
    assert ledger.read(path) == {**expected(1), 2: [], 3: [7]}
    assert [line.get("skipped") for line in journal.read(path)] == [None, [5, 6], None]


def test_a_rollback_undoes_the_steps_after_the_one_it_goes_back_to(path: Path) -> None:
    made = learned(path, 1, 2, 3, 4)
    for step in (5, 6, 7):
        made.skipped(step, [step])
    made.rolled_back(7, to=2)
    assert ledger.read(path) == {**expected(1, 2), **{step: [] for step in range(3, 8)}}
    made.learned(8, [80, 81])
    assert ledger.read(path) == {**expected(1, 2, 8), **{step: [] for step in range(3, 8)}}
    assert list(ledger.read(path)) == list(range(1, 9))


def test_a_rollback_that_a_kill_undid_does_not_count(path: Path) -> None:
    made = learned(path, 1, 2, 3, 4)
    made.rolled_back(4, to=2)  # killed before the checkpoint of it
    learned(path, 4, 5)
    assert ledger.read(path)[4] == [40, 41]
    assert ledger.read(path)[5] == [50, 51]


@pytest.mark.parametrize("resumed_from", [2, 4])
def test_a_rollback_that_a_kill_undid_and_that_is_made_again_is_the_same(
    path: Path, resumed_from: int
) -> None:
    for done in (0, resumed_from):
        made = learned(path, *range(done + 1, 4))
        for step in range(max(done + 1, 4), 7):
            made.skipped(step, [step])
        made.rolled_back(6, to=2)
    learned(path, 7)
    assert ledger.read(path) == {**expected(1, 2, 7), **{step: [] for step in range(3, 7)}}


def test_a_line_that_was_cut_is_a_step_that_is_missing(path: Path) -> None:
    learned(path, 1, 2, 3)
    path.write_bytes(path.read_bytes()[:-4])
    assert ledger.read(path) == expected(1, 2)
    learned(path, 3, 4)
    assert ledger.read(path) == expected(1, 2, 3, 4)


def test_a_mended_ledger_holds_what_it_was_given_and_goes_on(path: Path) -> None:
    made = learned(path, 1, 2, 3)
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 7'))
    assert ledger.read(path) == expected(1, 3)
    made.mend(expected(1, 2, 3))
    assert ledger.read(path) == expected(1, 2, 3)
    made.learned(4, [40, 41])
    assert ledger.read(path) == expected(1, 2, 3, 4)
    assert journal.damaged(path) == 0


def test_a_ledger_that_was_cut_and_mended_has_no_damaged_line(path: Path) -> None:
    learned(path, 1, 2)
    path.write_bytes(path.read_bytes()[:-4])
    made = Ledger(path)
    made.mend(expected(1, 2))
    made.learned(3, [30, 31])
    assert ledger.read(path) == expected(1, 2, 3)
    assert journal.damaged(path) == 0
