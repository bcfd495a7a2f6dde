"""Plans that were tried have what was measured; the others are corrected by as much; what failed comes last."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tunewright import advise, children, probe, recipes
from tunewright.children import Begun
from tunewright.core.errors import UserError

SLOWER, PEAK, TOKENS = 0.5, 1 << 20, 2048
COLD = 3.0
"""Seconds that the first step takes longer."""


@pytest.fixture
def answer(tmp_path: Path) -> advise.Answer:
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n}."}) + "\n" for n in range(300))
    )
    return advise.answer("", ["model=builtin:pico", f"data={data}", f"runs={tmp_path / 'runs'}"])


@dataclass
class World:
    """Runs of half the predicted speed, which take 1 MB."""

    predicted: dict[str, float]
    begun: list[tuple[str, dict]] = field(default_factory=list)
    """Method and training dials of each."""
    reason: Callable[[str, dict], str] = lambda method, train: ""
    peak: Callable[[str, dict], int] = lambda method, train: PEAK
    loss: Callable[[float], float] = lambda rate: 1.0
    faster: Callable[[str], float] = lambda precision: 1.0
    drifts: Callable[[int], float] = lambda count: 1.0
    """How fast the machine is for the run of this number."""
    cold: float = COLD
    steps: Callable[[dict], float] = lambda train: 60
    limit: int = 0
    measures: bool = True
    """Whether measuring is a part of the run, whose memory is told, too."""

    def run(self, recipe, output, folder, name, count, patience, memory) -> Begun:
        stage = recipes.load(yaml.safe_load(recipe)).stages[0]
        assert output == folder / name
        method, train = stage.method["name"], stage.train.model_dump()
        self.begun.append((method, train))
        assert memory == self.limit
        assert not stage.evaluate.enabled
        assert bool(stage.train.eval_every) is (self.measures and not stage.train.max_steps)
        if reason := self.reason(method, train):
            return Begun([], reason)
        each = TOKENS / (
            SLOWER * self.predicted[method] * self.faster(stage.precision) * self.drifts(len(self.begun))
        )
        micro = train["micro_tokens"] or 1024
        steps = [
            {"kind": "step", "step": n, "tokens": TOKENS * n, "time": self.cold + each * n, "memory": self.peak(method, train), "loss": self.loss(train["lr"])}
            for n in range(1, count + 1)
        ]  # fmt: skip
        return Begun(
            [{"kind": "train", "time": 0.0, "steps": self.steps(train), "micro_tokens": micro}, *steps], ""
        )

    def dials(self, name: str) -> list:
        """One of all runs."""
        return [train[name] for _, train in self.begun]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, answer: advise.Answer) -> World:
    made = World({plan.method: plan.tokens_per_second for plan in answer.plans})
    monkeypatch.setattr(children, "first_steps", made.run)
    return made


def found(answer: advise.Answer, **how) -> advise.Answer:
    return probe.probed(answer, lambda line: None, **{"rates": False, **how})


def test_what_was_measured_replaces_what_was_predicted(answer, world):
    after = found(answer)
    names = [plan.method for plan in answer.plans]
    assert {method for method, _ in world.begun} == set(names[:3])
    assert [plan.method for plan in after.plans] == names
    for before, plan in zip(answer.plans, after.plans, strict=True):
        assert plan.tokens_per_second == pytest.approx(SLOWER * before.tokens_per_second)
    first = after.plans[0]
    assert first.hours * 3600 == pytest.approx(COLD + 60 * TOKENS / first.tokens_per_second)
    assert after.plans[3].hours == pytest.approx(answer.plans[3].hours / SLOWER)
    assert [plan.memory for plan in after.plans[:3]] == [PEAK] * 3
    assert after.plans[3].measured is None
    told = after.stage()["advised"]
    assert told["tokens_per_second"] * told["seconds"] == pytest.approx(60 * TOKENS, rel=1e-3)
    assert told["tokens_per_second"] < first.tokens_per_second
    assert "predicted" in first.reasons[-1].en


def test_so_many_tokens_at_a_time_as_were_found_to_be_fastest(answer, world):
    after = found(answer)
    assert world.dials("micro_tokens")[0] is None
    stage = after.stage()
    assert stage["train"]["micro_tokens"] == 1024
    assert stage["advised"]["tried"] == 10


def test_what_takes_too_much_is_cut_smaller_and_then_recomputed(answer, world):
    most = answer.question.situation.fleet.device.memory
    world.peak = lambda method, train: PEAK if train["gradient_checkpointing"] else most
    after = found(answer, tries=1)
    assert world.dials("gradient_checkpointing") == [False] * 4 + [True] + [True] * (len(world.begun) - 5)
    assert world.dials("micro_tokens")[:5] == [None, 1024, 512, 256, 256]
    assert after.stage()["train"]["gradient_checkpointing"]
    assert after.plans[0].fits


def test_a_faster_precision_is_taken(answer, world):
    assert found(answer, tries=1).plans[0].choice.precision == "bf16"
    world.faster = lambda precision: 2.0 if precision == "fp32" else 1.0
    best = found(answer, tries=1).plans[0]
    assert best.choice.precision == "fp32"
    assert "precision" in best.tuned


def test_the_rate_with_the_lowest_loss_is_taken(answer, world):
    world.loss, world.faster = lambda rate: 1 / rate, lambda precision: 100.0
    after = found(answer, tries=1, rates=True)
    assert after.plans[0].lr == pytest.approx(27 * answer.plans[0].lr, rel=0.05)
    _, steps = sorted(set(world.dials("max_steps")), key=bool)
    assert 8 <= steps <= 40
    assert f"tried for {steps} steps" in after.plans[0].reasons[-2].en
    assert f"{after.plans[0].lr:.1e} is taken" in after.plans[0].reasons[-2].en


@pytest.mark.parametrize(("how", "speed"), [({}, 115.0), ({"tries": 1}, 130.0)])
def test_the_first_of_several_plans_is_looked_at_twice(answer, world, how, speed):
    """On a machine that is faster while plans are tried."""
    tries = how.get("tries", probe.TRIES)
    world.drifts = lambda count: 130.0 if count <= tries else 100.0
    best = found(answer, **how).plans[0]
    predicted = answer.plans[0].tokens_per_second
    assert best.tokens_per_second == pytest.approx(speed * SLOWER * predicted)
    assert best.hours * 3600 == pytest.approx(COLD + 60 * TOKENS / best.tokens_per_second)
    assert f"{best.tokens_per_second:,.0f} tokens/s (predicted {predicted:,.0f})" in best.reasons[-1].en


def test_rates_are_not_tried_where_it_takes_too_long(answer, world):
    world.faster = lambda precision: 0.01
    best = found(answer, tries=1, rates=True).plans[0]
    assert best.lr == answer.plans[0].lr
    assert best.reasons[-2].en == "No rates were tried, it would take too long."


def test_what_a_recipe_says_stays(tmp_path, answer, world):
    stage = {
        "model": "builtin:pico", "data": {"train": str(answer.question.data.train[0].path)}, "method": {"name": "auto"},
        "precision": "bf16", "train": {"lr": 7e-4, "micro_tokens": 512, "tokens_per_batch": 2048, "epochs": 2},
    }  # fmt: skip
    after = found(advise.answer_about(stage, {"runs": str(tmp_path)}), rates=True)
    assert set(world.dials("lr")) == {7e-4}
    assert set(world.dials("micro_tokens")) == {512}
    assert {"lr": 7e-4, "micro_tokens": 512, "epochs": 2}.items() <= after.stage()["train"].items()


def test_measuring_is_rehearsed_only_where_it_is_done(tmp_path, answer, world):
    world.measures = False
    stage = {
        "model": "builtin:pico", "data": {"train": str(answer.question.data.train[0].path)}, "method": {"name": "auto"},
        "evaluate": {"enabled": False},
    }  # fmt: skip
    found(advise.answer_about(stage, {"runs": str(tmp_path)}), tries=1)
    assert world.begun


def test_a_plan_that_failed_comes_last_with_its_reason(answer, world):
    first = answer.plans[0].method
    world.reason = lambda method, train: "killed by the system" if method == first else ""
    after = found(answer)
    assert after.plans[0].method == answer.plans[1].method
    assert (after.plans[-1].method, after.plans[-1].fits) == (first, False)
    assert after.plans[-1].reasons[0].en == "It was tried and failed: killed by the system"


@pytest.mark.parametrize(
    ("deadline", "speed", "thought", "tried"),
    [
        (0.9, 2.0, "lora", ["full"]),  # thought late and is not
        (1.1, 0.8, "full", ["full", "lora"]),  # thought on time and is late
        (0.4, 0.8, "full", ["lora", "full"]),  # all are, one of them by far
    ],
)
def test_what_is_late_is_told_by_what_was_tried(tmp_path, answer, world, deadline, speed, thought, tried):
    full = answer.plans[0]
    tokens = full.hours * 3600 * full.tokens_per_second / full.epochs  # of a pass
    world.cold, world.steps = 0.0, lambda train: tokens * train["epochs"] / TOKENS
    world.faster = lambda precision: speed / SLOWER
    asked = [f"data={answer.question.data.train[0].path}", f"runs={tmp_path}"]
    asked += [f"deadline={deadline * tokens / full.tokens_per_second:.6f}s"]
    named = advise.answer("", ["model=builtin:pico", *asked])
    assert named.plans[0].method == thought
    after = found(named, tries=1)
    assert list(dict.fromkeys(method for method, _ in world.begun)) == tried
    assert after.plans[0].method == tried[-1]


def test_what_hardly_fits_by_computing_is_tried(tmp_path, answer, world):
    world.limit = 560 << 20
    data = answer.question.data.train[0].path
    named = advise.answer("", ["model=builtin:pico", f"data={data}", f"runs={tmp_path}", "memory=560MiB"])
    assert not any(plan.fits for plan in named.plans)
    assert found(named, tries=1).plans[0].fits


def test_memory_that_is_named_is_all_that_a_try_gets(tmp_path, answer, world):
    world.limit = 3 << 30
    data = answer.question.data.train[0].path
    named = advise.answer("", ["model=builtin:pico", f"data={data}", f"runs={tmp_path}", "memory=3GiB"])
    assert found(named, tries=1).plans[0].fits


def test_only_plans_for_this_machine_can_be_tried(tmp_path):
    other = advise.answer("", ["model=shape:llama-2-7b", "devices=1xA100-80GB"])
    with pytest.raises(UserError, match="--probe"):
        probe.probed(other, print)
