"""What is foreseen of memory is what the same step takes with values, for every method and every objective."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from counted import Counted
from school import School

from tunewright import foresight, jobs, recipes
from tunewright.core import plugins
from tunewright.objectives import kind
from tunewright.objectives._policy import Policy

ROWS: dict[str, dict[str, Any]] = {
    "texts": {"text": "The cat saw some birds and slept. " * 6},
    "conversations": {"prompt": "Say one and two. " * 4, "completion": "One, then two. " * 8},
    "pairs": {"prompt": "Say one and two. " * 4, "chosen": "One, two. " * 9, "rejected": "Now three. " * 7},
    "labels": {"text": "The cat saw some birds. " * 6, "label": 1},
    "verdicts": {"prompt": "Say one. " * 5, "completion": "One. " * 9, "label": True},
}
TABLES = 150_000
"""Bytes of NF4's tables, which are counted where they are made first."""
WORTH = "def worth(asked, answer):\n    return len(answer) % 7\n"


def job(school: School, folder: Path, method: str = "full", objective: str = "sft") -> jobs.Job:
    architecture = next(a for a in school.sources if school(method, a))
    data = folder / "data.jsonl"
    row = ROWS[kind(objective).wants]
    data.write_text(
        "".join(
            json.dumps({**row, **({"label": n % 2} if objective == "classification" else {})}) + "\n"
            for n in range(24)
        )
    )
    options = {**school.options(method, architecture).model_dump(), "name": method}
    learned: dict[str, Any] = {"name": objective}
    if issubclass(kind(objective), Policy):
        (folder / "worth.py").write_text(WORTH)
        learned |= {"rewards": [f"{folder / 'worth.py'}:worth"], "group": 2, "longest": 4}
    if objective == "distill":
        learned |= {"teacher": f"model:{school.sources['llama'].path}"}
    tree = {
        "model": school.sources[architecture].path, "method": options, "objective": learned, "output": str(folder / "run"),
        "data": {"train": str(data), "valid_share": 0.2, "max_length": 64, "on_bad_row": "skip"},
        "train": {"tokens_per_batch": 512}, "fast": {"compile": False}, "evaluate": {"enabled": False},
    }  # fmt: skip
    return jobs.check(recipes.load(tree))[0]


def compared(one: jobs.Job) -> tuple[foresight.Foreseen, foresight.Foreseen]:
    return foresight.foresee(one), foresight.foreseen(one, Counted)


def beside(found: foresight.Foreseen) -> int:
    """All but weights, which a file that is mapped does not let be counted."""
    return found.optimizer + found.training


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PEFT moves layers
@pytest.mark.parametrize("method", plugins.names("methods"))
def test_every_method(school: School, tmp_path, method):
    foreseen, counted = compared(job(school, tmp_path, method))
    assert foreseen.weights == counted.weights
    assert beside(foreseen) == pytest.approx(beside(counted), rel=0.01, abs=TABLES)


@pytest.mark.parametrize("objective", [name for name in plugins.names("objectives") if name != "distill"])
def test_every_objective(school: School, tmp_path, objective):
    foreseen, counted = compared(job(school, tmp_path, objective=objective))
    explores = issubclass(kind(objective), Policy)  # answers that are drawn are of other lengths
    assert beside(foreseen) == pytest.approx(beside(counted), rel=0.03 if explores else 0.01)


def test_what_asks_another_model_is_not_foreseen(school: School, tmp_path):
    assert foresight.why_not(job(school, tmp_path, objective="distill")) == "it asks other models"


def test_nothing_without_values_stays(school: School, tmp_path):
    """NF4's tables are made once for all and kept."""
    one = job(school, tmp_path, "qlora")
    foresight.foresee(one)
    model = one.method.apply(one.method.load_base(one.source, "bf16"))
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


def test_what_cannot_be_foreseen_is_said(school: School, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError("no shapes")

    monkeypatch.setattr(foresight, "trainer_of", fail)
    with pytest.raises(RuntimeError, match="ValueError: no shapes"):
        foresight.foresee(job(school, tmp_path))
