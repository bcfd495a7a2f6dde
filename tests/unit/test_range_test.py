"""The range test of the learning rate: neighbours are tried, an end that is best is passed, little is not enough."""

import math

import pytest

from tunewright.range_test import range_test


def bowl(best: float):
    """A loss that is lowest at a rate, and grows by 0.1 for each factor of three."""
    return lambda rate: 1 + 0.1 * abs(math.log(rate / best, 3))


def test_the_expected_rate_stays_where_it_is_best():
    found = range_test(1e-3, bowl(1e-3))
    assert found.rate == 1e-3
    assert sorted(found.losses) == pytest.approx([1e-3 / 3, 1e-3, 3e-3])


@pytest.mark.parametrize("factor", [9.0, 3.0, 1 / 3, 1 / 9])
def test_a_best_end_is_passed(factor):
    found = range_test(1e-3, bowl(factor * 1e-3))
    assert found.rate == pytest.approx(factor * 1e-3)
    assert len(found.losses) == (5 if factor in (9.0, 1 / 9) else 4)


def test_what_is_hardly_better_is_not_taken():
    assert range_test(1e-3, lambda rate: 1 - 0.01 * (rate > 1e-3)).rate == 1e-3


def test_rates_that_fail_are_never_taken():
    found = range_test(1e-3, lambda rate: None if rate > 2e-4 else bowl(1e-3 / 9)(rate))
    assert found.rate == pytest.approx(1e-3 / 9)
    assert found.losses[1e-3] == math.inf


def test_where_all_fail_the_expected_rate_stays():
    found = range_test(1e-3, lambda rate: math.nan)
    assert (found.rate, len(found.losses)) == (1e-3, 5)
