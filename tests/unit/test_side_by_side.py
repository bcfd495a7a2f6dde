"""Several models' scores side by side: which is best, and when that may be chance."""

import math

import numpy as np
import pytest

from tunewright.evaluate import chance, side_by_side


def row(model, exact, loss, count=100, **more):
    return {
        "model": model, "exact_match": exact, "f1": exact, "count": count, "loss": loss, "perplexity": math.exp(loss), **more
    }  # fmt: skip


def table(*rows):
    return side_by_side.table({"rows": list(rows), "samples": []})


def test_the_best_of_each_column_is_marked():
    told = table(row("a", 0.2, 2.0), row("b", 0.6, 3.0), row("c", 0.4, 1.0))
    best = {
        name: [model for (model, cells) in told["rows"] if cells[place]["best"]]
        for place, name in enumerate(told["columns"])
    }
    assert best == {"Exact match": ["b"], "F1": ["b"], "Held-out loss": ["c"], "Perplexity": ["c"]}
    assert told["sentences"] == ["b is best by Exact match: 60.0%, before c with 40.0%."]


def test_a_difference_that_may_be_chance_is_called_so():
    told = table(row("a", 0.60, 2.0), row("b", 0.62, 2.0))
    assert told["sentences"][1] == "With 100 questions, a difference this small may be chance."
    assert len(table(row("a", 0.60, 2.0, 10_000), row("b", 0.62, 2.0, 10_000))["sentences"]) == 1


def test_rewards_come_first_and_have_errors_of_their_own():
    rows = [
        row("a", 0.5, 1.0, worth={"x.py:f": 1.0}, worth_error={"x.py:f": 0.2}),
        row("b", 0.5, 1.0, worth={"x.py:f": 1.5}, worth_error={"x.py:f": 0.2}, wins={"x.py:f": 0.7}),
    ]
    told = table(*rows)
    assert told["columns"][:2] == ["x.py:f", "Wins against a"]
    assert [cell["text"] for cell in told["rows"][0][1][:2]] == ["1.000", "–"]
    assert told["sentences"][0].startswith("b is best by x.py:f: 1.500")
    assert len(told["sentences"]) == 2  # 0.5 is less than 1.96 times 0.28
    rows[0]["worth_error"] = rows[1]["worth_error"] = {"x.py:f": 0.1}
    assert len(table(*rows)["sentences"]) == 1


def test_those_that_look_the_same_lead_together() -> None:
    told = table(row("a", 0.2, 2.0), row("b", 0.6, 3.0), row("c", 0.6001, 2.5))
    assert told["sentences"] == ["b and c are best by Exact match: 60.0%, before a with 20.0%."]
    assert [cells[0]["best"] for _, cells in told["rows"]] == [False, True, True]


def test_equal_models_are_not_told_apart():
    assert table(row("a", 0.5, 1.0), row("b", 0.5, 1.0))["sentences"] == [
        "No score tells these models apart."
    ]


def test_errors_of_means_are_those_of_the_textbook():
    values = np.random.default_rng(0).normal(size=(50, 3))
    expected = values.std(0, ddof=1) / math.sqrt(50)
    assert chance.mean_error(values) == pytest.approx(expected)
    assert chance.share_error(0.0, 100) > 0
