"""What survives a kill besides weights and moments."""

import json
import math
from dataclasses import fields
from typing import Any

import pytest

from tunewright.train import guard
from tunewright.train.state import TrainState


def test_a_state_comes_back_from_json_as_it_was() -> None:
    state = TrainState(7, 1234, 567, 0.1 + 0.2, 1 / 3, 5, 2, 1024.0, 99)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_no_loss_measured_yet_is_null_in_json() -> None:
    tree = TrainState().to_json()
    assert tree["best_loss"] is None
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert TrainState.from_json(tree) == TrainState()
    assert math.isinf(TrainState.from_json(tree).best_loss)


def test_what_an_older_version_did_not_know_is_as_at_the_start() -> None:
    assert TrainState.from_json({"step": 1, "tokens": 9}) == TrainState(step=1, tokens=9)


def test_a_state_without_a_step_is_not_read() -> None:
    with pytest.raises(KeyError, match="step"):
        TrainState.from_json({"tokens": 1})


def test_the_lowest_loss_is_the_best() -> None:
    state = TrainState()
    found = []
    for step, loss in enumerate([3.0, 2.0, 2.5, 2.0, 1.0], 1):
        state.step = step
        found.append((state.measured(loss), state.best_step, state.evals_since_best))
    assert found == [(True, 1, 0), (True, 2, 0), (False, 2, 1), (False, 2, 2), (True, 5, 0)]
    assert state.best_loss == 1.0


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    state = TrainState(step=1)
    assert not state.measured(math.nan)
    assert (state.best_step, state.evals_since_best) == (0, 1)


def test_the_loss_scale_is_halved_on_overflow() -> None:
    state = TrainState(loss_scale=1024.0, scaled_steps=50)
    state.rescale(overflowed=True)
    assert (state.loss_scale, state.scaled_steps) == (512.0, 0)


def test_the_loss_scale_is_doubled_after_two_thousand_clean_steps() -> None:
    state = TrainState(loss_scale=1024.0)
    for _ in range(1999):
        state.rescale(overflowed=False)
    assert state.loss_scale == 1024.0
    state.rescale(overflowed=False)
    assert state.loss_scale == 2048.0
    state.rescale(overflowed=True)
    for _ in range(1999):
        state.rescale(overflowed=False)
    assert state.loss_scale == 1024.0


def test_the_newest_losses_are_remembered_and_learning_ends_a_row_of_spikes() -> None:
    state = TrainState()
    for n in range(guard.WINDOW + 10):
        state.learned(float(n))
    assert state.recent == [float(n) for n in range(10, guard.WINDOW + 10)]
    state.passed_over()
    state.passed_over()
    assert (state.spikes, state.skipped, len(state.recent)) == (2, 2, guard.WINDOW)
    state.learned(1.0)
    assert (state.spikes, state.skipped, state.recent[-1]) == (0, 2, 1.0)


def test_every_field_survives_a_kill() -> None:
    numbers = iter(range(1, 100))
    given: dict[str, Any] = {
        f.name: [0.5, next(numbers)] if f.name == "recent" else next(numbers) for f in fields(TrainState)
    }
    state = TrainState(**given)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert set(state.to_json()) == set(given)
