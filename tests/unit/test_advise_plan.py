"""Advice: what fits, what is chosen, and the reasons; the rules one by one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunewright.advise import configs, facts, hardware, past, reasons
from tunewright.advise.facts import Facts
from tunewright.advise.past import Measured
from tunewright.advise.plan import Plan, in_time, plans
from tunewright.advise.rules import CONDITIONS, holding, rules
from tunewright.advise.situation import GOALS, Situation
from tunewright.advise.trained import FAMILIES
from tunewright.core import machine, store
from tunewright.core import plugins as registered


def situation(
    model: str = "llama-2-7b", devices: str = "1xH100", data: Facts | None = None, **more: Any
) -> Situation:
    return Situation(model, configs.named(model), hardware.parse(devices), data or facts.assume(), **more)


def rows(**changes: Any) -> Facts:
    return replace(facts.assume(), assumed=False, **changes)


def chosen(*args: Any, **kwargs: Any) -> Plan:
    return plans(situation(*args, **kwargs))[0]


def test_seven_billion_on_one_device_are_for_lora() -> None:
    best = chosen()
    assert (best.method, best.placement.name, best.fits) == ("lora", "single", True)


def test_on_eight_all_weights_are_trained() -> None:
    assert (chosen(devices="8xH100").method, chosen(devices="8xH100").placement.name) == ("full", "zero2")


def test_seventy_billion_on_one_device_are_held_in_four_bits() -> None:
    best = chosen("llama-2-70b")
    assert best.method == "qlora"
    assert best.memory < 0.9 * best_memory(best, 80)


def best_memory(best: Plan, gigabytes: int) -> float:
    assert best.fits
    return gigabytes * 2**30


def test_where_nothing_fits_it_is_said() -> None:
    asked = situation("llama-2-70b", "1x8GB")
    best = plans(asked)[0]
    assert not best.fits
    assert any("does not fit" in words.en for words in reasons.of(asked, best))


def test_what_fits_comes_before_what_does_not() -> None:
    fitting = [plan.fits for plan in plans(situation("llama-2-7b", "1xRTX-4090"))]
    assert fitting == sorted(fitting, reverse=True)
    assert True in fitting


def test_least_memory_is_asked_for() -> None:
    best = chosen(goal="memory")
    assert best.method == "qlora"
    assert best.memory < chosen().memory / 2


def test_pairs_are_for_dpo_and_texts_for_pretraining() -> None:
    assert chosen(data=rows(kind="pairs")).choice.objective == "dpo"
    assert chosen(data=rows(kind="texts")).choice.objective == "pretrain"
    assert chosen(data=rows(kind="labels")).choice.objective == "classification"
    assert chosen(data=rows(kind="pairs"), objective="reward").choice.objective == "reward"


def test_tasks_have_adapters_of_their_own() -> None:
    best = chosen(data=rows(tasks=("sums", "facts")))
    assert (best.method, best.choice.options["tasks"]) == ("multi_task", ("sums", "facts"))
    assert "multi_task" not in [plan.method for plan in plans(situation())]
    assert chosen(goal="multi-task").method == "pfeiffer"


def test_few_rows_are_for_few_parameters() -> None:
    best = chosen(data=facts.assume(rows=100))
    assert (best.method, best.choice.options["rank"]) == ("lora", 4)
    assert chosen("llama-2-70b", "1xH200", facts.assume(rows=100)).method in ("qlora", "prompt")


def test_a_deadline_counts_against_what_is_late() -> None:
    asked = situation("llama-2-7b", "8xH100", deadline=2.0)
    late = plans(asked)
    assert any("more than the 2.0s" in words.en for words in reasons.of(asked, late[0]))
    full = next(plan for plan in late if plan.method == "full")
    assert full.score < next(p for p in plans(situation(devices="8xH100")) if p.method == "full").score


def test_a_deadline_is_met_by_fewer_passes_and_one_at_least() -> None:
    free = plans(situation())[0]
    whole = free.hours * 3600
    for deadline, epochs in ((1.1 * whole, free.epochs), (0.5 * whole, free.epochs / 2), (0.01 * whole, 1.0)):
        asked = situation(deadline=deadline)
        plan = next(plan for plan in plans(asked) if plan.method == free.method)
        assert plan.epochs == pytest.approx(epochs, abs=0.01)
        assert plan.hours / plan.epochs == pytest.approx(free.hours / free.epochs)
        told = any("to end within" in words.en for words in reasons.of(asked, plan))
        assert told is (1 < plan.epochs < free.epochs)
    measured = in_time(situation(deadline=0.5 * whole), replace(plan, hours=plan.hours / 4))
    assert measured.epochs == free.epochs
    too_short_to_tell = replace(free, hours=0.0)
    assert in_time(situation(deadline=1.0), too_short_to_tell) == too_short_to_tell


def test_a_device_without_bf16_holds_fp32() -> None:
    best = chosen(devices="1xV100")
    assert best.choice.precision == "fp16"
    assert any("no bf16" in words.en for words in best.reasons)


def test_what_is_offloaded_is_told() -> None:
    asked = situation()
    full = next(plan for plan in plans(asked) if plan.method == "full")
    assert full.placement.offload
    assert any("host" in words.en for words in reasons.of(asked, full))


def test_over_slow_links_a_simpler_placement_is_passed_over() -> None:
    full = next(plan for plan in plans(situation("llama-2-70b", "64xH100")) if plan.method == "full")
    assert full.placement.name == "tensor 8 + zero2 x 8"


def test_rows_far_longer_than_others_are_cut() -> None:
    data = rows(median=100, p95=200, longest=3000)
    assert (situation(data=data).length, situation(data=data).keeps_all) == (256, False)
    data = rows(median=100, p95=200, longest=300)
    assert (situation(data=data).length, situation(data=data).keeps_all) == (352, True)


RUN = Measured("runs-a", "lora", 1.5, 0.5, 1000.0, 1e9, here=True, steps=100)


def test_measured_losses_overrule_rules() -> None:
    found = plans(situation(), {"lora": RUN, "bitfit": replace(RUN, method="bitfit", loss=1.0)})
    assert [plan.method for plan in found[:2]] == ["bitfit", "lora"]
    assert "Measured in runs-a" in found[0].reasons[0].en
    assert "50.0%" in found[0].reasons[0].zh


def test_of_another_machine_only_the_loss_counts() -> None:
    here = situation()
    here = replace(here, fleet=replace(here.fleet, device=replace(here.fleet.device, here=True)))
    own = next(plan for plan in plans(here, {"lora": RUN}) if plan.method == "lora")
    assert (own.tokens_per_second, own.memory) == (1000.0, 1e9)
    other = next(plan for plan in plans(here, {"lora": replace(RUN, here=False)}) if plan.method == "lora")
    assert other.measured is None
    assert "Measured" in other.reasons[0].en


def stage(method: str, loss: float, sha256: str = "a", processor: str = "") -> dict[str, Any]:
    return {
        "name": method, "method": {"name": method}, "after": {"loss": loss, "exact_match": 0.5},
        "data": {"train": {"files": [{"sha256": sha256}]}},
        "train": {"tokens_per_second": 10.0, "peak_memory": 20, "steps": 30},
        "lineage": {"base": "builtin:pico",
                    "hardware": {"processor": processor or machine.processor(), "cores": machine.cores()}},
    }  # fmt: skip


def test_runs_of_the_same_model_and_data_are_read(tmp_path: Path) -> None:
    stages = [stage("lora", 2.0), stage("lora", 1.0, processor="another"), stage("full", 3.0, sha256="b")]
    compared = {"rows": [{"model": "stage:lora", "loss": 0.5}]}
    store.write_record(tmp_path / "one" / "results.json", {"stages": stages[:1]})
    store.write_record(tmp_path / "two" / "results.json", {"stages": stages[1:], "eval": compared})
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "results.json").write_text("{}")
    found = past.measured(tmp_path, "builtin:pico", ("a",))
    assert set(found) == {"lora"}
    assert (found["lora"].run, found["lora"].loss, found["lora"].here) == ("two", 0.5, False)
    assert not past.measured(tmp_path, "builtin:other", ("a",))


def test_rules_name_methods_objectives_and_conditions_that_there_are() -> None:
    names = [rule.id for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert {*rule.scores, *rule.options, *rule.rates} <= set(FAMILIES), rule.id
        assert set(rule.when) <= set(CONDITIONS), rule.id
        assert rule.words.en, rule.words.zh
        assert rule.source
        assert not rule.objective or rule.objective in registered.names("objectives")
        assert rule.when.get("goal", "quality") in GOALS


@pytest.mark.parametrize(
    ("rule", "one"),
    [("room-for-full", situation(devices="8xH100")), ("single-device-large-model", situation()),
     ("base-too-large", situation("llama-2-70b")), ("several-tasks", situation(data=rows(tasks=("a", "b")))),
     ("goal-multi-task", situation(goal="multi-task")), ("preferences", situation(data=rows(kind="pairs"))),
     ("own-answers", situation(objective="ppo")), ("alignment-without-pairs", situation(goal="alignment")),
     ("edge-device", situation("gpt2", "1x2GB")), ("little-data", situation(data=rows(rows=50))),
     ("little-data-large-model", situation("llama-2-70b", data=rows(rows=50))),
     ("very-much-data", situation(data=rows(rows=10**6))), ("continued-pretraining", situation(data=rows(kind="texts"))),
     ("labels", situation(data=rows(kind="labels"))), ("goal-quality", situation("gpt2", goal="quality")),
     ("goal-quality-low-rank", situation("llama-2-70b", goal="quality")), ("goal-speed", situation(goal="speed")),
     ("goal-memory", situation(goal="memory")), ("experts", situation("mixtral-8x7b")),
     ("no-bf16", situation(devices="1xV100")), ("first-choice", situation()),
     ("preferences-all-weights", situation(data=rows(kind="pairs")))],
)  # fmt: skip
def test_each_rule_holds_where_it_should(rule: str, one: Situation) -> None:
    fitting = {plan.method for plan in plans(one) if plan.fits and not plan.placement.offload}
    assert rule in [found.id for found in holding(one, fitting)]


def test_small_models_are_trained_whole() -> None:
    pico = Situation(
        "builtin:pico", configs.find("builtin:pico"), hardware.parse("1x8GB"), facts.assume(1000, 64)
    )
    best = plans(pico)[0]
    assert (best.method, best.lr) == ("full", 1e-3)
    assert [rule.id for rule in holding(pico, {"full", "lora"})] == ["first-choice", "small-model"]


@pytest.mark.parametrize(
    ("kind", "method", "rate"),
    [
        ("conversations", "full", 1e-3),
        ("texts", "full", 3e-3),
        ("pairs", "full", 3e-4),
        ("labels", "lora", 2e-3),
    ],
)
def test_rules_multiply_rates_by_what_is_learned(kind: str, method: str, rate: float) -> None:
    data = rows(rows=1000, kind=kind)
    pico = Situation("builtin:pico", configs.find("builtin:pico"), hardware.parse("1x8GB"), data)
    best = plans(pico)[0]
    assert (best.method, best.lr) == (method, pytest.approx(rate))


def test_all_weights_of_large_models_learn_preferences_slowly() -> None:
    pairs = {plan.method: plan for plan in plans(situation(data=rows(kind="pairs")))}
    talks = {plan.method: plan for plan in plans(situation())}
    assert pairs["full"].lr == pytest.approx(talks["full"].lr / 10)
    assert pairs["lora"].lr == talks["lora"].lr
