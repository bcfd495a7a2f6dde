"""Randomness is a function of (seed, stream, step), nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunewright.core.rng import derive, permutation, sow


def test_the_same_inputs_give_the_same_seed_on_every_machine_and_call() -> None:
    assert derive(0, "order", 3) == derive(0, "order", 3) == 5172884068272721061


def test_seed_stream_and_step_all_matter() -> None:
    assert (
        len({derive(0, "order", 0), derive(1, "order", 0), derive(0, "batches", 0), derive(0, "order", 1)})
        == 4
    )


@given(st.integers(0, 2**40), st.text(max_size=8), st.integers(0, 2**40))
def test_a_seed_has_63_bits(seed: int, stream: str, step: int) -> None:
    assert 0 <= derive(seed, stream, step) < 2**63


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 200))
def test_a_permutation_holds_every_number_once(seed: int, step: int, count: int) -> None:
    assert sorted(permutation(seed, "order", step, count)) == list(range(count))


def test_permutations_repeat_and_streams_differ() -> None:
    first = permutation(0, "order", 0, 50)
    assert np.array_equal(first, permutation(0, "order", 0, 50))
    others = [
        permutation(1, "order", 0, 50),
        permutation(0, "batches", 0, 50),
        permutation(0, "order", 1, 50),
    ]
    assert not any(np.array_equal(first, other) for other in others)


def test_drawing_elsewhere_changes_nothing() -> None:
    before = permutation(0, "order", 0, 50)
    np.random.default_rng(0).random(10)
    np.random.seed(1)
    assert np.array_equal(before, permutation(0, "order", 0, 50))


@pytest.mark.parametrize(("seed", "stream", "step"), [(0, "init", 0), (7, "micro-3", 12)])
def test_what_is_sown_is_what_torch_draws(seed: int, stream: str, step: int) -> None:
    torch.manual_seed(derive(seed, stream, step))
    expected = torch.rand(8)
    sow(seed, stream, step)
    assert torch.equal(torch.rand(8), expected)
