"""The learning rate at points that can be worked out by hand."""

from math import cos, pi

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.recipes import TrainConfig
from tunewright.train.schedule import rate

SCHEDULES = ["constant", "linear", "cosine", "wsd"]
SHARES = st.floats(0, 1)


def rates(schedule: str, steps: int = 10, **settings: float) -> list[float]:
    config = TrainConfig(schedule=schedule, **{"warmup": 0.0, **settings})
    return [rate(config, step, steps) for step in range(steps)]


def test_constant_is_1() -> None:
    assert rates("constant") == [1.0] * 10


def test_linear_falls_by_the_same_amount_every_step() -> None:
    assert rates("linear") == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_cosine_is_one_half_in_the_middle() -> None:
    found = rates("cosine")
    assert found[0] == 1.0
    assert found[5] == pytest.approx(0.5)
    assert found[9] == pytest.approx(0.5 * (1 + cos(0.9 * pi)))
    assert found == sorted(found, reverse=True)


def test_wsd_has_a_plateau_and_falls_at_the_end() -> None:
    assert rates("wsd", decay=0.4) == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert rates("wsd", decay=0.0) == [1.0] * 10


def test_wsd_rises_stays_and_falls() -> None:
    found = rates("wsd", steps=20, warmup=0.2, decay=0.25)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, *[1.0] * 11, 1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_to_1_in_equal_steps(schedule: str) -> None:
    found = rates(schedule, steps=100, warmup=0.05)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5] == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_single_step_has_the_whole_rate(schedule: str) -> None:
    assert rates(schedule, steps=1, warmup=0.03) == [1.0]


@given(st.sampled_from(SCHEDULES), st.integers(1, 300), SHARES, SHARES)
def test_every_rate_is_above_0_and_at_most_1(schedule: str, steps: int, warmup: float, decay: float) -> None:
    found = rates(schedule, steps, warmup=warmup, decay=decay)
    assert all(0.0 < factor <= 1.0 for factor in found)
    assert max(found) == 1.0 or (schedule == "wsd" and warmup + decay > 1.0)
