"""Plans that were tried have what was measured; the others are corrected by as much; what failed comes last."""

import json
from pathlib import Path

import pytest

from tunewright import advise, probe, trials
from tunewright.core import journal, store
from tunewright.core.errors import UserError

SLOWER = 0.5


@pytest.fixture
def answer(tmp_path: Path) -> advise.Answer:
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n}."}) + "\n" for n in range(300))
    )
    return advise.answer("", ["model=builtin:pico", f"data={data}", f"runs={tmp_path / 'runs'}"])


def tried(monkeypatch: pytest.MonkeyPatch, answer: advise.Answer, failing: str = "") -> list[str]:
    """Trials that reach half the predicted speed, and take 1 MB."""
    asked: list[str] = []
    predicted = {plan.method: plan.tokens_per_second for plan in answer.plans}

    def run(recipe, folder, name, *options):
        asked.append(name)
        assert recipe.stages[0].train.max_steps and not recipe.stages[0].evaluate.enabled
        if name == failing:
            return "killed by the system"
        rate = SLOWER * predicted[name]
        store.write_record(folder / name / "results.json", {"stages": [{"train": {"peak_memory": 1 << 20}}]})
        steps = [{"kind": "step", "tokens": 100 * n, "time": 100 * n / rate} for n in range(6)]
        (folder / name / "events.jsonl").write_bytes(b"".join(map(journal.line, steps)))
        return ""

    monkeypatch.setattr(trials, "run", run)
    return asked


def test_what_was_measured_replaces_what_was_predicted(answer, monkeypatch):
    asked = tried(monkeypatch, answer)
    found = probe.probed(answer, lambda line: None)
    assert asked == [plan.method for plan in answer.plans][:3]
    for before, after in zip(answer.plans, found.plans, strict=True):
        assert after.method == before.method
        assert after.tokens_per_second == pytest.approx(SLOWER * before.tokens_per_second)
        assert after.hours == pytest.approx(before.hours / SLOWER)
    assert [plan.memory for plan in found.plans[:3]] == [1 << 20] * 3
    assert found.plans[3].measured is None
    assert "predicted" in found.plans[0].reasons[0].en


def test_a_plan_that_failed_comes_last_with_its_reason(answer, monkeypatch):
    first = answer.plans[0].method
    tried(monkeypatch, answer, failing=first)
    found = probe.probed(answer, lambda line: None)
    assert found.plans[0].method == answer.plans[1].method
    assert (found.plans[-1].method, found.plans[-1].fits) == (first, False)
    assert found.plans[-1].reasons[0].en == "It was tried and failed: killed by the system"


def test_only_plans_for_this_machine_can_be_tried(tmp_path):
    other = advise.answer("", ["model=shape:llama-2-7b", "devices=1xA100-80GB"])
    with pytest.raises(UserError, match="--probe"):
        probe.probed(other, print)
