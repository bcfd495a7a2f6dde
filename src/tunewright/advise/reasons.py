"""Why a plan is chosen or not, in words, beside what rules say."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tunewright.advise.memory import ON_POLICY
from tunewright.advise.past import Measured
from tunewright.advise.situation import Situation
from tunewright.advise.speed import pace
from tunewright.core.units import human_bytes, human_count, human_seconds
from tunewright.core.words import Words

if TYPE_CHECKING:
    from tunewright.advise.plan import Plan


def of(situation: Situation, plan: "Plan") -> tuple[Words, ...]:
    """All of them: what rules, runs and tries say, then what the plan's numbers do."""
    return (*plan.reasons, *_consequences(situation, plan))


def as_measured(own: Measured) -> Words:
    """That a run has measured it."""
    match = "" if own.exact_match is None else f", {own.exact_match:.1%}"
    return Words(
        f"Measured in {own.run}: held-out loss {own.loss:.3f}{match and f', exact match{match[1:]}'}; measurements "
        "overrule rules.",
        f"{own.run} 中实测：留出损失 {own.loss:.3f}{match and f'，完全匹配{match[1:]}'}；实测优先于规则。",
    )


def _consequences(situation: Situation, plan: "Plan") -> Iterator[Words]:
    """What the numbers themselves say."""
    need, there = human_bytes(plan.memory), human_bytes(situation.fleet.device.memory)
    if not plan.fits:
        yield Words(
            f"It does not fit: {need} on a device of {there}, some of which stays free.",
            f"放不下：每个设备需要 {need}，而设备只有 {there}（其中一部分留作余量）。",
        )
    if situation.deadline:
        yield from _deadline(situation, plan)
    if plan.choice.checkpointing:
        yield Words(
            "Activations are recomputed in the backward pass, else they would not fit.",
            "反向传播时重算激活值，否则放不下。",
        )
    if plan.placement.devices > 1:
        yield _placement(situation, plan)
    if plan.placement.offload:
        size = human_bytes(12.0 * plan.trainable)
        yield Words(
            f"Masters and moments lie in the host's memory, {size} in all, which must be there.",
            f"优化器状态放在主机内存，共 {size}，须有这么多。",
        )
    if plan.choice.objective in ON_POLICY:
        yield Words(
            f"{human_count(plan.choice.answers)} answers are drawn at a time.",
            f"每次同时生成 {human_count(plan.choice.answers)} 个回答。",
        )


def _deadline(situation: Situation, plan: "Plan") -> Iterator[Words]:
    took, given = human_seconds(plan.hours * 3600), human_seconds(situation.deadline)
    if plan.hours * 3600 > situation.deadline:
        yield Words(
            f"It takes {took}, more than the {given} that there are.", f"需要 {took}，超过给定的 {given}。"
        )
    elif plan.epochs < plan.wanted:
        yield Words(
            f"Of {plan.wanted:g} passes over the data {plan.epochs:g} are made, to end within {given}.",
            f"为了在 {given} 内结束，数据只过 {plan.epochs:g} 遍，而不是 {plan.wanted:g} 遍。",
        )


def _placement(situation: Situation, plan: "Plan") -> Words:
    """Why it is placed so."""
    count, name = plan.placement.devices, plan.placement.name
    waiting = pace(situation.shape, plan.choice, plan.placement, situation.fleet, plan.batch).waiting
    told = f"{waiting:.0%}" if waiting >= 0.005 else ""
    return Words(
        f"Over {count} devices: {name} is the simplest placement that fits, and none is twice as fast"
        + (f"; devices wait for one another {told} of the time." if told else "."),
        f"在 {count} 个设备上，{name} 是放得下的最简单方案，没有别的方案快一倍以上"
        + (f"；有 {told} 的时间在互相等待。" if told else "。"),
    )
