"""Advice that has been tried: real first steps of the best plans, each in a process of its own and with no more memory
than there is, correct what was predicted; the dials of the first of them are the fastest that fit.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import yaml

from tunewright import children
from tunewright.advise import Answer
from tunewright.advise.memory import ON_POLICY
from tunewright.advise.past import Measured
from tunewright.advise.placement import HEADROOM, MEASURED_HEADROOM
from tunewright.advise.plan import Plan, in_time, ranked
from tunewright.advise.question import Question
from tunewright.advise.recipe import LR, MICRO, PRECISION, tree
from tunewright.children import Begun
from tunewright.core.errors import Problem, UserError
from tunewright.core.units import human_bytes, human_seconds
from tunewright.core.words import Words
from tunewright.range_test import range_test

Tell = Callable[[str], None]
TRIES = 3
"""Plans."""
_STEPS = 10
_PATIENCE = 10.0
"""Seconds after which fewer steps are enough."""
_NEVER = 1 << 30
"""A step that no run comes to: measuring is rehearsed before the first one, and not done."""
_NEARLY = 1.3
"""What is computed may be a little too much: a plan that does not fit by so little is tried all the same."""
_MUCH_LATER = 2.0
"""What is computed of time may be so many times too much: what comes later than that is tried only if nothing is on time."""
_LEAST = 256
"""Tokens at a time that are not cut further."""
_FASTER = 1.05
"""So much faster must another precision be to be taken."""
_RATE_STEPS = (8, 40)
"""Steps that a learning rate is tried for, at least and at most."""
_RATE_SHARE, _RATE_SECONDS, _RATES = 0.25, 100.0, 4
"""Trying some four rates may take a quarter of the run's time, or so many seconds if that is more."""


def probed(answer: Answer, tell: Tell, tries: int = TRIES, rates: bool = True) -> Answer:
    """The same plans, the best of them with measured speed and memory, the speeds of the others corrected by as much;
    the first has its fastest dials, and with ``rates`` the learning rate of a range test.

    Plans that ended badly or do not fit come after those that did well, and whether one is late is what its tried speed
    says. The first is one that was tried, for as many tries again as were asked for.

    Raises:
        UserError: it was asked for another machine than this one, or without data or a model that can be trained.
    """
    situation = answer.question.situation
    if not situation.fleet.device.here:
        what = "only plans for this machine can be tried, and devices were named"
        raise UserError(Problem("--probe", what, "leave out devices="))
    most = _NEARLY * situation.fleet.device.memory
    latest = _MUCH_LATER * situation.deadline
    hoped = ranked(replace(plan, late=plan.late and plan.hours * 3600 > latest) for plan in answer.plans)
    first = [plan for plan in hoped if plan.fits or plan.memory <= most][:tries]
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(answer.question, Path(folder), tell)
        tried = {plan.method: bench.tried(plan) for plan in first}
        best, *rest = _corrected(answer, tried)
        while best.fits and best.method not in tried and len(tried) < 2 * tries:
            tried[best.method] = bench.tried(best)
            best, *rest = _corrected(answer, tried)
        if best.method in tried and best.fits:
            best = bench.settled(best)
            best = bench.rated(best) if rates else best
            best = bench.looked_at_again(best) if tries > 1 else best
    return replace(answer, plans=tuple(_with_figures(answer, plan) for plan in (best, *rest)))


def rated(answer: Answer, tell: Tell) -> Answer:
    """Only the range test, for the first plan."""
    with tempfile.TemporaryDirectory() as folder:
        best, *rest = answer.plans
        return replace(answer, plans=(_Bench(answer.question, Path(folder), tell).rated(best), *rest))


def _corrected(answer: Answer, tried: Mapping[str, Plan]) -> list[Plan]:
    """What was tried, by method, and the others as fast as that lets expect, best first."""
    predicted = {plan.method: plan.tokens_per_second for plan in answer.plans}
    ratios = [plan.tokens_per_second / predicted[name] for name, plan in tried.items() if plan.fits]
    factor = geometric_mean(ratios) if ratios else 1.0
    others = (_faster(plan, factor) for plan in answer.plans if plan.method not in tried)
    return ranked([*tried.values(), *(in_time(answer.question.situation, plan) for plan in others)])


def _faster(plan: Plan, factor: float) -> Plan:
    cold = plan.cold / 3600
    hours = cold + (plan.hours - cold) / factor
    return replace(plan, tokens_per_second=plan.tokens_per_second * factor, hours=hours)


