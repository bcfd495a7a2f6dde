"""Advice that has been tried: a few real steps of the best plans, each in a process of its own, correct what was predicted."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean, median

import yaml

from tunewright import trials
from tunewright.advise import Answer, recipe
from tunewright.advise.past import Measured
from tunewright.advise.placement import HEADROOM
from tunewright.advise.plan import Plan
from tunewright.core import events, store
from tunewright.core.errors import Problem, UserError
from tunewright.core.units import human_bytes, human_seconds
from tunewright.core.words import Words
from tunewright.recipes import load

Tell = Callable[[str], None]
_TRIED = 3
"""Plans."""
_STEPS = 6
_COLD = 2
"""Steps that also warm up."""


def probed(answer: Answer, tell: Tell) -> Answer:
    """The same plans, the best of them with measured speed and memory, the speeds of the others corrected by as much.

    Plans that ended badly or do not fit come after those that did well; among these the order stays.

    Raises:
        UserError: it was asked for another machine than this one, or without data or a model that can be trained.
    """
    situation = answer.question.situation
    if not situation.fleet.device.here:
        what = "only plans for this machine can be tried, and devices were named"
        raise UserError(Problem("--probe", what, "leave out devices="))
    first = [plan for plan in answer.plans if plan.fits][:_TRIED]
    with tempfile.TemporaryDirectory() as folder:
        tried = [_tried(answer, plan, Path(folder), tell) for plan in first]
    ratios = [
        now.tokens_per_second / before.tokens_per_second
        for before, now in zip(first, tried, strict=True)
        if now.measured
    ]
    factor = geometric_mean(ratios) if ratios else 1.0
    others = [_faster(plan, factor) for plan in answer.plans if plan not in first]
    return replace(answer, plans=tuple(_ordered([*tried, *others])))


def _ordered(plans: Iterable[Plan]) -> list[Plan]:
    return sorted(plans, key=lambda plan: not plan.fits)


def _faster(plan: Plan, factor: float) -> Plan:
    return replace(plan, tokens_per_second=plan.tokens_per_second * factor, hours=plan.hours / factor)


def _tried(answer: Answer, plan: Plan, folder: Path, tell: Tell) -> Plan:
    tell(f"trying {plan.method}: {_STEPS} steps")
    text = recipe.text(answer.question, plan, "en", str(folder / plan.method))
    changes = {
        "train.max_steps": _STEPS,
        "train.save_every": 0,
        "train.eval_every": 0,
        "evaluate.enabled": False,
    }
    failed = trials.run(load(yaml.safe_load(text), changes), folder, plan.method)
    if failed:
        words = Words(f"It was tried and failed: {failed}", f"试运行失败：{failed}")
        return replace(plan, fits=False, reasons=(words, *plan.reasons))
    stage = store.read_record(folder / plan.method / "results.json")["stages"][0]
    rate = _rate(events.read(folder / plan.method / "events.jsonl"))
    peak = float(stage["train"]["peak_memory"])
    done = Measured("", plan.method, float("nan"), None, rate, peak, here=True)
    now = _faster(plan, rate / plan.tokens_per_second)
    told = _told(plan, done)
    memory = answer.question.situation.fleet.device.memory
    return replace(now, measured=done, fits=peak <= (1 - HEADROOM) * memory, reasons=(told, *plan.reasons))


def _rate(log: Iterable[events.Event]) -> float:
    """Tokens a second of the middle step, once warm."""
    steps = [event for event in log if event["kind"] == "step"][_COLD - 1 :]
    return median(_between(steps))


def _between(steps: list[events.Event]) -> Iterator[float]:
    for before, after in pairwise(steps):
        yield (after["tokens"] - before["tokens"]) / max(after["time"] - before["time"], 1e-9)


def _told(plan: Plan, done: Measured) -> Words:
    """What came out beside what was predicted."""
    rate, speed = f"{done.tokens_per_second:,.0f}", f"{plan.tokens_per_second:,.0f}"
    peak, memory = human_bytes(done.peak_memory), human_bytes(plan.memory)
    took = human_seconds(plan.hours * 3600 * plan.tokens_per_second / done.tokens_per_second)
    return Words(
        f"Tried for {_STEPS} steps: {rate} tokens/s (predicted {speed}), {peak} (predicted {memory}); so {took} in all.",
        f"试运行 {_STEPS} 步：{rate} 词元/秒（预测 {speed}），内存 {peak}（预测 {memory}）；全程约 {took}。",
    )
