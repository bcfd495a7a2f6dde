"""The samples of step n follow from the lengths, the budget and the seed."""

from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.data.batching import BatchPlan, cut, epoch_batches, padding_share

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=200).map(np.array)
BUDGETS = st.integers(8, 400)
SEEDS = st.integers(0, 3)


def plan(lengths: np.ndarray, budget: int = 64, seed: int = 0) -> BatchPlan:
    return BatchPlan(lambda epoch: np.arange(len(lengths)), lengths, budget, seed)


def padded(batch: np.ndarray, lengths: np.ndarray) -> int:
    return len(batch) * int(lengths[batch].max())


def as_lists(batches: list[np.ndarray]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


@given(LENGTHS, BUDGETS, SEEDS)
def test_an_epoch_has_every_sample_exactly_once(lengths: np.ndarray, budget: int, seed: int) -> None:
    batches = plan(lengths, budget, seed).batches(3)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(batch) for batch in batches)


@given(LENGTHS, BUDGETS, SEEDS)
def test_a_batch_is_within_the_budget_or_one_long_sample(lengths: np.ndarray, budget: int, seed: int) -> None:
    for batch in plan(lengths, budget, seed).batches(0):
        assert padded(batch, lengths) <= budget or len(batch) == 1


@given(LENGTHS, BUDGETS)
def test_cutting_keeps_the_order(lengths: np.ndarray, budget: int) -> None:
    order = np.arange(len(lengths))[::-1]
    assert np.concatenate(cut(order, lengths, budget)).tolist() == order.tolist()


@given(LENGTHS, BUDGETS)
def test_cutting_opens_a_new_run_only_when_the_sample_would_not_fit(lengths: np.ndarray, budget: int) -> None:
    runs = cut(np.arange(len(lengths)), lengths, budget)
    for run, following in pairwise(runs):
        assert padded(np.append(run, following[0]), lengths) > budget


def test_cutting_by_hand() -> None:
    lengths = np.array([4, 4, 5, 50, 1, 1])
    assert as_lists(cut(range(6), lengths, 12)) == [[0, 1], [2], [3], [4, 5]]


@given(LENGTHS, BUDGETS, SEEDS)
def test_the_same_inputs_give_the_same_batches(lengths: np.ndarray, budget: int, seed: int) -> None:
    first, second = (as_lists(plan(lengths, budget, seed).batches(1)) for _ in range(2))
    assert first == second


def test_epochs_and_seeds_differ() -> None:
    lengths = np.arange(1, 101)
    orders = [as_lists(plan(lengths, seed=seed).batches(epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


@given(LENGTHS, BUDGETS, SEEDS, st.integers(0, 40))
def test_starting_late_is_skipping_steps(lengths: np.ndarray, budget: int, seed: int, step: int) -> None:
    whole = as_lists(list(islice(plan(lengths, budget, seed).start_at(0), step + 5)))
    assert as_lists(list(islice(plan(lengths, budget, seed).start_at(step), 5))) == whole[step:]


def test_starting_late_crosses_epochs() -> None:
    made = plan(np.full(6, 10), budget=20)
    first, second, third = (as_lists(made.batches(epoch)) for epoch in range(3))
    assert len(first) == 3
    assert as_lists(list(islice(made.start_at(4), 3))) == [second[1], second[2], third[0]]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 6), (0.5, 2), (1.5, 5), (0.01, 1), (2.1, 7)])
def test_steps_of_a_part_of_an_epoch_are_rounded_up(epochs: float, steps: int) -> None:
    assert plan(np.full(6, 10), budget=20).steps(epochs) == steps


def test_epochs_may_have_other_samples() -> None:
    made = BatchPlan(lambda epoch: np.array([epoch, epoch]), np.full(5, 10), 100, 0)
    assert as_lists(list(islice(made.start_at(0), 3))) == [[0, 0], [1, 1], [2, 2]]


def test_sorting_within_windows_leaves_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(8, 512, 4000)
    indices = np.arange(len(lengths))
    unsorted = padding_share(cut(indices, lengths, 4096), lengths)
    assert unsorted > 0.25
    assert padding_share(epoch_batches(indices, lengths, 4096, 0, 0), lengths) < 0.05


def test_padding_share_by_hand() -> None:
    lengths = np.array([1, 3, 4])
    assert padding_share([np.array([0, 1]), np.array([2])], lengths) == pytest.approx(2 / 10)
    assert padding_share([], lengths) == 0.0
