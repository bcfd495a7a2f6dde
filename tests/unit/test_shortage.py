"""Too little memory is told before training, with the cheapest change that helps, and only then is anything foreseen."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tunewright import foresight, jobs, pipeline, recipes, shortage
from tunewright.core import events
from tunewright.jobs import Job

FREE = 1 << 30


@pytest.fixture
def tree(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n}."}) + "\n" for n in range(8))
    )
    return {"model": str(tiny_model_folder), "method": "full", "data": {"train": str(data), "valid_share": 0},
            "train": {"tokens_per_batch": 2048, "max_steps": 1}, "evaluate": {"enabled": False}, "output": str(tmp_path / "run")}  # fmt: skip


@pytest.fixture
def job(tree: dict[str, Any]) -> Job:
    return jobs.check(recipes.load(tree))[0]


@dataclass
class Peak:
    peak: int


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "available_memory", lambda: FREE)
    monkeypatch.setattr(shortage, "own_bytes", lambda: 0)
    monkeypatch.setattr(shortage, "_bound", lambda job: 2.0 * FREE)


def foretold(monkeypatch: pytest.MonkeyPatch, peak) -> None:
    monkeypatch.setattr(foresight, "foresee", lambda job: Peak(peak(job.stage)))


def test_where_memory_is_plenty_nothing_is_foreseen(job, monkeypatch):
    monkeypatch.setattr(foresight, "foresee", lambda job: pytest.fail("not needed"))
    assert shortage.of(job) is None


def test_what_fits_is_no_shortage(job, scarce, monkeypatch):
    foretold(monkeypatch, lambda stage: FREE)
    assert shortage.of(job) is None


@pytest.mark.parametrize(
    ("helps", "change"),
    [
        (lambda stage: stage.train.micro_tokens == 1024, {"train.micro_tokens": 1024}),
        (lambda stage: stage.train.micro_tokens == 512, {"train.micro_tokens": 512}),
        (lambda stage: stage.train.gradient_checkpointing, {"train.gradient_checkpointing": True}),
        (lambda stage: stage.method["name"] == "qlora", {"method": "qlora", "train.micro_tokens": 512}),
        (lambda stage: False, {}),
    ],
)
def test_the_cheapest_change_that_fits_is_named(job, scarce, monkeypatch, helps, change):
    foretold(monkeypatch, lambda stage: FREE // 2 if helps(stage) else 3 * FREE)
    found = shortage.of(job)
    assert found and (found.need, found.free, found.change) == (3 * FREE, FREE, change)


def test_what_the_recipe_has_already_is_not_foreseen_again(tree, scarce, monkeypatch):
    tree["train"] |= {"gradient_checkpointing": True, "micro_tokens": 256}
    tree["method"] = "lora"
    seen = list[Any]()
    foretold(monkeypatch, lambda stage: seen.append(stage) or 3 * FREE)
    found = shortage.of(jobs.check(recipes.load(tree))[0])
    assert found and not found.change
    assert len(seen) == 1


def test_what_cannot_be_foreseen_is_no_shortage(job, scarce, monkeypatch):
    def fail(job: Job) -> None:
        raise RuntimeError("no shapes")

    monkeypatch.setattr(foresight, "foresee", fail)
    assert shortage.of(job) is None


def test_a_run_tells_it_first(tree, scarce, monkeypatch):
    foretold(monkeypatch, lambda stage: FREE // 2 if stage.train.gradient_checkpointing else 3 * FREE)
    run = pipeline.run(recipes.load(tree), quiet=True)
    told = list(events.read(run.folder / "events.jsonl"))
    (short,) = [event for event in told if event["kind"] == "shortage"]
    assert short["change"] == ["train.gradient_checkpointing=true"]
    assert told.index(short) < [event["kind"] for event in told].index("train")


def test_a_run_that_is_to_begin_at_once_foresees_nothing(tree, scarce, monkeypatch):
    monkeypatch.setattr(foresight, "foresee", lambda job: pytest.fail("not wanted"))
    run = pipeline.run(recipes.load(tree), quiet=True, foresees=False)
    assert "shortage" not in [event["kind"] for event in events.read(run.folder / "events.jsonl")]