@dataclass
class _Bench:
    """Where plans are tried."""

    question: Question
    folder: Path
    tell: Tell
    count: int = 0
    """Of runs that were begun."""

    def tried(self, plan: Plan) -> Plan:
        """With what was measured; cut smaller, then recomputed, until it fits. Not fitting, if nothing helps."""
        reason = ""
        for way, dials in self._ways(plan):
            self.tell(f"trying {plan.method}{dials}: {_STEPS} steps")
            begun = self.begin(way)
            reason = begun.reason or "it takes more memory than there is"
            if not begun.reason and (found := self._measured(way, begun)).fits:
                return found
        words = Words(f"It was tried and failed: {reason}", f"试运行失败：{reason}")
        return replace(plan, fits=False, reasons=(words, *plan.reasons))

    def _ways(self, plan: Plan) -> Iterator[tuple[Plan, str]]:
        """The cheapest in time first."""
        yield plan, ""
        most = min(plan.choice.micro_tokens, plan.batch)
        sizes = (
            [most >> i for i in (1, 2, 3) if most >> i >= _LEAST] if self.question.leaves_open(MICRO) else []
        )
        for size in sizes:
            yield _with(plan, micro_tokens=size), f", {size:,} tokens at a time"
        if self.question.leaves_open("train.gradient_checkpointing"):
            size = min([most, *sizes])
            yield (
                _with(plan, micro_tokens=size, checkpointing=True),
                f", {size:,} tokens at a time, recomputed",
            )

    def settled(self, plan: Plan) -> Plan:
        """With as many tokens at a time as are fastest, and in the precision that is, where these are open."""
        if self.question.leaves_open(MICRO):
            plan = self._cut(plan)
        other = "fp32" if plan.choice.precision == "bf16" else "bf16"
        device = self.question.situation.fleet.device
        if not (device.is_host and device.bf16 and self.question.leaves_open(PRECISION)):
            return plan
        if 2 * plan.memory > (1 - HEADROOM) * device.memory:
            return plan
        now = self._again(_with(plan, precision=other), f"trying {plan.method} in {other}: {_STEPS} steps")
        if now is None or now.tokens_per_second < _FASTER * plan.tokens_per_second:
            return plan
        return replace(now, tuned=(*now.tuned, PRECISION))

    def _cut(self, plan: Plan) -> Plan:
        """While sizes are tried, larger ones take more memory: the one that was found is measured by itself."""
        self.tell(f"trying how many tokens at a time are fastest for {plan.method}")
        begun = self.begin(plan, search=True)
        if begun.reason:
            return plan
        found = _at_a_time(begun)
        if found == min(plan.choice.micro_tokens, plan.batch):
            return plan
        told = f"trying {plan.method}, {found:,} tokens at a time: {_STEPS} steps"
        return self._again(_with(plan, micro_tokens=found), told) or plan

    def _again(self, plan: Plan, told: str) -> Plan | None:
        self.tell(told)
        begun = self.begin(plan)
        found = None if begun.reason else self._measured(plan, begun)
        if found is None or not found.fits:
            return None
        return replace(found, tuned=plan.tuned)

    def rated(self, plan: Plan) -> Plan:
        """With the learning rate of a range test, if the recipe leaves it open and the loss tells which is better."""
        if plan.choice.objective in ON_POLICY or not self.question.leaves_open(LR):
            return plan
        each = plan.batch / plan.tokens_per_second
        budget = max(_RATE_SECONDS, _RATE_SHARE * plan.hours * 3600)
        steps = min(int(budget / (_RATES * each)), _RATE_STEPS[1], round(plan.steps))
        if steps < _RATE_STEPS[0]:
            words = Words("No rates were tried, it would take too long.", "没有试学习率：耗时过长。")
            return replace(plan, reasons=(*plan.reasons, words))

        def loss(rate: float) -> float | None:
            self.tell(f"trying {plan.method} with a rate of {rate:.1e}: {steps} steps")
            begun = self.begin(replace(plan, lr=rate), steps=steps)
            losses = [event["loss"] for event in begun.of("step")]
            last = losses[-max(1, steps // 3) :]
            return None if begun.reason else sum(last) / len(last)

        found = range_test(plan.lr, loss)
        told = "; ".join(f"{rate:.1e}: {value:.3f}" for rate, value in sorted(found.losses.items()))
        words = Words(
            f"Rates tried for {steps} steps, with the loss of the last third: {told}; {found.rate:.1e} is taken.",
            f"各学习率试运行 {steps} 步，末三分之一步的损失：{told}；取 {found.rate:.1e}。",
        )
        return replace(plan, lr=found.rate, tuned=(*plan.tuned, LR), reasons=(*plan.reasons, words))

    def looked_at_again(self, plan: Plan) -> Plan:
        """As fast as it was in the mean of two looks that are apart: few machines are equally fast at all times. Runs that
        tried rates do not tell: what pays only in a long one is off in them.
        """
        self.tell(f"trying {plan.method} again: {_STEPS} steps")
        begun, own = self.begin(plan), plan.tokens_per_second
        if begun.reason:
            return plan
        rate = (own + begun.pace().tokens_per_second) / 2
        return in_time(self.question.situation, _faster(plan, rate / own))

    def begin(self, plan: Plan, search: bool = False, steps: int = 0) -> Begun:
        """The first steps of a plan's run, or a whole one of so many ``steps``; with ``search`` the number of tokens at a
        time is found first.
        """
        self.count += 1
        name = f"{plan.method}-{self.count}"
        whole = tree(self.question, plan)
        if search and self.question.leaves_open(MICRO):
            whole["train"].pop("micro_tokens", None)
            whole["fast"] = _searching(whole.get("fast", True))
        measured = not steps and whole.get("evaluate", {}).get("enabled", True)
        whole["train"] |= {"save_every": 0, "eval_every": _NEVER if measured else 0}
        whole["train"] |= {"max_steps": steps} if steps else {}
        whole |= {"evaluate": {"enabled": False}, "output": str(self.folder / name)}
        recipe = yaml.safe_dump(whole, allow_unicode=True)
        device = self.question.situation.fleet.device
        count = steps or (1 if search else _STEPS)
        patience = math.inf if steps else _PATIENCE
        # what the system allows it sees to itself
        memory = self.question.memory if device.is_host else 0
        return children.first_steps(recipe, self.folder / name, self.folder, name, count, patience, memory)

    def _measured(self, plan: Plan, begun: Begun) -> Plan:
        steps, pace = begun.of("step"), begun.pace()
        rate, peak = pace.tokens_per_second, float(steps[-1]["memory"])
        seconds = pace.cold + begun.of("train")[0]["steps"] * pace.each
        done = Measured("", plan.method, float("nan"), None, rate, peak, True, len(steps))
        memory = self.question.situation.fleet.device.memory
        now = _with(plan, micro_tokens=_at_a_time(begun))
        return in_time(self.question.situation, replace(
            now, measured=done, tokens_per_second=rate, hours=seconds / 3600, cold=pace.cold,
            fits=peak <= (1 - MEASURED_HEADROOM) * memory,
            tuned=(MICRO,) if self.question.leaves_open(MICRO) else (),
        ))  # fmt: skip


def _at_a_time(begun: Begun) -> int:
    """Tokens in a forward pass: as it began, or as few as memory then allowed."""
    smaller = [event["micro_tokens"] for event in begun.of("out-of-memory") if "micro_tokens" in event]
    return int([begun.of("train")[0]["micro_tokens"], *smaller][-1])


def _with(plan: Plan, **dials: Any) -> Plan:
    return replace(plan, choice=replace(plan.choice, **dials))


def _searching(switches: bool | dict[str, bool]) -> bool | dict[str, bool]:
    """The recipe's techniques, and the one that finds how many tokens go through the model at a time."""
    if switches is False:
        return False
    return {"micro_batch": True} | ({} if switches is True else switches)


def _with_figures(answer: Answer, plan: Plan) -> Plan:
    """With what came out beside what was predicted as its last reason, if it was tried and did well."""
    if not (plan.fits and plan.measured and not plan.measured.run):
        return plan
    before = next(one for one in answer.plans if one.method == plan.method)
    return replace(plan, reasons=(*plan.reasons, _told(before, plan)))


def _told(plan: Plan, done: Plan) -> Words:
    rate, speed = f"{done.tokens_per_second:,.0f}", f"{plan.tokens_per_second:,.0f}"
    peak, memory = human_bytes(done.memory), human_bytes(plan.memory)
    took, steps = human_seconds(done.hours * 3600), done.measured.steps if done.measured else 0
    return Words(
        f"Tried for {steps} steps: {rate} tokens/s (predicted {speed}), {peak} (predicted {memory}); so {took} in all.",
        f"试运行 {steps} 步：{rate} 词元/秒（预测 {speed}），内存 {peak}（预测 {memory}）；全程约 {took}。",
    )
